"""Near-duplicates: groups of samples whose vectors are almost the same.

Two samples belong together where their distance is below a share of the index's *spread*, the
median distance of two samples that chance brings together. A group is all that hangs together in
this way, so two of its members may be further apart.

Legend: N rows, P bytes of a code.
"""

import faiss
import numpy as np
import pyarrow as pa
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from models.errors import ConfigError
from tasks.run.vectors import ZERO
from tasks.similar.index import Index

THRESHOLDS = {"clip": 0.15, "perceptual": 0.15}
"""Shares of `spread` below which samples are duplicates, by space; `THRESHOLD` for the others.
docs/similarity.md has what was measured."""
THRESHOLD = 0.3
SPREAD_PAIRS = 2000
ALL_PAIRS = 20_000
"""Up to so many rows each is compared with each; beyond, with the nearest lists of an inverted
file."""
LISTS_SEEN = 8
QUERIES = 1024
SLACK = 1.1
"""Codes leave directions out, so their distances are below those of the vectors, but for the
rounding: pairs whose codes are within so many radii are measured exactly."""


def spread(index: Index) -> float:
    """The median distance of two samples, over pairs drawn with a fixed seed."""
    pairs = np.random.default_rng(0).integers(0, len(index), (2, SPREAD_PAIRS))
    apart = pairs[:, pairs[0] != pairs[1]]
    if not apart.size:
        return 0.0
    return float(np.median(np.linalg.norm(index.take(apart[0]) - index.take(apart[1]), axis=1)))


def duplicates(index: Index, threshold: float | None = None) -> pa.Table:
    """Rows of all groups of two and more, largest group first: group, sample_key, distance (to the
    nearest other member), and the scores.

    Args:
        threshold: share of `spread` below which two samples are duplicates; None for the space's.

    Raises:
        ConfigError: the threshold is not between 0 and 1.
        LedgerError: a part is missing or damaged.
    """
    if threshold is None:
        threshold = THRESHOLDS.get(index.space, THRESHOLD)
    if not 0 < threshold < 1:
        raise ConfigError(f"threshold is {threshold}; expected a share between 0 and 1")
    radius = threshold * spread(index)
    first, second = _candidates(index, radius * SLACK / index.projection.step)
    distance = np.concatenate(
        [
            np.linalg.norm(index.take(a) - index.take(b), axis=1)
            for a, b in zip(_cut(first), _cut(second), strict=True)
        ]
        or [np.empty(0, np.float32)]
    )
    close = distance < radius
    return _groups(index, first[close], second[close], distance[close])


def _cut(rows: np.ndarray) -> list[np.ndarray]:
    return [rows[at : at + QUERIES] for at in range(0, len(rows), QUERIES)]


def _candidates(index: Index, radius: float) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (first < second) whose codes are within a distance, in units of codes."""
    size = len(index)
    searcher = _searcher(index)
    pairs = []
    for start in range(0, size, QUERIES):
        codes = index.codes(start, min(size, start + QUERIES)).astype(np.float32) - ZERO
        limits, _, rows = searcher.range_search(codes, radius**2)
        owner = start + np.repeat(np.arange(len(codes)), np.diff(limits.astype(np.int64)))
        pairs.append(np.stack([owner, rows])[:, owner < rows])
    found = np.concatenate(pairs, 1)
    return found[0], found[1]


def _searcher(index: Index) -> faiss.Index:
    """The codes, or lists of them around centroids, with faiss's kernels."""
    size, width = len(index), len(index.projection.component)
    kind = faiss.ScalarQuantizer.QT_8bit_direct_signed
    if size <= ALL_PAIRS:
        searcher: faiss.Index = faiss.IndexScalarQuantizer(width, kind, faiss.METRIC_L2)
    else:
        lists = int(size**0.5)
        quantizer = faiss.IndexFlatL2(width)
        searcher = faiss.IndexIVFScalarQuantizer(
            quantizer, width, lists, kind, faiss.METRIC_L2, False
        )
        sample = np.linspace(0, size - 1, min(size, 40 * lists)).astype(np.int64)
        searcher.train(index.projection.project(index.take(sample)))
        searcher.nprobe = LISTS_SEEN
    for start in range(0, size, 1 << 16):
        searcher.add(index.codes(start, min(size, start + (1 << 16))).astype(np.float32) - ZERO)
    return searcher


def _groups(index: Index, first: np.ndarray, second: np.ndarray, distance: np.ndarray) -> pa.Table:
    members, places = np.unique(np.concatenate([first, second]), return_inverse=True)
    ends = places.reshape(2, -1)
    graph = coo_array((np.ones(len(first)), (ends[0], ends[1])), (len(members), len(members)))
    _, labels = connected_components(graph, directed=False)
    nearest = np.full(len(members), np.inf)
    for end in ends:
        np.minimum.at(nearest, end, distance)
    sizes = np.bincount(labels, minlength=1)
    order = np.lexsort([members, labels, -sizes[labels]])
    _, numbers = np.unique(
        np.stack([-sizes[labels[order]], labels[order]]), axis=1, return_inverse=True
    )
    found = index.samples(members[order])
    found = found.add_column(0, "group", pa.array(numbers.reshape(-1) + 1, pa.int64()))
    return found.add_column(2, "distance", pa.array(nearest[order], pa.float32()))
