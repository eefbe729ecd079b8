"""An exact scan of 8-bit codes: for each query the nearest of them.

Codes stay where they are, in mapped files; a stretch of them is compared with all queries while it
is in the cache, and threads share the stretches. A few queries go through faiss's SIMD kernels, one
after the other. Many are one matrix product with the stretch,

    |q - x|^2 = |q|^2 - (2 q, -1) . (x, |x|^2)

and the distances below the worst that is kept so far go on. Codes and rounded queries are small
whole numbers, so that single precision holds these sums without rounding.

Legend: N codes, P bytes of one, Q queries, R rows that are kept of each.
"""

import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import faiss
import numpy as np
from jaxtyping import Float16, Float32, Int64, UInt8
from threadpoolctl import ThreadpoolController

from tasks.run.vectors import ZERO

STRETCH = 1 << 20
"""Bytes of codes that are compared with all queries in one go: they fit the second-level cache."""
MANY = 32
"""Queries from which on the matrix product is faster."""
BLOCK = 2048
"""Codes in one product: they and the distances fit the second-level cache."""
# Queries as integers, where the processor has instructions for them; queries as they are; vectors.
_INSIDE = faiss.ScalarQuantizer.QT_8bit_direct_signed
_BEYOND = faiss.ScalarQuantizer.QT_8bit_uniform
_HALF = faiss.ScalarQuantizer.QT_fp16
_PLACE = (1 << 32) - 1
_THREADS = os.cpu_count() or 1
_kept = threading.local()
_making, _batches = threading.Lock(), threading.Lock()

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
    is_many = len(queries) >= MANY
    size = BLOCK if is_many else max(1, STRETCH // max(1, queries.shape[1]))
    pieces = [piece for stretch in stretches for piece in _cut(*stretch, size)]
    rounded = np.rint(queries)
    is_inside = bool((np.abs(rounded) < ZERO).all())
    queries = np.ascontiguousarray(rounded if is_inside else queries, np.float32)
    threads = max(1, min(_THREADS, len(pieces)))

    def nearest(at: int) -> tuple[np.ndarray, np.ndarray]:
        if is_many:
            return _nearest_of_many(pieces[at::threads], queries, keep)
        kind = _INSIDE if is_inside else _BEYOND
        return _nearest(pieces[at::threads], queries, keep, kind)

    with _products() if is_many else nullcontext():
        parts = list(pool().map(nearest, range(threads)))
    found, rows = (np.concatenate(each, 1) for each in zip(*parts, strict=True))
    order = np.argsort(found, 1, kind="stable")[:, :keep]
    return np.take_along_axis(found, order, 1), np.take_along_axis(rows, order, 1)


@contextmanager
def _products() -> Iterator[None]:
    """The threads here share the cores: those that a product would start are in their way."""
    with _batches, _libraries().limit(limits=1, user_api="blas"):
        yield


@cache
def _libraries() -> ThreadpoolController:
    return ThreadpoolController()


def _cut(first: int, codes: np.ndarray, size: int) -> list[Stretch]:
    return [(first + at, codes[at : at + size]) for at in range(0, len(codes), size)]


def squared_distances(
    vectors: Float16[np.ndarray, "M E"], query: Float32[np.ndarray, " E"]
) -> Float32[np.ndarray, " M"]:
    """Of half-precision vectors to one in single precision, without a wider copy of them."""
    found, places = _heaps(1, len(vectors))
    query, codes = np.ascontiguousarray(query), np.ascontiguousarray(vectors).view(np.uint8)
    scanner = _scanner(len(query), _HALF)
    scanner.set_query(faiss.swig_ptr(query))  # which keeps the address alone
    scanner.set_list(0, 0.0)
    heap = faiss.swig_ptr(found), faiss.swig_ptr(places)
    scanner.scan_codes(len(vectors), faiss.swig_ptr(codes), None, *heap, len(vectors))
    return found[0, np.argsort(places[0])]


def _heaps(num_queries: int, keep: int) -> tuple[np.ndarray, np.ndarray]:
    """Distances and places of none yet."""
    empty = np.full((num_queries, keep), np.inf, np.float32)
    return empty, np.full((num_queries, keep), -1, np.int64)


def _nearest(
    pieces: Sequence[Stretch], queries: np.ndarray, keep: int, kind: int
) -> tuple[np.ndarray, np.ndarray]:
    scanner = _scanner(queries.shape[1], kind)
    found, places = _heaps(len(queries), keep)
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


def _nearest_of_many(
    pieces: Sequence[Stretch], queries: np.ndarray, keep: int
) -> tuple[np.ndarray, np.ndarray]:
    squares = (queries**2).sum(1, keepdims=True)
    weights = np.concatenate([2 * queries, np.full((len(queries), 1), -1, np.float32)], 1)
    wide = np.empty((BLOCK, weights.shape[1]), np.float32)
    best = _Best(len(queries), keep)
    for number, (first, codes) in enumerate(pieces):
        block = wide[: len(codes)]
        block[:, :-1] = codes
        block[:, :-1] -= ZERO
        np.einsum("np,np->n", block[:, :-1], block[:, :-1], out=block[:, -1])
        best.add(squares - weights @ block.T, first)
        if number & (number + 1) == 0:  # after 1, 2, 4, ... pieces: a bound is soon not far off
            best.settle()
    return best.settle()


class _Best:
    """The least `keep` distances of each query."""

    def __init__(self, num_queries: int, keep: int) -> None:
        self._keep = keep
        self._worst = np.full((num_queries, 1), np.inf, np.float32)
        none = np.empty(0, np.int64)
        self._waiting = [(none, none, np.empty(0, np.float32))]

    def add(self, distances: Float32[np.ndarray, "Q N"], first: int) -> None:
        """Those of consecutive rows, the first of them `first`."""
        query, at = np.divmod(np.flatnonzero(distances < self._worst), distances.shape[1])
        self._waiting.append((query, first + at, distances[query, at]))

    def settle(self) -> tuple[Float32[np.ndarray, "Q R"], Int64[np.ndarray, "Q R"]]:
        """Drop all but the best; they and their rows, in order, infinity and -1 where there are
        fewer."""
        size = len(self._worst)
        query, rows, found = (np.concatenate(each) for each in zip(*self._waiting, strict=True))
        found = found.clip(0)
        # Bits of numbers that are not negative are in their order.
        order = np.argsort(query << 32 | found.view(np.int32))
        ends = np.cumsum(np.bincount(query, minlength=size))
        place = np.arange(len(order)) - np.concatenate([[0], ends])[query[order]]
        order, place = order[place < self._keep], place[place < self._keep]
        self._waiting = [(query[order], rows[order], found[order])]
        distances = np.full((size, self._keep), np.inf, np.float32)
        numbers = np.full((size, self._keep), -1, np.int64)
        distances[query[order], place], numbers[query[order], place] = found[order], rows[order]
        self._worst = distances[:, -1:]
        return distances, numbers


@cache
def pool() -> ThreadPoolExecutor:
    """A thread for each core, in which faiss starts no others."""
    return ThreadPoolExecutor(
        _THREADS, thread_name_prefix="similar", initializer=faiss.omp_set_num_threads, initargs=(1,)
    )


def _scanner(size: int, kind: int) -> Any:
    """This thread's own. It is kept: faiss's wrapper cannot free one."""
    kept = _kept.__dict__.setdefault("scanners", {})
    if (size, kind) not in kept:
        with _making:
            quantizer: Any = faiss.ScalarQuantizer(size, kind)
            if kind == _BEYOND:
                reach = np.array([-ZERO - 0.5, 255], np.float32)
                faiss.copy_array_to_vector(reach, quantizer.trained)
            scanner = quantizer.select_InvertedListScanner(faiss.METRIC_L2, None, True, None)
            kept[size, kind] = (quantizer, scanner)
    return kept[size, kind][1]
