"""A direction of the latent space along which one property of the pictures changes.

Its file is a small JSON: the numbers, what they mean, which generator they belong to, what they
were fitted on and on what terms they may be used.

Legend: N batch, L num_ws, D w_dim.
"""

import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from models.checkpoints.bundled import ASSETS
from models.errors import AssetError
from models.stylegan2.generator import Generator, weights_hash

FORMAT = "style-refinery direction 1"


@dataclass(frozen=True, kw_only=True)
class Direction:
    """A unit vector and how far a step goes.

    Attributes:
        name: of the property, e.g. "age"; positive strengths are more of it.
        vector: of norm 1: one direction for all rows of w+, or one row for each.
        unit: length of a step of strength 1: the standard deviation, along the vector, of the codes
            it was fitted on.
        generator_hash: `weights_hash` of the generator whose W it lives in.
        layers: rows of w+ that move; None for all.
        space: "w", or "w_plus" where each row has its own vector.
        accuracy: share of held-out pictures on the right side of the boundary, None if not known.
        card: what it was fitted on, and the terms of that.
    """

    name: str
    vector: Float[Tensor, " D"] | Float[Tensor, "L D"]
    unit: float
    generator_hash: str
    layers: tuple[int, ...] | None = None
    accuracy: float | None = None
    card: Mapping[str, Any] = field(default_factory=dict)

    @property
    def space(self) -> str:
        return "w" if self.vector.ndim == 1 else "w_plus"

    def apply(self, w_plus: Float[Tensor, "N L D"], strength: float) -> Float[Tensor, "N L D"]:
        """Codes moved by `strength` units. Negative strengths undo positive ones exactly.

        Raises:
            ValueError: the vector has another size than the codes, or a layer that they have not.
        """
        rows = w_plus.shape[1]
        layers = range(rows) if self.layers is None else self.layers
        if self.vector.shape[-1:] != w_plus.shape[2:] or (
            self.vector.ndim == 2 and len(self.vector) != rows
        ):
            raise ValueError(
                f"direction {self.name}: its vector is {list(self.vector.shape)}, the codes are "
                f"{list(w_plus.shape)}: it belongs to another generator"
            )
        if any(not 0 <= layer < rows for layer in layers):
            raise ValueError(
                f"direction {self.name}: expected layers in 0..{rows - 1}, found {list(layers)}"
            )
        moves = torch.zeros(rows, 1)
        moves[list(layers)] = strength * self.unit
        return w_plus + (moves * self.vector.expand(rows, -1).cpu()).to(w_plus)

    def without(self, *others: "Direction") -> "Direction":
        """The part of the direction that leaves the others' properties alone: the projection onto
        what is orthogonal to all their vectors (InterFaceGAN's conditional direction,
        arXiv 1907.10786, section 3.2, for any number of conditions). The unit shrinks with it.

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
        vector = (rest / length).to(self.vector).reshape(self.vector.shape)
        return replace(self, vector=vector, unit=self.unit * length)

    def check_generator(self, generator: Generator) -> None:
        """Refuse a direction of another generator.

        Raises:
            AssetError: the hashes differ.
        """
        digest = weights_hash(generator)
        if self.generator_hash != digest:
            raise AssetError(
                f"direction {self.name}: it was fitted for generator "
                f"{self.generator_hash[:12]}..., this one is {digest[:12]}...; fit it again with "
                "tasks.training.directions"
            )


def save_direction(direction: Direction, path: str | Path) -> Path:
    """Write one JSON file, atomically."""
    path = Path(path)
    record = {k: v for k, v in asdict(direction).items() if k not in ("vector", "card")}
    record = {"format": FORMAT, **record, "space": direction.space, "card": dict(direction.card)}
    record["vector"] = direction.vector.double().tolist()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        temporary.write_text(json.dumps(record, indent=1) + "\n")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


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
        layers = record.pop("layers")
        return Direction(vector=vector, layers=layers and tuple(layers), **record)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise AssetError(
            f"direction {path}: cannot read ({error!r}); make it with tasks.training.directions"
        ) from error


def bundled_directions(generator: Generator) -> dict[str, Direction]:
    """The directions that ship for a generator, by name; empty where there are none."""
    digest = weights_hash(generator)
    found = [load_direction(path) for path in sorted(ASSETS.glob("*/directions/*.json"))]
    return {d.name: d for d in found if d.generator_hash == digest}
