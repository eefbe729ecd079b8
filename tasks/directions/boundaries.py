"""InterFaceGAN's directions from a run: stored codes, labels joined to them, a boundary between
those with a property and those without.

Legend: N samples, M those on one side of a label, L num_ws, D w_dim.
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from models.checkpoints.load import load_generator
from models.editing.boundary import BoundaryLoss, balanced_accuracy, fit_boundary
from models.editing.direction import Direction, save_direction
from models.errors import ConfigError
from models.stylegan2.generator import Generator, weights_hash
from tasks.run.labels import Labels, joined, read_labels
from tasks.run.run_json import read_run
from tasks.run.stored import read_inversions


@dataclass(frozen=True, kw_only=True)
class FitDirectionsConfig:
    """What every way of finding directions needs."""

    __pydantic_config__ = {"extra": "forbid"}

    generator: str = "faces64"
    """A bundled name or a checkpoint file."""
    out: str = "directions"
    """Folder for `<name>.json`."""


@dataclass(frozen=True, kw_only=True)
class Label:
    """Which samples have a property: those whose value in a column is high enough."""

    __pydantic_config__ = {"extra": "forbid"}

    name: str
    """Of the direction."""
    column: str
    """Of the label files, numbers."""
    low: float
    """Samples with at most this are without the property."""
    high: float
    """Samples with at least this have it; those between are left out."""
    leaves_alone: tuple[str, ...] | None = None
    """Labels whose directions are projected out of this one; None for all others."""
    layers: tuple[int, ...] | None = None
    """Rows of w+ that move; None for all. In space w_plus the boundary is fitted on them alone."""
    ridge: float | None = None
    """Of this label's boundary, and of those that it leaves alone; None for the config's."""

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise ConfigError(
                f"label {self.name}: expected low < high, got {self.low}, {self.high}"
            )
        if self.ridge is not None and self.ridge <= 0:
            raise ConfigError(f"label {self.name}: expected ridge > 0, got {self.ridge}")


@dataclass(frozen=True, kw_only=True)
class FitBoundaryConfig(FitDirectionsConfig):
    """InterFaceGAN: boundaries between stored codes, by labels joined to them."""

    run: str
    """A run of `refinery invert`; its codes are fitted on."""
    labels: tuple[str, ...]
    """Parquet or CSV files, or folders of them; for example the run's own input."""
    properties: tuple[Label, ...]
    """What to find, and what to leave alone: one direction each."""
    key_column: str | None = None
    """Column of the sample keys; by default the run's `input.key_column`, else "<file>:<row>"."""
    held_out_run: str | None = None
    """A run whose codes measure the accuracy; None keeps a share of `run` for that."""
    held_out_labels: tuple[str, ...] | None = None
    """Labels of `held_out_run`; None where they stand among `labels`."""
    held_out_share: float = 0.1
    """Share of `run` by a hash of the sample key, where there is no `held_out_run`."""
    space: Literal["w", "w_plus"] = "w"
    """"w" fits on the mean row of each code; "w_plus" finds a vector for each row."""
    loss: BoundaryLoss = "logistic"
    """"svm" for a linear support vector machine, as published."""
    ridge: float = 1.0
    """Weight of the coefficients' norm: see `fit_boundary`."""
    terms: str = "unknown"
    """Of the pictures and labels, for the cards."""

    def __post_init__(self) -> None:
        names = [label.name for label in self.properties]
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"properties: expected one or more different names, got {names}")
        for label in self.properties:
            for other in label.leaves_alone or ():
                if other not in names or other == label.name:
                    raise ConfigError(
                        f"label {label.name}: leaves_alone names {other!r}; the others are "
                        f"{', '.join(n for n in names if n != label.name) or '(none)'}"
                    )
        if self.ridge <= 0 or not 0 < self.held_out_share < 1:
            raise ConfigError(
                "expected ridge > 0 and 0 < held_out_share < 1, got "
                f"ridge={self.ridge}, held_out_share={self.held_out_share}"
            )


