"""A scan of the coarse part of sketches, 4 bits for each pair of directions, in memory: a shortlist
for the codes, or for the rest of the sketches.

faiss adds up a query's distances to centroids by SIMD table look-ups (fast scan, Andre et al. 2015)
and wants the sketches in blocks of 32, side by side: so they are packed first, which takes as long
as three scans of the codes, and then a scan takes a tenth of the time.

Legend: N rows, P directions, S bytes of a sketch, Q queries, R rows that are kept of each.
"""

import os
from collections.abc import Sequence

import faiss
import numpy as np
from jaxtyping import Float32, Int64, UInt8

from tasks.run.vectors import Projection, paired
from tasks.similar.scan import pool


class Sketches:
    """Packed sketches, a share for each core.

    Args:
        parts: uint8 [N S] each, in the order of rows.
    """

    def __init__(self, projection: Projection, parts: Sequence[UInt8[np.ndarray, "N S"]]) -> None:
        self._quantizer = projection.quantizer
        each = max(1, -(-len(parts) // (os.cpu_count() or 1)))
        shares = [parts[at : at + each] for at in range(0, len(parts), each)]
        sizes = [sum(map(len, share)) for share in shares]
        self._firsts = np.cumsum([0, *sizes])[:-1]
        self._packed = list(pool().map(self._pack, shares))

    def nearest(self, queries: Float32[np.ndarray, "Q P"], keep: int) -> Int64[np.ndarray, "Q R"]:
        """About the nearest rows of each query, ascending; -1 where there are fewer.

        Args:
            queries: `Projection.project` of vectors.
        """
        asked = np.ascontiguousarray(paired(queries))
        found = list(pool().map(lambda share: share.search(asked, keep), self._packed))
        distances = np.concatenate([each for each, _ in found], 1)
        rows = np.concatenate(
            [
                np.where(places < 0, -1, places + first)
                for first, (_, places) in zip(self._firsts, found, strict=True)
            ],
            1,
        )
        if rows.shape[1] > keep:
            best = np.argpartition(distances, keep - 1, 1)[:, :keep]
            rows = np.take_along_axis(rows, best, 1)
        return np.sort(rows, 1)

    def _pack(self, parts: Sequence[np.ndarray]) -> faiss.IndexPQFastScan:
        flat = faiss.IndexPQ(self._quantizer.d, self._quantizer.M, 4)
        flat.pq, flat.is_trained, flat.ntotal = self._quantizer, True, sum(map(len, parts))
        width = self._quantizer.code_size
        flat.codes.resize(flat.ntotal * width)
        memory = faiss.rev_swig_ptr(flat.codes.data(), flat.codes.size())
        np.concatenate([part[:, :width] for part in parts], out=memory.reshape(-1, width))
        return faiss.IndexPQFastScan(flat)  # pyright: ignore[reportArgumentType]
