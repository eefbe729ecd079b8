"""A run as a torch Dataset; `OpenRun.dataset` makes it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch.utils.data import Dataset

from tasks.catalogue.opened import OpenRun, decoded


class CodeDataset(Dataset[dict[str, Any]]):
    """Inverted samples: {"sample_key", "w_plus" float32 [L D], pictures uint8 [3 H W], the float
    columns of `samples`}. A DataLoader's batch is read together; its workers may be processes.

    Args:
        samples: the rows, of the view `samples`.
        pictures: columns of images/.
    """

    def __init__(
        self, run: OpenRun, samples: pa.Table, pictures: Sequence[str], *, with_codes: bool
    ) -> None:
        self.run, self.pictures, self.with_codes = run, tuple(pictures), with_codes
        self.keys: list[str] = samples["sample_key"].to_pylist()
        self._rows = run.rows_of(self.keys)
        self._metrics = {
            field.name: samples[field.name].to_numpy()
            for field in samples.schema
            if pa.types.is_floating(field.type)
        }

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The samples of a batch; a DataLoader asks so."""
        at = np.asarray(indices)
        rows = self._rows[at]
        items: list[dict[str, Any]] = [{"sample_key": self.keys[i]} for i in at]
        if self.with_codes:
            for item, code in zip(items, self.run.codes_at(rows), strict=True):
                item["w_plus"] = torch.from_numpy(code)
        for name in self.pictures:
            for item, data in zip(items, self.run.encoded_at(rows, name), strict=True):
                item[name] = torch.from_numpy(decoded(data).copy()).permute(2, 0, 1)
        for name, values in self._metrics.items():
            for item, value in zip(items, values[at], strict=True):
                item[name] = float(value)
        return items