@dataclass(frozen=True, kw_only=True)
class LabelledCodes:
    """Codes of a run with their labels, NaN where a sample has none.

    Attributes:
        values: by column.
        source: where the codes come from, for cards: run_id, weights.
    """

    sample_keys: tuple[str, ...]
    w_plus: Float[Tensor, "N L D"]
    values: Mapping[str, Float[Tensor, " N"]]
    source: Mapping[str, Any]

    def at(self, rows: Bool[Tensor, " N"]) -> "LabelledCodes":
        """Some of them."""
        kept = [key for key, is_in in zip(self.sample_keys, rows.tolist(), strict=True) if is_in]
        return replace(
            self,
            sample_keys=tuple(kept),
            w_plus=self.w_plus[rows],
            values={name: column[rows] for name, column in self.values.items()},
        )


def fit_boundaries(config: FitBoundaryConfig) -> list[Path]:
    """Directions from a run's codes and labels, written to `<out>/<name>.json`.

    Raises:
        AssetError, LedgerError: generator, run or labels cannot be read or do not fit each other.
        ConfigError: a column is missing, no sample has labels; else as `fit_from_codes`.
    """
    generator = load_generator(config.generator)
    train = _read(config, config.run, config.labels, generator)
    if config.held_out_run is None:
        rows = torch.tensor([is_held_out(k, config.held_out_share) for k in train.sample_keys])
        train, held_out = train.at(~rows), train.at(rows)
    else:
        places = config.held_out_labels or config.labels
        held_out = _read(config, config.held_out_run, places, generator)
    found = fit_from_codes(train, held_out, weights_hash(generator), config)
    return [save_direction(d, Path(config.out) / f"{d.name}.json") for d in found.values()]


def is_held_out(sample_key: str, share: float) -> bool:
    """Whether a sample only measures: decided by its key alone, whatever else the run holds."""
    digest = hashlib.sha256(f"held out:{sample_key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def read_labelled(
    run_uri: str, generator: Generator, labels: Labels, columns: Sequence[str]
) -> LabelledCodes:
    """Every inverted sample of a run with its labels.

    Raises:
        AssetError, LedgerError: as `read_inversions`.
        ConfigError: no sample has labels, or the run has no inverted sample.
    """
    keys: list[str] = []
    codes: list[Tensor] = []
    for batch in read_inversions(run_uri, generator):
        keys += batch.sample_keys
        codes.append(batch.inversion.w_plus)
    if not keys:
        raise ConfigError(f"{run_uri}: no inverted sample is committed there: run it first")
    rows = joined(labels, keys, run_uri)
    values = {
        column: torch.tensor(
            [math.nan if row is None else row[column] for row in rows], dtype=torch.float64
        )
        for column in columns
    }
    record = read_run(run_uri)
    return LabelledCodes(
        sample_keys=tuple(keys),
        w_plus=torch.cat(codes),
        values=values,
        source={name: record[name] for name in ("run_id", "weights")},
    )


def fit_from_codes(
    train: LabelledCodes,
    held_out: LabelledCodes,
    generator_hash: str,
    config: FitBoundaryConfig,
) -> dict[str, Direction]:
    """One direction for each property, by name: its boundary's normal, the others projected out.

    Raises:
        ConfigError: a label has samples on one side only, in training or held out, or nothing of a
            direction is left beside the others.
    """
    labels = {label.name: label for label in config.properties}
    sides = {name: (_side(train, x), _side(held_out, x)) for name, x in labels.items()}
    plain: dict[tuple[str, float], Direction] = {}

    def boundary(label: Label, ridge: float) -> Direction:
        if (label.name, ridge) not in plain:
            vector = _boundary(train, label, sides[label.name][0], ridge, config)
            plain[label.name, ridge] = Direction(
                name=label.name,
                vector=vector,
                unit=1.0,
                generator_hash=generator_hash,
                layers=label.layers,
            )
        return plain[label.name, ridge]

    found = {}
    for label in config.properties:
        ridge = label.ridge or config.ridge
        others = [name for name in labels if name != label.name]
        others = others if label.leaves_alone is None else list(label.leaves_alone)
        direction = boundary(label, ridge)
        try:
            if others:
                direction = direction.without(*(boundary(labels[n], ridge) for n in others))
        except ValueError as error:
            raise ConfigError(f"{error}; leave one of {', '.join(others)} out") from error
        found[label.name] = replace(
            _measured(direction, train, held_out, sides[label.name]),
            card=_card(config, label, others, train, sides[label.name]),
        )
    return found


