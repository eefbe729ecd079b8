"""The parts of an index and the projection of its codes, read without device code.

    y = (x - mean) @ component.T            the leading directions of a sample of the run
    code = round(y / step) + 128            uint8; one step for all directions, so that distances of
                                            codes are distances of vectors

Beyond the range a code is cut to 1 or 255. Directions left out and rounding only decide which rows
are looked at: their order comes from the exact vectors.

Legend: N rows, E values of a vector, P directions.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Float16, Float32, UInt8
from safetensors import SafetensorError
from safetensors.numpy import load, save

from models.errors import LedgerError
from tasks.run.marker import Part
from tasks.storage.files import (
    exists,
    is_local,
    join,
    local_path,
    open_filesystem,
    read_bytes,
    write_bytes,
)
from tasks.storage.part_files import PartFile, part_errors

PROJECTION = "projection.safetensors"
ZERO = 128
"""The code of a value of zero."""
NPY_HEADER = 128
"""Bytes before the first row of a file of `np.save`."""
REACH = 0.9995
"""Share of the sample's values, in the widest direction, that is not cut."""


@dataclass(frozen=True, kw_only=True)
class Projection:
    """How vectors become codes.

    Attributes:
        component: unit rows, largest variance first.
        step: width of a code in units of the vectors.
    """

    mean: Float32[np.ndarray, " E"]
    component: Float32[np.ndarray, "P E"]
    step: float

    @staticmethod
    def fit(sample: Float32[np.ndarray, "N E"], component: np.ndarray) -> "Projection":
        """Centre and step of a sample along directions that were found for it."""
        mean = sample.mean(0, dtype=np.float64).astype(np.float32)
        reach = np.quantile(np.abs((sample - mean) @ component.T), REACH, axis=0).max(initial=0.0)
        return Projection(mean=mean, component=component, step=max(float(reach), 1e-12) / 127)

    def project(self, vectors: Float32[np.ndarray, "N E"]) -> Float32[np.ndarray, "N P"]:
        """In units of the codes, about `ZERO` less; not rounded."""
        return (vectors - self.mean) @ self.component.T / np.float32(self.step)

    def codes(self, vectors: Float32[np.ndarray, "N E"]) -> UInt8[np.ndarray, "N P"]:
        return (np.rint(self.project(vectors)).clip(-127, 127) + ZERO).astype(np.uint8)

    def write(self, run_uri: str) -> None:
        """Keep it in the index's folder."""
        step = np.array([self.step], np.float64)
        tensors = {"mean": self.mean, "component": self.component, "step": step}
        write_bytes(join(run_uri, PROJECTION), save(tensors))

    @staticmethod
    def read(run_uri: str) -> "Projection | None":
        """What `write` wrote; None where nothing is.

        Raises:
            LedgerError: it is damaged.
        """
        uri = join(run_uri, PROJECTION)
        if not exists(uri):
            return None
        try:
            found = load(read_bytes(uri, LedgerError))
            return Projection(
                mean=found["mean"], component=found["component"], step=float(found["step"][0])
            )
        except (SafetensorError, KeyError, ValueError) as error:
            raise LedgerError(
                f"{uri}: damaged ({error}); restore it, or delete the index and make it again"
            ) from error


def default_index(run_uri: str, space: str = "w_plus") -> str:
    """Where `refinery index` puts the index of a run: beside it."""
    end = "" if space == "w_plus" else f"-{space}"
    return f"{run_uri.rstrip('/')}-index{end}"


def open_vectors(run_uri: str, part: Part) -> pa.Table:
    """Keys, scores and codes of a shard: mapped where the index is local, else fetched.

    Raises:
        LedgerError: the part is missing or damaged.
    """
    uri = join(run_uri, part.path)
    with part_errors(uri):
        if is_local(uri):
            path = local_path(uri)
            with open(path, "rb") as file:  # what is not in memory comes in while others are opened
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
            return pa.ipc.open_file(pa.memory_map(path)).read_all()
        return pa.ipc.open_file(pa.py_buffer(PartFile(uri, part.bytes).readall())).read_all()


def codes_of(table: pa.Table) -> UInt8[np.ndarray, "N P"]:
    """The codes of `open_vectors`, without a copy."""
    (column,) = table["code"].chunks
    flat = column.flatten()
    # Not `to_numpy`, which loads pandas: 0.3 s of a first answer.
    values = np.frombuffer(flat.buffers()[1], np.uint8, len(flat), flat.offset)
    return values.reshape(len(column), column.type.list_size)


class Exact:
    """The exact vectors of an index's parts, of which single rows are read: mapped where the index
    is local, else one request for each row, all at once.

    Args:
        parts: of kind "exact".
    """

    def __init__(self, run_uri: str, parts: Sequence[Part]) -> None:
        self._run_uri, self._parts = run_uri, parts
        self._mapped: dict[int, np.ndarray] = {}

    @property
    def size(self) -> int:
        """E."""
        return self._row_bytes(self._parts[0]) // 2

    def take(self, parts: np.ndarray, rows: np.ndarray) -> Float16[np.ndarray, "M E"]:
        """Row `rows[m]` of part `parts[m]`.

        Raises:
            LedgerError: a part is missing or damaged.
        """
        with part_errors(join(self._run_uri, "exact")):
            if is_local(self._run_uri):
                return self._from_maps(parts, rows)
            return self._fetched(parts, rows)

    def _from_maps(self, parts: np.ndarray, rows: np.ndarray) -> np.ndarray:
        found = np.empty((len(rows), self.size), np.float16)
        order = np.argsort(parts, kind="stable")
        for at in np.split(order, np.flatnonzero(np.diff(parts[order])) + 1) if len(rows) else ():
            part = int(parts[at[0]])
            if part not in self._mapped:
                path = local_path(join(self._run_uri, self._parts[part].path))
                self._mapped[part] = np.asarray(np.load(path, mmap_mode="r"))
            found[at] = self._mapped[part][rows[at]]
        return found

    def _fetched(self, parts: np.ndarray, rows: np.ndarray) -> np.ndarray:
        places = [
            (self._parts[part], int(row)) for part, row in zip(parts.tolist(), rows, strict=True)
        ]
        filesystem, root = open_filesystem(self._run_uri)
        length = 2 * self.size
        starts = [NPY_HEADER + row * length for _, row in places]
        found = filesystem.cat_ranges(
            [f"{root}/{part.path}" for part, _ in places],
            starts,
            [start + length for start in starts],
            on_error="raise",
        )
        return np.frombuffer(b"".join(found), np.float16).reshape(len(rows), -1)

    def _row_bytes(self, part: Part) -> int:
        return (part.bytes - NPY_HEADER) // part.rows
