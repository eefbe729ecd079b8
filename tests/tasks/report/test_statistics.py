"""Clusters, outliers and drift against what was planted, and against scipy."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ks_2samp

from pipeline.cli import run_app
from tasks.report.statistics import SAMPLE, ks_distance, read_statistics, sample_codes
from tasks.run import ledger
from tasks.run.rows import Row
from tests.tasks.report.test_report import ROWS, Page, make_rows, make_run

GROUPS = 3


def planted(moved: float = 0.0, worse: float = 0.0) -> Callable[[int], list[Row]]:
    """Codes in three groups by the row's number, the first row of all far away from them."""
    centres = 5 * np.random.default_rng(7).standard_normal((GROUPS, 4, 8))

    def rows_of(shard: int) -> list[Row]:
        rows = make_rows(shard, "face-", "broken", 32)
        rng = np.random.default_rng(100 + shard)
        for index, row in enumerate(rows):
            if row.w_plus is None:
                continue
            centre = centres[index % GROUPS]
            row.w_plus = (centre + 0.1 * rng.standard_normal((4, 8)) + moved).astype(np.float32)
            row.metrics["psnr"] = float(rng.normal(30 - worse, 1))
        if shard == 0:
            rows[0].w_plus = np.full((4, 8), 40, np.float32)
            rows[0].metrics["psnr"] = -50.0
        return rows

    return rows_of


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_run(str(tmp_path_factory.mktemp("planted") / "run"), shards=6, rows_of=planted())


def test_planted_groups_and_the_outlier_are_found(run: str) -> None:
    _, found = read_statistics(run)

    assert found is not None
    assert found.sampled == 6 * (ROWS - 1)
    assert found.outliers[0].key == "face-000"
    assert found.outliers[0].distance > 5 * found.outliers[1].distance
    # No cluster's picture is the outlier's but its own, and each group has one.
    groups = {int(c.key[-1]) % GROUPS for c in found.clusters if c.key != "face-000"}
    assert groups == set(range(GROUPS))
    assert sum(c.share for c in found.clusters) == pytest.approx(1)
    assert all(c.picture for c in found.clusters)
    (psnr,) = (m for m in found.metrics if m.name == "psnr")
    assert psnr.rows == 1
    assert psnr.low > -50


def test_nothing_drifts_from_itself(run: str) -> None:
    _, found = read_statistics(run, run)

    assert found is not None
    assert found.code_shift == pytest.approx(0, abs=1e-6)
    assert {shift.name: shift.distance for shift in found.drift} == {
        "mse": 0.0,
        "psnr": 0.0,
        "trunk_distance": 0.0,
    }


def test_a_moved_run_drifts(run: str, tmp_path: Path) -> None:
    rows_of = planted(moved=3.0, worse=3.0)
    other = make_run(str(tmp_path / "other"), shards=6, rows_of=rows_of)

    _, found = read_statistics(run, other)

    assert found is not None
    assert found.against == other
    assert found.code_shift is not None
    assert found.code_shift > 0.05
    shifts = {shift.name: shift for shift in found.drift}
    assert shifts["psnr"].here - shifts["psnr"].there == pytest.approx(3, abs=0.6)
    assert shifts["psnr"].distance > 0.6
    assert shifts["mse"].distance == 0


def test_the_report_says_it_too(run: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_app(["report", run, "--against", run]) == 0

    text = " ".join(Page(Path(run, "report.html").read_text()).text.split())

    assert "Clusters of the codes" in text
    assert "Outlier face-000" not in text  # that is the picture's description
    assert "Codes far from the others" in text
    assert "The mean of the codes moved by 0 standard deviations" in text
    assert run_app(["report", run, "--against", f"{run}/nothing"]) == 2
    assert "no run here" in capfd.readouterr().err


@pytest.mark.parametrize("shift", [0.0, 0.3, 2.0, 50.0])
def test_distance_of_distributions_agrees_with_scipy(shift: float) -> None:
    rng = np.random.default_rng(3)
    here, there = rng.normal(0, 1, 4000), rng.gamma(2, 1, 6000) - 2 + shift
    shares = np.linspace(0, 1, 513)

    found = ks_distance(np.quantile(here, shares), np.quantile(there, shares))

    assert found == pytest.approx(ks_2samp(here, there).statistic, abs=0.005)


def test_equal_values_are_the_same_distribution() -> None:
    assert ks_distance([2.0] * 9, [2.0] * 9) == 0
    assert ks_distance([2.0] * 9, [3.0] * 9) == 1


def test_the_sample_has_a_limit(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.report.statistics.SHARDS", 3)
    monkeypatch.setattr("tasks.report.statistics.SAMPLE", 12)
    keys, codes = sample_codes(run, ledger.read_markers(run))

    assert SAMPLE > 12
    assert len(keys) == len(codes) == 12
    assert {int(key[5:]) // ROWS for key in keys} == {0, 2, 4}  # evenly spread


def test_a_run_too_small_for_clusters(tmp_path: Path) -> None:
    uri = make_run(str(tmp_path / "run"), shards=1)
    _, found = read_statistics(uri)

    assert found is not None
    assert (found.clusters, found.outliers, found.sampled) == ((), (), ROWS - 1)
    assert read_statistics(make_run(str(tmp_path / "none"), shards=0, given_up=1)) == ((), None)


def test_codes_that_are_all_the_same_have_no_clusters(tmp_path: Path) -> None:
    def rows_of(shard: int) -> list[Row]:
        rows = make_rows(shard, "face-", "broken", 32)
        for row in rows[:-1]:
            row.w_plus = np.ones((4, 8), np.float32)
        return rows

    _, found = read_statistics(make_run(str(tmp_path / "run"), shards=3, rows_of=rows_of))

    assert found is not None
    assert (found.clusters, found.outliers, found.sampled) == ((), (), 3 * (ROWS - 1))
