"""Sketches: what they list has the nearest in it, and an index that uses them answers as one that
does not."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.similar import make_codes
from tasks.run.vectors import Projection, paired
from tasks.similar import index as index_module
from tasks.similar.sketch import Sketches


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    """Wider in some directions than in others, as codes are."""
    wide = np.random.default_rng(0).standard_normal((3000, 33)) * np.linspace(3, 0.1, 33)
    return wide.astype(np.float32)


@pytest.fixture(scope="module")
def projection(vectors: np.ndarray) -> Projection:
    _, _, directions = np.linalg.svd(vectors - vectors.mean(0), full_matrices=False)
    return Projection.fit(vectors, directions[:21])


def test_a_wide_direction_beside_a_narrow_one() -> None:
    rows = np.array([[5, 4, 3, 2, 1], [9, 8, 7, 6, 0]], np.float32)
    assert paired(rows).tolist() == [[5, 0, 4, 1, 3, 2], [9, 0, 8, 0, 7, 6]]
    assert paired(rows[:, :1]).tolist() == [[5, 0], [9, 0]]


def test_a_sketch_is_the_nearest_centroids(projection: Projection, vectors: np.ndarray) -> None:
    sketches = projection.encode(vectors[:50])["sketch"]
    assert sketches.shape == (50, 6 + 6 + 1)  # 21 directions are 11 pairs of 4 bits
    coarse = sketches[:, :6]
    nibbles = np.stack([coarse & 15, coarse >> 4], 2).reshape(50, 12)[:, :11]
    pairs = paired(projection.project(vectors[:50])).reshape(50, 11, 1, 2)
    apart = ((pairs - projection.centroids) ** 2).sum(3)
    assert np.array_equal(nibbles, apart.argmin(2))


def test_what_a_sketch_restores(projection: Projection, vectors: np.ndarray) -> None:
    """The fine half leaves little of the coarse one's error; distances are nearly the vectors',
    with the rest nearer than without."""
    along, rest = projection.restored(projection.encode(vectors)["sketch"])
    exact = projection.project(vectors)
    pairs = paired(exact).reshape(len(exact), 11, 1, 2)
    before = ((pairs - projection.centroids) ** 2).sum(3).min(2).sum(1)
    assert ((along - exact) ** 2).sum(1).mean() < 0.15 * before.mean()
    outside = ((vectors - projection.mean) ** 2).sum(1) / projection.step**2 - (exact**2).sum(1)
    assert rest == pytest.approx(outside, abs=float(projection.rest[1]))
    to = projection.project(vectors[:1])
    apart = ((vectors - vectors[0]) ** 2).sum(1) / projection.step**2
    estimated = ((along - to) ** 2).sum(1) + rest + outside[0]
    assert np.corrcoef(estimated[1:], apart[1:])[0, 1] > 0.97
    assert np.abs(estimated - apart)[1:].mean() < np.abs(estimated - rest - apart)[1:].mean()


def test_the_nearest_are_among_those_listed(projection: Projection, vectors: np.ndarray) -> None:
    """Over parts of any size; the farthest are not."""
    sketches = projection.encode(vectors)["sketch"]
    packed = Sketches(projection, np.split(sketches, [7, 40, 41, 1500]))
    queries = projection.project(vectors[100:140] + 0.05)
    listed = packed.nearest(queries, 200)
    apart = ((projection.project(vectors) - queries[:, None]) ** 2).sum(2)
    found = []
    for rows, distances in zip(listed.tolist(), apart, strict=True):
        assert rows == sorted(set(rows))
        order = np.argsort(distances)
        found.append(len({*rows} & {*order[:10].tolist()}))
        assert not {*rows} & {*order[-1000:].tolist()}
    assert np.mean(found) > 9.9


def test_all_rows_where_no_more_are_there(projection: Projection, vectors: np.ndarray) -> None:
    packed = Sketches(projection, [projection.encode(vectors[:5])["sketch"]])
    listed = packed.nearest(projection.project(vectors[:2]), 5)
    assert listed.tolist() == [[0, 1, 2, 3, 4]] * 2


def test_few_samples_have_centroids(vectors: np.ndarray) -> None:
    few = Projection.fit(vectors[:3], np.eye(33, dtype=np.float32)[:2])
    assert few.centroids.shape == (1, 16, 2)
    assert np.isfinite(few.centroids).all()


def test_the_answers_of_a_large_index(
    vectors: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scanned at first, by sketches afterwards: the same neighbours at the same distances; the
    sketches of other rows are not looked at under a filter."""
    index = make_codes(vectors, 25_000, tmp_path).index
    asked = np.random.default_rng(1).permutation(vectors)[:40]
    scanned = index.search(asked, 10)
    assert index._sketches is None
    monkeypatch.setattr(index_module, "SKETCHED", 25_000)
    sketched = index.search(asked, 10)
    assert index._sketches is not None
    shared = [
        len({*a["sample_key"].to_pylist()} & {*b["sample_key"].to_pylist()})
        for a, b in zip(scanned, sketched, strict=True)
    ]
    assert np.mean(shared) > 9.9
    assert [t["distance"][0] for t in sketched] == [t["distance"][0] for t in scanned]
    for table in index.search(asked[:4], 10, "psnr < 10"):
        assert max(table["psnr"].to_pylist()) < 10
        assert table.num_rows == 10
    (again,) = index.search(asked[:1], 10, "psnr < 10")
    (other,) = index.search(asked[:1], 10, "psnr > 90")
    assert min(other["psnr"].to_pylist()) > 90 > 10 > max(again["psnr"].to_pylist())


def test_the_answers_of_sketches_alone(vectors: np.ndarray, tmp_path: Path) -> None:
    """As an index on an object store has them: nearly the neighbours that codes find."""
    index = make_codes(vectors, 25_000, tmp_path).index
    sketched = replace(index, tables=[t.drop_columns("code") for t in index.tables])
    asked = np.random.default_rng(1).permutation(vectors)[:40]
    for where in (None, "psnr < 30"):
        found, wanted = (each.search(asked, 10, where) for each in (sketched, index))
        shared = [
            len({*a["sample_key"].to_pylist()} & {*b["sample_key"].to_pylist()})
            for a, b in zip(found, wanted, strict=True)
        ]
        assert np.mean(shared) > 9.8
        assert {a.num_rows for a in found} == {10}
    assert max(found[0]["psnr"].to_pylist()) < 30
