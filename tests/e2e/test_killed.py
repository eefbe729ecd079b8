"""Killed at any point and run again, each kind of job: the same rows and bytes as if nothing had
happened."""

import multiprocessing
from pathlib import Path

import pytest

from pipeline.status import read_status
from tasks.run.ledger import PART_KINDS, committed
from tasks.storage.crash import EXIT_CODE, POINTS
from tasks.verify.run import verify
from tasks.work.kinds import KINDS
from tests.e2e.small_dataset import NUM_SHARDS, Dataset, crash_kind, fingerprint, rows, run_kind


@pytest.fixture(scope="module")
def processes() -> multiprocessing.context.ForkServerContext:
    """Children of one process that has loaded PyTorch already."""
    context = multiprocessing.get_context("forkserver")
    stations = [kind.station.partition(":")[0] for kind in KINDS.values()]
    context.set_forkserver_preload(["tests.e2e.small_dataset", *stations])
    return context


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("kind", KINDS)
def test_driver_killed(
    kind: str,
    point: str,
    processes: multiprocessing.context.ForkServerContext,
    dataset: Dataset,
    calm: dict[str, str],
    place: Path,
    tmp_path: Path,
) -> None:
    if point == "in_decode" and kind != "invert":
        pytest.skip("no pictures of the input are decoded")
    run = str(tmp_path / "run")
    job = (kind, dataset, calm["invert"], place, run)
    driver = processes.Process(target=crash_kind, args=(f"{point}:2:{tmp_path / 'token'}", *job))
    driver.start()
    driver.join(60)
    assert driver.exitcode == EXIT_CODE
    assert (tmp_path / "token").exists()
    assert committed(run) == ({0, 1, 2} if point == "after_marker" else {0, 1})
    assert read_status(run).num_pending == NUM_SHARDS - len(committed(run))

    summary = run_kind(*job)
    assert summary.is_clean
    assert summary.outcome.rows == 12
    assert fingerprint(run) == fingerprint(calm[kind])
    assert rows(run).equals(rows(calm[kind]))
    assert verify(run).problems == []
    parts = [path for folder in PART_KINDS for path in (Path(run) / folder).glob("*")]
    assert len(parts) == sum(len(kinds) for kinds in fingerprint(run).values())