_Side = tuple[Bool[Tensor, " N"], Bool[Tensor, " M"]]
"""Which samples are on one side of a label; of those, which have the property."""


def _read(
    config: FitBoundaryConfig, run_uri: str, places: Sequence[str], generator: Generator
) -> LabelledCodes:
    columns = [label.column for label in config.properties]
    own = read_run(run_uri)["config"].get("input", {}).get("key_column")
    labels = read_labels(places, columns, config.key_column or own)
    return read_labelled(run_uri, generator, labels, columns)


def _side(data: LabelledCodes, label: Label) -> _Side:
    values = data.values[label.column]
    is_used = (values <= label.low) | (values >= label.high)
    is_with = values[is_used] >= label.high
    if not is_with.any() or is_with.all():
        raise ConfigError(
            f"label {label.name}: of {len(values)} samples {int(is_with.sum())} have "
            f"{label.column} >= {label.high:g} and {int((~is_with).sum())} have <= {label.low:g}; "
            "expected some of both in what is fitted and in what is held out"
        )
    return is_used, is_with


def _boundary(
    train: LabelledCodes, label: Label, side: _Side, ridge: float, config: FitBoundaryConfig
) -> Float[Tensor, " D"] | Float[Tensor, "L D"]:
    """The normal between the mean rows, or between the rows that move, one after the other; rows
    that do not move are zero."""
    used, is_with = side
    if config.space == "w":
        return fit_boundary(train.w_plus[used].mean(1), is_with, ridge, config.loss)
    rows = torch.zeros(train.w_plus.shape[1:])
    moved = list(label.layers or range(len(rows)))
    codes = train.w_plus[used][:, moved].flatten(1)
    vector = fit_boundary(codes, is_with, ridge, config.loss)
    rows[moved] = vector.reshape(len(moved), -1)
    return rows


def _measured(
    direction: Direction, train: LabelledCodes, held_out: LabelledCodes, sides: tuple[_Side, _Side]
) -> Direction:
    """With its unit, the deviation of the training codes along the vector, and its accuracy on the
    held-out codes."""
    vector = direction.vector.flatten()

    def codes(data: LabelledCodes) -> Float[Tensor, "N _"]:
        return data.w_plus.mean(1) if direction.space == "w" else data.w_plus.flatten(1)

    along = codes(train).double() @ vector.double()
    (used, is_with), (held_used, held_with) = sides
    accuracy = balanced_accuracy(
        vector, (codes(train)[used], is_with), (codes(held_out)[held_used], held_with)
    )
    return replace(direction, unit=float(along.std()), accuracy=round(accuracy, 4))


def _card(
    config: FitBoundaryConfig,
    label: Label,
    others: Sequence[str],
    train: LabelledCodes,
    sides: tuple[_Side, _Side],
) -> dict[str, Any]:
    return {
        "what": f"from {label.column} <= {label.low:g} to {label.column} >= {label.high:g} "
        "(InterFaceGAN, arXiv 1907.10786)",
        "leaves_alone": list(others),
        "fitted_on": f"{len(sides[0][1])} stored codes of run {train.source['run_id']}",
        "weights_sha256": train.source["weights"],
        "accuracy_on": f"{len(sides[1][1])} held-out codes, both kinds weighing the same",
        "loss": config.loss,
        "ridge": label.ridge or config.ridge,
        "terms": config.terms,
    }
