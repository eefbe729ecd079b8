"""The parts of an index and the projection of its codes, read without device code.

    y = (x - mean) @ component.T / step     the leading directions of a sample of the run
    code = round(y) + 128                   uint8; one step for all directions, so that distances of
                                            codes are distances of vectors
    sketch = coarse, fine, rest
    coarse                                  4 bits for each two directions, a wide one and a narrow
                                            one: the nearest of their 16 centroids (product
                                            quantisation, Jegou et al. 2011)
    fine                                    2 bits for each direction: what is left of y there, in
                                            four steps
    rest                                    a byte: the squared length of x outside of the
                                            directions, which distances of y miss

Beyond the range a code is cut to 1 or 255. Directions left out and rounding only decide which rows
are looked at: their order comes from the exact vectors.

Legend: N rows, E values of a vector, P directions, M pairs of them, S bytes of a sketch:
M / 2 + P / 4 + 1.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float16, Float32, UInt8
from safetensors import SafetensorError
from safetensors.numpy import load, save
from threadpoolctl import threadpool_limits

from models.errors import LedgerError
from tasks.run.marker import Part
from tasks.storage.files import (
    find_bytes,
    is_local,
    join,
    local_path,
    open_filesystem,
    write_bytes,
)
from tasks.storage.part_files import PartFile, part_errors, read_range

if TYPE_CHECKING:
    import faiss  # only sketches need it here, and most readers do not

PROJECTION = "projection.safetensors"
ZERO = 128
"""The code of a value of zero."""
NPY_HEADER = 128
"""Bytes before the first row of a file of `np.save`."""
GAP_BYTES = 2**14
"""Rows of an object store that begin nearer to each other are one request."""
REACH = 0.9995
"""Share of the sample's values, in the widest direction, that is not cut."""
FEWEST = 1024
"""Samples that centroids are fitted to; fewer are repeated."""


