"""A direction of the latent space along which one property of the pictures changes.

Its file is a small JSON: the numbers, what they mean, which generator they belong to, what they
were fitted on and on what terms they may be used. Directions live in W, in W+ (a vector for each
row) or in style space (a value for each channel of the affines' outputs).

Legend: N batch, L num_ws, D w_dim, I input channels of a layer, S style channels of all layers.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from models.checkpoints.bundled import ASSETS
from models.errors import AssetError
from models.files import atomically
from models.stylegan2.generator import Generator, check_made_for, weights_hash

FORMAT = "style-refinery direction 1"


@dataclass(frozen=True, kw_only=True)
class Direction:
    """A unit vector and how far a step goes.

    Attributes:
        name: of the property, e.g. "age"; positive strengths are more of it.
        vector: of norm 1: one direction for all rows of w+, one for each row (all together of norm
            1), or the style channels of all layers one after the other.
        unit: length of a step of strength 1: usually the standard deviation, along the vector, of
            the codes it was fitted on.
        generator_hash: `weights_hash` of the generator whose latent space it lives in.
        layers: rows of w+ that move, in style space layers of `Generator.layers()`; None for all.
        channels: in style space the number of channels of each layer, in the order of
            `Generator.layers()`; None elsewhere.
        origin: None where strengths are added. Otherwise a strength is set, as GANSpace's published
            edits do: it is what row 0 of the code becomes along the vector, in units from `origin`.
        accuracy: share of held-out pictures on the right side of the boundary, None if not known.
        card: what it was fitted on, and the terms of that.
    """

    name: str
    vector: Float[Tensor, " D"] | Float[Tensor, "L D"] | Float[Tensor, " S"]
    unit: float
    generator_hash: str
    layers: tuple[int, ...] | None = None
    channels: tuple[int, ...] | None = None
    origin: float | None = None
    accuracy: float | None = None
    card: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.channels is not None and list(self.vector.shape) != [sum(self.channels)]:
            raise ValueError(
                f"direction {self.name}: its vector is {list(self.vector.shape)}, its layers have "
                f"{sum(self.channels)} style channels"
            )
        if self.origin is not None and self.space != "w":
            raise ValueError(
                f"direction {self.name}: a strength can be set in space w only, this is space "
                f"{self.space}"
            )

    @property
    def space(self) -> str:
        """ "w", "w_plus" where each row has its own vector, "s" for style space."""
        if self.channels is not None:
            return "s"
        return "w" if self.vector.ndim == 1 else "w_plus"

    def apply(
        self, w_plus: Float[Tensor, "N L D"], strength: float | Float[Tensor, " N"]
    ) -> Float[Tensor, "N L D"]:
        """Codes moved by `strength` units, the same for all pictures or one for each.

        Negative strengths undo positive ones, unless strengths are set (`origin`). A direction in
        style space leaves codes as they are: see `style_shift`.

        Raises:
            ValueError: the vector has another size than the codes, or a layer that they have not.
        """
        if self.channels is not None:
            return w_plus
        rows = w_plus.shape[1]
        if self.vector.shape[-1:] != w_plus.shape[2:] or (
            self.vector.ndim == 2 and len(self.vector) != rows
        ):
            raise ValueError(
                f"direction {self.name}: its vector is {list(self.vector.shape)}, the codes are "
                f"{list(w_plus.shape)}: it belongs to another generator"
            )
        vector = self.vector.to(w_plus)
        steps = torch.as_tensor(strength).to(w_plus).expand(len(w_plus))
        if self.origin is not None:
            # Row by row, so that a picture's bits do not depend on how many others there are.
            along = (w_plus[:, 0] * vector).sum(1)
            steps = steps - (along - self.origin) / self.unit
        moves = torch.zeros(rows, 1, dtype=w_plus.dtype, device=w_plus.device)
        moves[list(self._layers(rows))] = self.unit
        return w_plus + steps[:, None, None] * (moves * vector)

    def style_shift(
        self, strength: float | Float[Tensor, " N"]
    ) -> dict[int, Float[Tensor, " I"] | Float[Tensor, "N I"]] | None:
        """What `strength` units add to the affines' outputs, by layer; None unless space is "s".

        Layers without a moving channel are left out.

        Raises:
            ValueError: a layer that the generator has not.
        """
        if self.channels is None:
            return None
        steps = torch.as_tensor(strength).to(self.vector)[..., None] * self.unit
        parts = self.vector.split(self.channels)
        layers = self._layers(len(parts))
        return {index: steps * parts[index] for index in layers if parts[index].any()}

    def _layers(self, count: int) -> Sequence[int]:
        layers = range(count) if self.layers is None else self.layers
        if any(not 0 <= layer < count for layer in layers):
            raise ValueError(
                f"direction {self.name}: expected layers in 0..{count - 1}, found {list(layers)}"
            )
        return layers

    def without(self, *others: "Direction") -> "Direction":
        """The part of the direction that leaves the others' properties alone: the projection onto
        what is orthogonal to all their vectors (InterFaceGAN's conditional direction,
        arXiv 1907.10786, section 3.2, for any number of conditions). The unit shrinks with it.
        All rows or channels count, also those outside of `layers`.

        Raises:
            ValueError: nothing is left, or the vectors differ in size.
        """
        if any(other.vector.shape != self.vector.shape for other in others):
            raise ValueError(f"direction {self.name}: its conditions have vectors of another size")
        flat = self.vector.flatten().double()
        span = torch.stack([other.vector.flatten().double() for other in others], 1)
        base, _ = torch.linalg.qr(span)
        rest = flat - base @ (base.T @ flat)
        length = float(rest.norm())
        if length < 1e-6:
            raise ValueError(f"direction {self.name}: nothing of it is left beside its conditions")
        vector = rest.reshape(self.vector.shape).div(length).to(self.vector)
        return replace(self, vector=vector, unit=self.unit * length)

    def check_generator(self, generator: Generator) -> None:
        """Refuse a direction of another generator.

        Raises:
            AssetError: the hashes differ.
        """
        remedy = "fit it again with `refinery directions fit`"
        check_made_for(f"direction {self.name}", self.generator_hash, generator, remedy)


def save_direction(direction: Direction, path: str | Path) -> Path:
    """Write one JSON file, atomically."""
    path = Path(path)
    record = {k: v for k, v in asdict(direction).items() if k not in ("vector", "card")}
    record = {"format": FORMAT, **record, "space": direction.space, "card": dict(direction.card)}
    vector = _shortest(direction.vector)
    text = json.dumps(record, indent=1)
    with atomically(path) as file:
        file.write(f'{text[:-2]},\n "vector": {json.dumps(vector)}\n}}\n'.encode())
    return path


def _shortest(values: Tensor) -> Any:
    """Nested lists of the shortest decimals that give the same float32 again."""
    if values.ndim == 1:
        return [float(str(number)) for number in values.detach().cpu().float().numpy()]
    return [_shortest(row) for row in values]


def load_direction(path: str | Path) -> Direction:
    """Read what `save_direction` wrote.

    Raises:
        AssetError: missing, or not such a file.
    """
    path = Path(path)
    try:
        record = json.loads(path.read_text())
        if record.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT!r}")
        record.pop("space")
        vector = torch.tensor(record.pop("vector"), dtype=torch.float32)
        if vector.ndim not in (1, 2) or not vector.isfinite().all():
            raise ValueError("expected a finite vector or one for each row")
        for name in ("layers", "channels"):  # files from before style space have no channels
            value = record.pop(name, None)
            record[name] = None if value is None else tuple(value)
        return Direction(vector=vector, **record)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise AssetError(
            f"direction {path}: cannot read ({error!r}); make it with `refinery directions fit`"
        ) from error


def bundled_directions(generator: Generator) -> dict[str, Direction]:
    """The directions that ship for a generator, by name; empty where there are none."""
    digest = weights_hash(generator)
    found = [load_direction(path) for path in sorted(ASSETS.glob("*/directions/*.json"))]
    return {d.name: d for d in found if d.generator_hash == digest}


def apply_edits(
    w_plus: Float[Tensor, "N L D"], edits: Sequence[tuple[Direction, float | Float[Tensor, " N"]]]
) -> tuple[Float[Tensor, "N L D"], dict[int, Float[Tensor, "_ _"]] | None]:
    """Several directions, one after the other: moved codes and the shift in style space.

    Both go to `Inversion.edited`, the shift also to `Inversion.render`. The order matters only for
    directions that set a strength.

    Raises:
        ValueError: a direction does not fit the codes (`Direction.apply`).
    """
    total: dict[int, Tensor] = {}
    for direction, strength in edits:
        w_plus = direction.apply(w_plus, strength)
        for index, shift in (direction.style_shift(strength) or {}).items():
            rows = torch.atleast_2d(shift).to(w_plus)
            total[index] = total[index] + rows if index in total else rows
    return w_plus, total or None
