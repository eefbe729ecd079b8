"""What the pool makes of a shard that is at work in two places; results come from a table, not from
Ray (test_pool.py has real workers)."""

from typing import Any

import pytest

from pipeline import pool as pool_module
from pipeline.config import EngineConfig
from pipeline.pool import Pool, _Slot
from pipeline.schedule import Failure, Schedule, Taken
from pipeline.tally import Tally
from pipeline.worker import ShardResult, WorkOrder
from tasks.job import JobConfig, MethodConfig
from tasks.run.run_json import RunHandle

DONE = ShardResult(shard=7, rows=10)
DEAD = ShardResult(shard=7, error="its worker died", failure=Failure.DEATH)


class Site:
    """Shard 7, at work in the first of two places for `seconds`; others took 20 s each."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float, **engine: Any) -> None:
        self.given_up: list[int] = []
        schedule = Schedule([7], max_attempts=1, retry_wait_s=0, patience_s=1)
        tally = Tally(schedule, lambda shard, *_: self.given_up.append(shard), 1, 10)
        order = WorkOrder(
            job=JobConfig(generator="none", methods=(MethodConfig(name="e4e"),)),
            run=RunHandle(uri="run", run_id="r"),
            hashes={},
            device="cpu",
            threads=1,
        )
        self.pool, self.tally = Pool(order, EngineConfig(**engine), 0.0, tally), tally
        self.first, self.second = slots = [_Slot(n, None, is_ready=True) for n in (0, 1)]
        self.pool._slots.extend(slots)
        self.pool._took_s.extend([20.0, 20.0, 500.0])
        assert schedule.take(0.0, is_idle=True) == Taken(7, is_alone=False)
        self.first.in_flight["first"] = Taken(7, is_alone=False), 0.0
        self.now = seconds
        self.results: dict[str, ShardResult] = {}
        monkeypatch.setattr(pool_module.ray, "get", self.results.__getitem__)

    def straggler(self) -> Taken | None:
        return self.pool._straggler(self.second, self.now)

    def end(self, slot: _Slot, reference: str, result: ShardResult) -> None:
        self.results[reference] = result
        self.pool._finish_shard(slot, reference)


@pytest.mark.parametrize(
    ("seconds", "engine", "is_copied"),
    [
        (61.0, {}, True),
        (59.0, {}, False),
        (41.0, {"straggler_factor": 2.0}, True),
        (25.0, {"straggler_factor": 1.0}, False),  # too short to be worth it
        (9999.0, {"straggler_factor": 0.0}, False),
    ],
)
def test_what_is_slow(
    seconds: float, engine: dict[str, float], is_copied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (Site(monkeypatch, seconds, **engine).straggler() is not None) == is_copied


def test_only_for_an_idle_worker_when_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(monkeypatch, 100.0)
    assert site.straggler() == Taken(7, is_alone=False)
    assert site.pool._straggler(site.first, 100.0) is None  # it holds the shard itself
    site.second.in_flight["second"] = Taken(7, is_alone=False), 90.0
    third = _Slot(2, None, is_ready=True)
    assert site.pool._straggler(third, 200.0) is None  # two are enough
    site.second.in_flight.clear()
    site.tally.schedule.failed(8, Failure.NEIGHBOUR, 0.0)
    assert site.straggler() is None  # something is waiting
    site.tally.schedule.take(1.0, is_idle=True)
    site.first.in_flight["first"] = Taken(7, is_alone=True), 0.0
    assert site.straggler() is None  # a suspect stays alone


@pytest.mark.parametrize("winner", [0, 1])
def test_the_first_result_is_booked_once(winner: int, monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(monkeypatch, 100.0)
    site.second.in_flight["second"] = Taken(7, is_alone=False), 90.0
    places = [(site.first, "first"), (site.second, "second")]
    site.end(*places[winner], DONE)
    assert not site.first.in_flight
    assert not site.second.in_flight
    assert (site.tally.shards_done, site.tally.rows_done) == (1, 10)


def test_a_failure_counts_when_it_is_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(monkeypatch, 100.0)
    site.second.in_flight["second"] = Taken(7, is_alone=False), 90.0
    site.end(site.first, "first", DEAD)
    assert site.given_up == []
    site.end(site.second, "second", DEAD)
    assert site.given_up == [7]


def test_both_are_taken_back_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    site = Site(monkeypatch, 100.0)
    site.second.in_flight["second"] = Taken(7, is_alone=False), 90.0
    site.pool._take_back()
    assert site.tally.schedule.take(1e9, is_idle=True) == Taken(7, is_alone=False)
    assert site.tally.schedule.is_empty()