@dataclass(frozen=True, kw_only=True)
class Projection:
    """How vectors become codes.

    Attributes:
        component: unit rows, largest variance first.
        step: width of a code in units of the vectors.
        centroids: of the pairs of directions, in units of the codes.
        fine: width of a step of each direction, in units of the codes.
        rest: least of it and width of a step, in squared units of the codes.
    """

    mean: Float32[np.ndarray, " E"]
    component: Float32[np.ndarray, "P E"]
    step: float
    centroids: Float32[np.ndarray, "M 16 2"]
    fine: Float32[np.ndarray, " P"]
    rest: Float32[np.ndarray, " 2"]

    @staticmethod
    def fit(sample: Float32[np.ndarray, "N E"], component: np.ndarray) -> "Projection":
        """Centre, steps and centroids of a sample along directions that were found for it."""
        mean = sample.mean(0, dtype=np.float64).astype(np.float32)
        along = (sample - mean) @ component.T
        reach = np.quantile(np.abs(along), REACH, axis=0).max(initial=0.0)
        step = max(float(reach), 1e-12) / 127
        along /= np.float32(step)
        pairs = paired(along)
        import faiss

        # One thread, as sums split over threads round differently.
        with threadpool_limits(1, "openmp"):
            quantizer = faiss.ProductQuantizer(pairs.shape[1], pairs.shape[1] // 2, 4)
            quantizer.train(np.resize(pairs, (max(len(pairs), FEWEST), pairs.shape[1])))
        centroids = faiss.vector_to_array(quantizer.centroids).reshape(-1, 16, 2)
        left = along - _decoded(quantizer, quantizer.compute_codes(pairs), along.shape[1])
        rest = (((sample - mean) / np.float32(step)) ** 2).sum(1) - (along**2).sum(1)
        width = max(float(np.ptp(rest)) / 255, 1e-12)
        return Projection(
            mean=mean,
            component=component,
            step=step,
            centroids=centroids,
            fine=left.std(0).clip(1e-6).astype(np.float32),
            rest=np.array([rest.min(), width], np.float32),
        )

    def project(self, vectors: Float32[np.ndarray, "N E"]) -> Float32[np.ndarray, "N P"]:
        """In units of the codes, about `ZERO` less; not rounded."""
        per_code, centre = self._along
        return vectors @ per_code - centre

    @cached_property
    def _along(self) -> tuple[Float32[np.ndarray, "E P"], Float32[np.ndarray, " P"]]:
        per_code = np.ascontiguousarray(self.component.T / np.float32(self.step))
        return per_code, self.mean @ per_code

    def encode(self, vectors: Float32[np.ndarray, "N E"]) -> dict[str, np.ndarray]:
        """`code` uint8 [N P] and `sketch` uint8 [N S]."""
        along = self.project(vectors)
        coarse = self.quantizer.compute_codes(paired(along))
        left = (along - _decoded(self.quantizer, coarse, along.shape[1])) / self.fine
        steps = (left + np.float32(2)).clip(0, 3).astype(np.uint8)
        fine = steps[:, ::4].copy()
        for at in range(1, 4):
            further = steps[:, at::4]
            fine[:, : further.shape[1]] |= further << 2 * at
        whole = np.vecdot(vectors, vectors) - vectors @ (2 * self.mean) + self.mean @ self.mean
        rest = whole / np.float32(self.step**2) - np.vecdot(along, along) - self.rest[0]
        rest = np.rint(rest / self.rest[1]).clip(0, 255).astype(np.uint8)
        sketch = [coarse, fine, rest[:, None]]
        np.rint(along, out=along).clip(-127, 127, out=along)
        along += ZERO
        return {"code": along.astype(np.uint8), "sketch": np.concatenate(sketch, 1)}

    def restored(
        self, sketch: UInt8[np.ndarray, "N S"]
    ) -> tuple[Float32[np.ndarray, "N P"], Float32[np.ndarray, " N"]]:
        """What a sketch says of `project` and of the squared length outside of the directions."""
        size = self.coarse_bytes
        steps = sketch[:, size:-1, None] >> np.arange(0, 8, 2, dtype=np.uint8) & np.uint8(3)
        left = steps.reshape(len(sketch), -1)[:, : len(self.fine)] - np.float32(1.5)
        coarse = _decoded(self.quantizer, np.ascontiguousarray(sketch[:, :size]), len(self.fine))
        return coarse + left * self.fine, sketch[:, -1] * self.rest[1] + self.rest[0]

    @property
    def coarse_bytes(self) -> int:
        """Of a sketch, its first ones."""
        return self.quantizer.code_size

    @cached_property
    def quantizer(self) -> "faiss.ProductQuantizer":
        """Of the sketches; it takes what `paired` gives."""
        import faiss

        pairs = len(self.centroids)
        quantizer = faiss.ProductQuantizer(2 * pairs, pairs, 4)
        faiss.copy_array_to_vector(self.centroids.reshape(-1), quantizer.centroids)
        return quantizer

    def write(self, run_uri: str) -> None:
        """Keep it in the index's folder."""
        step = np.array([self.step], np.float64)
        tensors = {"mean": self.mean, "component": self.component, "step": step}
        tensors |= {name: getattr(self, name) for name in ("centroids", "fine", "rest")}
        write_bytes(join(run_uri, PROJECTION), save(tensors))

    @staticmethod
    def read(run_uri: str) -> "Projection | None":
        """What `write` wrote; None where nothing is.

        Raises:
            LedgerError: it is damaged, or of an earlier version.
        """
        uri = join(run_uri, PROJECTION)
        data = find_bytes(uri)
        if data is None:
            return None
        try:
            found = load(data)
            step = float(found.pop("step")[0])
            names = ("mean", "component", "centroids", "fine", "rest")
            return Projection(**{name: found[name] for name in names}, step=step)
        except (SafetensorError, KeyError, ValueError) as error:
            raise LedgerError(
                f"{uri}: damaged, or of an earlier version ({error}); restore it, or delete the "
                "index and make it again"
            ) from error


def paired(values: Float32[np.ndarray, "N P"]) -> Float32[np.ndarray, "N 2*M"]:
    """Directions two by two: the widest beside the narrowest, so that all pairs are as wide."""
    rows, directions = values.shape
    half = -(-directions // 2)
    pairs = np.zeros((rows, half, 2), values.dtype)
    pairs[:, :, 0] = values[:, :half]
    pairs[:, directions % 2 :, 1] = values[:, : half - 1 : -1]
    return pairs.reshape(rows, -1)


def _decoded(
    quantizer: "faiss.ProductQuantizer", coarse: np.ndarray, directions: int
) -> Float32[np.ndarray, "N P"]:
    """The centroids' values, unpaired."""
    pairs: Any = quantizer.decode(coarse)  # pyright: ignore[reportCallIssue]
    pairs = pairs.reshape(len(coarse), -1, 2)
    return np.concatenate([pairs[:, :, 0], pairs[:, ::-1, 1]], 1)[:, :directions]


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


def codes_of(table: pa.Table, name: str = "code") -> UInt8[np.ndarray, "N P"]:
    """The codes, or sketches, of `open_vectors` or a metadata file, without a copy."""
    (column,) = table[name].chunks
    is_list = pa.types.is_fixed_size_list(column.type)
    width = column.type.list_size if is_list else column.type.byte_width
    # Neither `to_numpy`, which loads pandas, nor `flatten`, which loads pyarrow.compute.
    data, size = column.buffers()[-1], len(column) * width
    return np.frombuffer(data, np.uint8, size, column.offset * width).reshape(-1, width)


class Exact:
    """The exact vectors of an index's parts, of which single rows are read: mapped where the index
    is local, else one request for each row and its near neighbours, all at once.

    Args:
        parts: of kind "exact".
    """

    def __init__(self, run_uri: str, parts: Sequence[Part]) -> None:
        self._run_uri, self.parts = run_uri, parts
        self._mapped: dict[int, np.ndarray] = {}

    @property
    def size(self) -> int:
        """E."""
        return self._row_bytes(self.parts[0]) // 2

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
                path = local_path(join(self._run_uri, self.parts[part].path))
                self._mapped[part] = np.asarray(np.load(path, mmap_mode="r"))
            found[at] = self._mapped[part][rows[at]]
        return found

    def _fetched(self, parts: np.ndarray, rows: np.ndarray) -> np.ndarray:
        length, order = 2 * self.size, np.lexsort([rows, parts])
        part, row = parts[order], rows[order]
        is_near = (np.diff(part) == 0) & (np.diff(row) * length <= GAP_BYTES)
        blocks = np.split(np.arange(len(row)), np.flatnonzero(~is_near) + 1) if len(row) else []
        filesystem, root = open_filesystem(self._run_uri)
        paths = [self.parts[int(part[block[0]])].path for block in blocks]
        starts = [NPY_HEADER + int(row[block[0]]) * length for block in blocks]
        stops = [NPY_HEADER + int(row[block[-1]] + 1) * length for block in blocks]
        read = filesystem.cat_ranges(
            [f"{root}/{path}" for path in paths], starts, stops, on_error="return"
        )
        found = np.empty((len(rows), self.size), np.float16)
        for block, path, start, stop, data in zip(blocks, paths, starts, stops, read, strict=True):
            if isinstance(data, Exception) or len(data) != stop - start:
                data = read_range(join(self._run_uri, path), start, stop)  # which asks again
            near: np.ndarray = np.frombuffer(data, np.float16).reshape(-1, self.size)
            found[order[block]] = near[row[block] - row[block[0]]]
        return found

    def _row_bytes(self, part: Part) -> int:
        return (part.bytes - NPY_HEADER) // part.rows
