"""Pictures with what is known of them: medium, age, gender, smile.

Legend: M pictures, H W image.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from models.errors import AssetError
from tasks.adapt.portraits import is_held_out as is_held_out
from tasks.training.assets.clip_media import FILTERS
from tasks.training.data import load_pictures

MEDIA = ("photo", "impasto", "fantasy", "illustration", *FILTERS)
"""What a picture is made as; the `style` column names it, files without one hold photographs. Those
of `FILTERS` are made of photographs while training."""
LABELS = {"age": "age", "gender": "gender", "smile": "smile_prob"}
"""Name of a label -> column of the file."""


@dataclass(frozen=True, kw_only=True)
class LabelledPictures:
    """Pictures in memory, with labels; NaN where a file does not say.

    Attributes:
        pictures: 0..255.
        medium: index in `MEDIA`.
        labels: "age" in years, "gender" 0 male 1 female, "smile" as a probability.
        is_held_out: of portraits, by `is_held_out` of the id; False for files without a style,
            which have files of their own to validate with.
    """

    pictures: UInt8[Tensor, "M 3 H W"]
    medium: Int[Tensor, " M"]
    labels: dict[str, Float[Tensor, " M"]]
    is_held_out: Bool[Tensor, " M"]

    def __len__(self) -> int:
        return len(self.pictures)

    def at(self, rows: Tensor) -> "LabelledPictures":
        """Some of them: rows by index or by mask."""
        return LabelledPictures(
            pictures=self.pictures[rows],
            medium=self.medium[rows],
            labels={name: values[rows] for name, values in self.labels.items()},
            is_held_out=self.is_held_out[rows],
        )


def load_labelled(paths: Sequence[str], resolution: int) -> LabelledPictures:
    """Read Parquet files with an `image` column and, where they have them, `id`, `style`, `age`,
    `gender` and `smile_prob`.

    Raises:
        AssetError: a file cannot be read, or a style is not one of `MEDIA`.
    """
    pictures = load_pictures(paths, resolution)
    media: list[int] = []
    held_out: list[bool] = []
    labels: dict[str, list[float]] = {name: [] for name in LABELS}
    for path in paths:
        table = pq.read_table(path, columns=_columns(path))
        for style in _column(table, "style", "photo"):
            if style not in MEDIA:
                raise AssetError(
                    f"training data {path}: style {style!r} is unknown; known: {', '.join(MEDIA)}"
                )
            media.append(MEDIA.index(style))
        held_out += _held_out(table)
        for name, column in LABELS.items():
            found = _column(table, column, None)
            labels[name] += [float("nan") if value is None else float(value) for value in found]
    return LabelledPictures(
        pictures=pictures,
        medium=torch.tensor(media),
        labels={name: torch.tensor(values) for name, values in labels.items()},
        is_held_out=torch.tensor(held_out),
    )


def draw_weights(labels: Mapping[str, Float[Tensor, " M"]], balance: float) -> Float[Tensor, " M"]:
    """Chances to be drawn that part age from gender, which come together in photographs: within a
    decade both genders are drawn as often, the decades by their frequency to the power of 1 -
    `balance` (0 as they come, 1 each as often). Pictures without these labels are a decade of
    their own. They sum to 1.
    """
    decade = (labels["age"] / 10).nan_to_num(-1).long() + 1
    cell = 3 * decade + labels["gender"].nan_to_num(2).long()
    in_decade = decade.bincount().float()
    in_cell = cell.bincount().float()
    present = (in_cell > 0).float()
    genders = F.pad(present, (0, -len(present) % 3)).reshape(-1, 3).sum(1)
    weights = in_decade.pow(1 - balance)[decade] / genders[decade] / in_cell[cell]
    return weights / weights.sum()


def _columns(path: str) -> list[str]:
    wanted = ("id", "style", *LABELS.values())
    return [name for name in pq.read_schema(path).names if name in wanted]


def _held_out(table: pa.Table) -> list[bool]:
    if not {"id", "style"} <= set(table.schema.names):
        return [False] * table.num_rows
    return [is_held_out(name) for name in table["id"].to_pylist()]


def _column(table: pa.Table, name: str, default: object) -> list[Any]:
    """A column's values, or the default for every row of a file without it."""
    return table[name].to_pylist() if name in table.schema.names else [default] * table.num_rows
