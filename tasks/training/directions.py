"""Directions of the latent space from labelled pictures, by regularised logistic regression.

As InterFaceGAN (arXiv 1907.10786): the normal of the hyperplane that separates codes of pictures
with a property from codes of those without. There the pictures are drawn and a classifier labels
them; here they are real, an encoder gives the codes and the file the labels, so that no classifier
is needed. Pictures between the two thresholds of a label are left out, as there.

Legend: N pictures, L num_ws, D w_dim.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from models.editing.direction import Direction
from models.errors import AssetError, ConfigError
from models.inversion.base import Method, SampleRng
from models.stylegan2.generator import weights_hash
from tasks.training.data import load_pictures

CHUNK = 64
"""Pictures encoded at a time."""


@dataclass(frozen=True, kw_only=True)
class Label:
    """Which pictures have a property: those whose value in a column is high enough.

    Attributes:
        name: of the direction.
        column: of the Parquet file, numbers.
        low, high: pictures with at most `low` are without, those with at least `high` are with it.
    """

    name: str
    column: str
    low: float
    high: float

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ConfigError(
                f"label {self.name}: expected low < high, got {self.low}, {self.high}"
            )


def logistic_fit(
    codes: Float[Tensor, "N D"], is_with: Bool[Tensor, " N"], ridge: float = 1.0
) -> Float[Tensor, " D"]:
    """Unit normal of the separating hyperplane, towards the pictures with the property.

    Logistic regression on standardised codes, both kinds weighing the same, in float64.

    Args:
        ridge: weight of half the squared norm of the coefficients against the mean loss. Small
            values give the sharpest boundary; its normal then also has parts that cancel what the
            property comes with, and moves pictures little. Large ones turn the normal towards the
            difference of the two kinds' means (of standardised codes), which moves them much and
            takes along what the property comes with.

    Raises:
        ValueError: one of the kinds has no picture.
    """
    if not is_with.any() or is_with.all():
        raise ValueError("logistic fit: expected pictures with and without the property")
    x = codes.double()
    mean, std = x.mean(0), x.std(0).clamp(min=1e-12)
    x = (x - mean) / std
    y = is_with.double()
    balance = torch.where(is_with, 0.5 / y.mean(), 0.5 / (1 - y.mean()))
    slope = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [slope, bias],
        max_iter=500,
        tolerance_grad=1e-10,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(x @ slope + bias, y, balance)
        loss = loss + 0.5 * ridge * slope.square().sum()
        loss.backward()
        return loss

    with torch.inference_mode(False), torch.enable_grad():
        optimiser.step(closure)  # type: ignore[arg-type]
    normal = slope.detach() / std
    return (normal / normal.norm()).float()


def balanced_accuracy(
    vector: Float[Tensor, " D"],
    train: tuple[Float[Tensor, "N D"], Bool[Tensor, " N"]],
    held_out: tuple[Float[Tensor, "M D"], Bool[Tensor, " M"]],
) -> float:
    """Mean of both kinds' shares on the right side of the middle between their training means
    (0.5 is chance)."""
    along, is_with = train[0].double() @ vector.double(), train[1]
    middle = (along[is_with].mean() + along[~is_with].mean()) / 2
    said, truth = held_out[0].double() @ vector.double() > middle, held_out[1]
    return float((said[truth].double().mean() + (~said[~truth]).double().mean()) / 2)


@torch.no_grad()
def encode(method: Method, paths: Sequence[str]) -> Float[Tensor, "N D"]:
    """The mean row of the code of every picture of Parquet files, in their order."""
    pictures = load_pictures(paths, method.generator.resolution)
    found = []
    for start in range(0, len(pictures), CHUNK):
        images = pictures[start : start + CHUNK].float().div(127.5).sub(1.0)
        rng = SampleRng(range(start, start + len(images)))
        found.append(method.invert(images, None, rng).w_plus.mean(1))
    return torch.cat(found)


def read_column(paths: Sequence[str], column: str) -> Float[Tensor, " N"]:
    """A column of numbers of Parquet files.

    Raises:
        AssetError: a file has no such column.
    """
    try:
        parts = [pq.read_table(p, columns=[column])[column].to_numpy() for p in paths]
    except (OSError, KeyError, ValueError) as error:
        raise AssetError(
            f"labels: cannot read the column {column!r} of {paths}: {error}"
        ) from error
    return torch.from_numpy(np.concatenate(parts).astype(np.float64))


def fit_directions(
    method: Method,
    train: Sequence[str],
    held_out: Sequence[str],
    labels: Sequence[Label],
    *,
    ridge: float = 1.0,
    is_conditional: bool = True,
    terms: str = "unknown",
) -> dict[str, Direction]:
    """One direction for each label, from pictures inverted by a method.

    Args:
        method: the first of a chain, e.g. an encoder.
        train, held_out: Parquet files with `image` and the labels' columns; accuracies are measured
            on `held_out`.
        is_conditional: each direction leaves the other labels alone (`Direction.without`).
        terms: of the pictures, for the cards.

    Raises:
        AssetError: see `load_pictures`, `read_column`.
        ValueError: a label has no picture on one side.
    """
    codes, tested = encode(method, train), encode(method, held_out)
    sides = {x.name: (_sides(codes, train, x), _sides(tested, held_out, x)) for x in labels}
    digests = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in train]
    plain = {
        name: Direction(
            name=name,
            vector=logistic_fit(*fitted, ridge),
            unit=1.0,
            generator_hash=weights_hash(method.generator),
        )
        for name, (fitted, _) in sides.items()
    }
    found = {}
    for label in labels:
        direction = plain[label.name]
        others = [plain[name] for name in plain if name != label.name and is_conditional]
        if others:
            direction = direction.without(*others)
        fitted, held = sides[label.name]
        card = {
            "what": f"from {label.column} <= {label.low:g} to {label.column} >= {label.high:g}",
            "leaves_alone": [other.name for other in others],
            "fitted_on": f"{len(fitted[1])} pictures inverted by {type(method).__name__}",
            "encoder_sha256": method.hashes(),
            "pictures_sha256": digests,
            "accuracy_on": f"{len(held[1])} held-out pictures, both kinds weighing the same",
            "ridge": ridge,
            "terms": terms,
        }
        found[label.name] = replace(
            direction,
            unit=float((codes.double() @ direction.vector.double()).std()),
            accuracy=round(balanced_accuracy(direction.vector, fitted, held), 4),
            card=card,
        )
    return found


def _sides(
    codes: Float[Tensor, "N D"], paths: Sequence[str], label: Label
) -> tuple[Float[Tensor, "M D"], Bool[Tensor, " M"]]:
    """The codes that are on one side of the label, and on which."""
    values = read_column(paths, label.column)
    is_used = (values <= label.low) | (values >= label.high)
    return codes[is_used], values[is_used] >= label.high
