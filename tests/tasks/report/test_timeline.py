"""Throughput from commit markers: rows are conserved, pauses are cut out."""

from datetime import UTC, datetime, timedelta

import pytest

from tasks.report.forecast import compared
from tasks.report.timeline import STEPS, Timeline, timeline
from tasks.run.marker import Marker
from tasks.run.prediction import Prediction

NOON = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)


def marker(start_s: float, stop_s: float, rows: int) -> Marker:
    def at(seconds: float) -> str:
        return (NOON + timedelta(seconds=seconds)).isoformat(timespec="milliseconds")

    return Marker(
        shard=0,
        attempt="a",
        run_id="r",
        rows=rows,
        failed=0,
        parts={},
        seconds={},
        wall_s=stop_s - start_s,
        started_at=at(start_s),
        finished_at=at(stop_s),
    )


def total_rows(line: Timeline) -> float:
    return sum(line.rates) * line.seconds / STEPS


def test_two_overlapping_shards_double_the_rate() -> None:
    line = timeline([marker(0, 60, 60), marker(30, 90, 60)])

    assert line.seconds == 90
    assert line.pauses == ()
    # 0-30 s: one shard at 1 image/s; 30-60 s: both; 60-90 s: one.
    assert line.rates[0] == pytest.approx(1.0)
    assert line.rates[STEPS // 2] == pytest.approx(2.0)
    assert line.rates[-1] == pytest.approx(1.0)
    assert total_rows(line) == pytest.approx(120)
    assert (line.first[11:19], line.last[11:19]) == ("12:00:00", "12:01:30")


def test_a_stopped_run_is_a_pause_and_costs_no_working_time() -> None:
    # Given out of order, as shards are.
    line = timeline([marker(3610, 3620, 40), marker(0, 10, 20)])

    assert line.seconds == pytest.approx(20)
    assert line.pauses == (pytest.approx((10, 3600)),)
    assert line.rates[0] == pytest.approx(2.0)
    assert line.rates[-1] == pytest.approx(4.0)
    assert total_rows(line) == pytest.approx(60)


def test_a_short_wait_is_working_time_without_a_shard_at_work() -> None:
    line = timeline([marker(0, 10, 10), marker(30, 40, 10), marker(5, 15, 10)])

    assert line.at_work_s == pytest.approx(25)
    assert line.seconds == 40
    assert line.pauses == ()
    assert line.rates[STEPS // 2] == 0.0


def test_a_prediction_is_not_held_against_the_time_until_somebody_retries() -> None:
    said = Prediction(
        made_by="refinery plan",
        rows=20,
        seconds=18.0,
        bytes=0,
        memory_bytes=0,
        workers=1,
        made_at=NOON.isoformat(),
    )
    (found,) = compared(said, [marker(0, 10, 10), marker(55, 65, 10)])
    assert (found.name, found.both) == ("time", "20.0 s (predicted 18.0 s, +11 %)")


def test_a_long_shard_covers_the_gap_between_short_ones() -> None:
    line = timeline([marker(0, 500, 500), marker(1, 2, 1), marker(400, 401, 1)])

    assert line.pauses == ()
    assert line.seconds == 500


def test_no_marker_and_a_clock_that_steps_back() -> None:
    assert timeline([]) == Timeline()
    assert total_rows(timeline([marker(5, 4, 7)])) == pytest.approx(7)
