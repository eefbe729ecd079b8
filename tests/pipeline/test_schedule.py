"""The order of shards, and what each kind of failure leads to."""

import itertools

import pytest

from pipeline.schedule import Failure, Schedule, Taken, Verdict


def make(shards: list[int], **changes: float) -> Schedule:
    settings = {"max_attempts": 3, "retry_wait_s": 1.0, "patience_s": 100.0} | changes
    return Schedule(shards, **settings)  # type: ignore[arg-type]


def test_fresh_shards_come_in_order() -> None:
    schedule = make([4, 7, 9])
    taken = [schedule.take(0.0, is_idle=False) for _ in range(4)]
    assert taken == [Taken(4, False), Taken(7, False), Taken(9, False), None]
    assert schedule.is_empty()


def test_shards_are_drawn_one_by_one_from_an_endless_iterator() -> None:
    schedule = Schedule(itertools.count(), max_attempts=3, retry_wait_s=1, patience_s=1)
    assert [schedule.take(0.0, is_idle=True) for _ in range(2)] == [
        Taken(0, False),
        Taken(1, False),
    ]
    assert not schedule.is_empty()


def test_failures_back_off_four_times_longer_then_quarantine() -> None:
    schedule = make([5])
    assert schedule.take(0.0, is_idle=True) == Taken(5, False)
    assert schedule.failed(5, Failure.SHARD, now=10.0) is Verdict.RETRY
    assert schedule.wait_s(10.25) == 0.75
    assert schedule.take(10.9, is_idle=True) is None
    assert schedule.take(11.0, is_idle=True) == Taken(5, False)
    assert schedule.failed(5, Failure.SHARD, now=20.0) is Verdict.RETRY
    assert schedule.wait_s(20.0) == 4.0
    assert schedule.take(24.0, is_idle=True) == Taken(5, False)
    assert schedule.failed(5, Failure.SHARD, now=30.0) is Verdict.QUARANTINE
    assert schedule.is_empty()


def test_due_retries_come_before_fresh_shards() -> None:
    schedule = make([1, 2, 3])
    schedule.take(0.0, is_idle=True)
    schedule.failed(1, Failure.SHARD, now=0.0)
    assert schedule.take(0.5, is_idle=True) == Taken(2, False)
    assert schedule.take(1.0, is_idle=True) == Taken(1, False)
    assert schedule.take(1.0, is_idle=True) == Taken(3, False)


@pytest.mark.parametrize("failure", [Failure.DEATH, Failure.TIMEOUT])
def test_suspects_are_tried_alone(failure: Failure) -> None:
    schedule = make([1, 2])
    schedule.take(0.0, is_idle=True)
    schedule.failed(1, failure, now=0.0)
    schedule.take(0.0, is_idle=False)
    assert schedule.take(5.0, is_idle=False) is None
    assert schedule.take(5.0, is_idle=True) == Taken(1, True)


def test_a_neighbour_pays_nothing() -> None:
    schedule = make([1], max_attempts=1)
    for now in range(5):
        assert schedule.take(now, is_idle=True) == Taken(1, False)
        assert schedule.failed(1, Failure.NEIGHBOUR, now) is Verdict.RETRY


def test_storage_failures_do_not_count_until_patience_ends() -> None:
    schedule = make([1, 2], max_attempts=1, patience_s=100.0)
    schedule.take(0.0, is_idle=True)
    assert schedule.failed(1, Failure.STORAGE, now=0.0) is Verdict.RETRY
    assert schedule.failed(1, Failure.STORAGE, now=99.0) is Verdict.RETRY
    schedule.succeeded(2)  # storage is back: patience starts anew
    assert schedule.failed(1, Failure.STORAGE, now=150.0) is Verdict.RETRY
    assert schedule.failed(1, Failure.STORAGE, now=251.0) is Verdict.GIVE_UP


def test_damaged_input_is_given_up_at_once() -> None:
    schedule = make([1])
    schedule.take(0.0, is_idle=True)
    assert schedule.failed(1, Failure.DAMAGED, now=0.0) is Verdict.QUARANTINE
    assert schedule.attempts(1) == 1
    assert schedule.is_empty()


def test_success_clears_the_count() -> None:
    schedule = make([1], max_attempts=2)
    schedule.take(0.0, is_idle=True)
    schedule.failed(1, Failure.SHARD, now=0.0)
    schedule.succeeded(1)
    assert schedule.failed(1, Failure.SHARD, now=0.0) is Verdict.RETRY


def test_an_outage_with_many_shards_in_waiting_is_no_burden() -> None:
    """Every shard fails and comes back: the work grows with their number, not with its square."""
    looked_at = 0

    class Counted(int):
        def __lt__(self, other: int) -> bool:
            nonlocal looked_at
            looked_at += 1
            return int(self) < int(other)

    count = 5000
    schedule = make([Counted(shard) for shard in range(count)])  # type: ignore[arg-type]
    for _ in range(count):
        taken = schedule.take(0.0, is_idle=False)
        assert taken is not None
        schedule.failed(taken.shard, Failure.STORAGE, now=0.0)
    order = []
    while (taken := schedule.take(100.0, is_idle=False)) is not None:
        order.append(taken.shard)
    assert order == list(range(count))
    assert looked_at < 100 * count


def test_ordinary_retries_and_suspects_come_by_the_time_they_are_due() -> None:
    schedule = make([1, 2, 3])
    for _ in range(3):
        schedule.take(0.0, is_idle=True)
    schedule.failed(2, Failure.DEATH, now=1.0)
    schedule.failed(1, Failure.SHARD, now=2.0)
    schedule.failed(3, Failure.SHARD, now=0.5)
    assert schedule.wait_s(0.5) == 1.0
    assert schedule.take(9.0, is_idle=True) == Taken(3, False)
    assert schedule.take(9.0, is_idle=False) == Taken(1, False)
    assert schedule.take(9.0, is_idle=False) is None
    assert not schedule.is_empty()
    assert schedule.take(9.0, is_idle=True) == Taken(2, True)
    assert schedule.is_empty()
