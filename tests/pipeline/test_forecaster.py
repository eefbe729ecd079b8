"""What a driver says of its run after the first shards."""

from pathlib import Path

import pytest

from pipeline.forecaster import Forecaster
from pipeline.tally import TallySnapshot
from pipeline.worker import ShardProgress, ShardResult
from tasks.run.prediction import read_prediction

TOTAL, SHARD, BYTES, MEMORY = 1000, 100, 20, 5_000_000


def snapshot(
    seconds: float, committed: int, at_work: tuple[int, ...], shards: int = 10
) -> TallySnapshot:
    """Of two workers: shards committed, and rows of those at work."""
    return TallySnapshot(
        shards_total=shards,
        shards_done=committed,
        shards_quarantined=0,
        rows_total=shards * SHARD,
        rows_done=committed * SHARD,
        rows_failed=0,
        rows_now=committed * SHARD,
        seconds=seconds,
        workers=2,
        at_work=tuple(ShardProgress(n, rows, seconds) for n, rows in enumerate(at_work)),
    )


def test_warm_up_is_not_taken_for_pace(tmp_path: Path) -> None:
    """The first batches of 10 take 8 s, all others together 20 rows a second."""
    teller = Forecaster(str(tmp_path))
    for seconds, rows in ((0.0, (0, 0)), (7.0, (10, 0)), (8.0, (10, 10)), (12.0, (50, 50))):
        teller.on_progress(snapshot(seconds, 0, rows))
        assert read_prediction(str(tmp_path)) is None
    for number in range(2):
        done = ShardResult(shard=number, rows=SHARD, bytes=SHARD * BYTES, memory_bytes=MEMORY)
        teller.on_result(done, "committed")
        teller.on_progress(snapshot(17.0 + number, number + 1, (100,) * (1 - number) + (20,)))
    said = read_prediction(str(tmp_path))
    assert said is not None
    assert said.seconds == pytest.approx(8 + (TOTAL - 20) / 20)
    assert (said.rows, said.bytes, said.memory_bytes) == (TOTAL, TOTAL * BYTES, MEMORY)
    assert (said.made_by, said.workers) == ("the first shards", 2)


def test_of_a_long_run_it_is_said_better_until_the_third_round(tmp_path: Path) -> None:
    teller = Forecaster(str(tmp_path))
    teller.on_progress(snapshot(0.0, 0, (10, 10), 100))
    for number in range(1, 10):
        done = ShardResult(shard=number, rows=SHARD, bytes=1, memory_bytes=number * MEMORY)
        teller.on_result(done, "committed")
        teller.on_progress(snapshot(5.0 * number, number, (0, 0), 100))
        said = read_prediction(str(tmp_path))
        known = min(number // 2 * 2, 6)
        assert (said.memory_bytes if said else 0) == known * MEMORY


def test_nothing_is_said_of_what_is_nearly_done(tmp_path: Path) -> None:
    teller = Forecaster(str(tmp_path))
    teller.on_progress(snapshot(1.0, 0, (10, 10)))
    for number in range(2):
        teller.on_result(ShardResult(shard=number, rows=SHARD, bytes=1), "committed")
    teller.on_progress(snapshot(20.0, 6, (0, 0)))
    assert read_prediction(str(tmp_path)) is None
