"""An exact scan of 8-bit codes: for each query the nearest of them, by faiss's SIMD kernels.

Codes stay where they are, in mapped files; a stretch of them is compared with all queries while it
is in the cache. faiss lets go of the interpreter lock, so threads share the stretches.

Legend: N codes, P bytes of one, Q queries, R rows that are kept of each.
"""

import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import faiss
import numpy as np
from jaxtyping import Float32, Int64, UInt8

from tasks.run.vectors import ZERO

STRETCH = 1 << 20
"""Bytes of codes that are compared with all queries in one go: they fit the second-level cache."""
_PLACE = (1 << 32) - 1
_THREADS = os.cpu_count() or 1
_kept = threading.local()
_making = threading.Lock()

Stretch = tuple[int, UInt8[np.ndarray, "N P"]]
"""Number of its first row, codes."""


def scan(
    stretches: Sequence[Stretch], queries: Float32[np.ndarray, "Q P"], keep: int
) -> tuple[Float32[np.ndarray, "Q R"], Int64[np.ndarray, "Q R"]]:
    """The nearest rows of each query, nearest first, and their squared distances in units of codes;
    -1 and infinity where there are fewer than `keep`.

    Args:
        queries: `Projection.project` of vectors. They are rounded as the codes are; those that lie
            beyond the codes' range are not, which takes twice the time.
    """
    pieces = [piece for stretch in stretches for piece in _cut(*stretch)]
    rounded = np.rint(queries)
    is_inside = bool((np.abs(rounded) < ZERO).all())
    queries = np.ascontiguousarray(rounded if is_inside else queries, np.float32)
    pool = _pool()
    threads = max(1, min(_THREADS, len(pieces)))
    parts = pool.map(
        lambda at: _nearest(pieces[at::threads], queries, keep, is_inside), range(threads)
    )
    found, rows = (np.concatenate(each, 1) for each in zip(*parts, strict=True))
    order = np.argsort(found, 1, kind="stable")[:, :keep]
    return np.take_along_axis(found, order, 1), np.take_along_axis(rows, order, 1)


def _cut(first: int, codes: np.ndarray) -> list[Stretch]:
    size = max(1, STRETCH // max(1, codes.shape[1]))
    return [(first + at, codes[at : at + size]) for at in range(0, len(codes), size)]


def _nearest(
    pieces: Sequence[Stretch], queries: np.ndarray, keep: int, is_inside: bool
) -> tuple[np.ndarray, np.ndarray]:
    scanner = _scanner(queries.shape[1], is_inside)
    found = np.full((len(queries), keep), np.inf, np.float32)
    places = np.full((len(queries), keep), -1, np.int64)
    for number, (_, codes) in enumerate(pieces):
        start = faiss.swig_ptr(codes)
        for at, query in enumerate(queries):
            scanner.set_query(faiss.swig_ptr(query))  # first: a list is set for a query
            scanner.set_list(number, 0.0)
            heap = faiss.swig_ptr(found[at]), faiss.swig_ptr(places[at])
            scanner.scan_codes(len(codes), start, None, *heap, keep)
    firsts = np.array([first for first, _ in pieces] or [0], np.int64)
    rows = firsts[(places >> 32).clip(0)] + (places & _PLACE)
    return found, np.where(places < 0, -1, rows)


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_THREADS, thread_name_prefix="similar")


def _scanner(size: int, is_inside: bool) -> Any:
    """This thread's own. It is kept: faiss's wrapper cannot free one."""
    kept = _kept.__dict__.setdefault("scanners", {})
    if (size, is_inside) not in kept:
        with _making:
            quantizer: Any = _quantizer(size, is_inside)
            scanner = quantizer.select_InvertedListScanner(faiss.METRIC_L2, None, True, None)
            kept[size, is_inside] = (quantizer, scanner)
    return kept[size, is_inside][1]


def _quantizer(size: int, is_inside: bool) -> faiss.ScalarQuantizer:
    if is_inside:  # queries as integers, where the processor has instructions for them
        return faiss.ScalarQuantizer(size, faiss.ScalarQuantizer.QT_8bit_direct_signed)
    found = faiss.ScalarQuantizer(size, faiss.ScalarQuantizer.QT_8bit_uniform)
    faiss.copy_array_to_vector(np.array([-ZERO - 0.5, 255], np.float32), found.trained)
    return found
