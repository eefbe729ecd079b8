"""The scan of 8-bit codes against plain arithmetic."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from safetensors.numpy import save_file

from models.errors import LedgerError
from tasks.run.vectors import ZERO, Projection
from tasks.similar import scan as scan_module
from tasks.similar.scan import scan, squared_distances


@pytest.fixture
def codes() -> np.ndarray:
    return np.random.default_rng(0).integers(1, 256, (700, 12), dtype=np.uint8)


def plainly(codes: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Squared distances [Q N]."""
    return ((codes.astype(np.float64) - ZERO - queries[:, None]) ** 2).sum(2)


@pytest.mark.parametrize("stretch", [1 << 20, 1200])
def test_the_nearest_over_all_stretches(
    codes: np.ndarray, stretch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan_module, "STRETCH", stretch)
    queries = np.random.default_rng(1).normal(0, 40, (5, 12)).astype(np.float32).clip(-127, 127)
    found, rows = scan([(0, codes[:123]), (123, codes[123:])], queries, 20)
    wanted = plainly(codes, np.rint(queries))
    assert np.array_equal(found, np.sort(wanted, 1)[:, :20])
    assert np.array_equal(np.take_along_axis(wanted, rows, 1), found)
    assert all(len(set(each)) == 20 for each in rows.tolist())


@pytest.mark.parametrize("reach", [127, 400])
@pytest.mark.parametrize("keep", [3, 20, 900])
def test_many_queries_at_once(
    codes: np.ndarray, keep: int, reach: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one matrix product for each block of codes."""
    monkeypatch.setattr(scan_module, "BLOCK", 64)
    rng = np.random.default_rng(4)
    queries = rng.normal(0, 40, (scan_module.MANY, 12)).astype(np.float32).clip(-127, 127)
    queries[0, 0] = reach
    found, rows = scan([(0, codes[:123]), (123, codes[123:])], queries, keep)
    wanted = plainly(codes, np.rint(queries) if reach == 127 else queries)
    there = min(keep, 700)
    assert np.all(rows[:, there:] == -1)
    assert np.isinf(found[:, there:]).all()
    assert all(len(set(each)) == there for each in rows[:, :there].tolist())
    nearest = np.sort(wanted, 1)[:, :there]
    tolerance = 0 if reach == 127 else 1e-4
    assert found[:, :there] == pytest.approx(nearest, rel=tolerance, abs=0.1 * bool(tolerance))
    of_rows = np.take_along_axis(wanted, rows[:, :there], 1)
    assert of_rows == pytest.approx(nearest, rel=tolerance, abs=0.1 * bool(tolerance))


def test_exact_distances_are_those_of_single_precision() -> None:
    rng = np.random.default_rng(5)
    vectors = rng.normal(0, 3, (50, 37)).astype(np.float16)
    query = rng.normal(0, 3, 37).astype(np.float32)
    wanted = ((vectors.astype(np.float64) - query) ** 2).sum(1)
    assert squared_distances(vectors, query) == pytest.approx(wanted, rel=1e-5)
    strided = np.stack([query, query], 1)[:, 0]
    assert squared_distances(vectors[::2], strided) == pytest.approx(wanted[::2], rel=1e-5)
    assert squared_distances(vectors[:0], query).shape == (0,)


def test_queries_beyond_the_codes_are_not_cut(codes: np.ndarray) -> None:
    queries = np.zeros((2, 12), np.float32)
    queries[0, 0], queries[1, 3] = 1000.25, -400.5
    found, rows = scan([(0, codes)], queries, 5)
    wanted = plainly(codes, queries)
    assert np.array_equal(rows, np.argsort(wanted, 1, kind="stable")[:, :5])
    assert found == pytest.approx(np.sort(wanted, 1)[:, :5], rel=1e-5)


def test_fewer_rows_than_wanted(codes: np.ndarray) -> None:
    found, rows = scan([(40, codes[:3])], np.zeros((1, 12), np.float32), 5)
    assert sorted(rows[0, :3].tolist()) == [40, 41, 42]
    assert rows[0, 3:].tolist() == [-1, -1]
    assert np.isinf(found[0, 3:]).all()
    found, rows = scan([], np.zeros((1, 12), np.float32), 2)
    assert rows.tolist() == [[-1, -1]]


def test_several_callers_at_once(codes: np.ndarray) -> None:
    queries = np.rint(np.random.default_rng(2).normal(0, 40, (40, 12))).clip(-127, 127)
    wanted = np.sort(plainly(codes, queries), 1)[:, :7]
    with ThreadPoolExecutor(8) as pool:
        each = pool.map(lambda q: scan([(0, codes)], q[None].astype(np.float32), 7)[0][0], queries)
        assert np.array_equal(np.stack(list(each)), wanted)


def test_codes_keep_distances() -> None:
    rng = np.random.default_rng(3)
    sample = (rng.standard_normal((500, 30)) * np.linspace(3, 0.1, 30)).astype(np.float32)
    _, _, directions = np.linalg.svd(sample - sample.mean(0), full_matrices=False)
    projection = Projection.fit(sample, directions[:20])
    codes = projection.encode(sample)["code"].astype(np.float32) - ZERO
    assert np.abs(codes).max() == 127
    apart = np.linalg.norm(sample[:250] - sample[250:], axis=1)
    coded = np.linalg.norm(codes[:250] - codes[250:], axis=1) * projection.step
    assert np.corrcoef(apart, coded)[0, 1] > 0.99
    assert np.all(coded < 1.02 * apart)
    assert coded == pytest.approx(apart, rel=0.25)


def test_a_projection_is_kept(tmp_path: object) -> None:
    projection = Projection(
        mean=np.arange(3, dtype=np.float32),
        component=np.eye(3, dtype=np.float32)[:2],
        step=0.5,
        centroids=np.arange(32, dtype=np.float32).reshape(1, 16, 2),
        fine=np.array([1, 2], np.float32),
        rest=np.array([10, 2], np.float32),
    )
    assert Projection.read(str(tmp_path)) is None
    projection.write(str(tmp_path))
    found = Projection.read(str(tmp_path))
    assert found is not None
    assert found.step == 0.5
    encoded = found.encode(np.array([[1, 0, 9]], np.float32))
    assert encoded["code"].tolist() == [[130, 126]]
    # (2, -2) is 2 and -3 beside (0, 1), the nearest centroid: the last step, and the first.
    assert encoded["sketch"].tolist() == [[0, 0b0011, (7**2 / 0.5**2 - 10) / 2]]
    along, rest = found.restored(encoded["sketch"])
    assert along.tolist() == [[0 + 1.5, 1 - 3]]
    assert rest.tolist() == [7**2 / 0.5**2]
    for missing in ("step", "fine"):
        left = {name: each for name, each in vars(projection).items() if name != missing}
        tensors = {name: np.atleast_1d(each).astype(np.float32) for name, each in left.items()}
        save_file(tensors, f"{tmp_path}/projection.safetensors")
        with pytest.raises(LedgerError, match=rf"earlier version \('{missing}'\).*make it again"):
            Projection.read(str(tmp_path))
