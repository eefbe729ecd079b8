"""Counts of one run stage: what both engines report to, and what a progress bar shows."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from models.errors import LedgerError, RefineryError
from pipeline.schedule import Failure, Schedule, Verdict
from pipeline.worker import ShardProgress, ShardResult

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TallySnapshot:
    """Where a run stands. Counts are of the whole run; `seconds` and `rows_now` of this driver.

    Attributes:
        rows_total: samples of the manifest, or None where only reading tells (tars).
        workers: those that are up.
        at_work: how far shards are that are not committed yet.
    """

    shards_total: int
    shards_done: int
    shards_quarantined: int
    rows_total: int | None
    rows_done: int
    rows_failed: int
    rows_now: int
    seconds: float
    workers: int = 0
    at_work: tuple[ShardProgress, ...] = ()

    @property
    def images_per_s(self) -> float:
        return self.rows_now / self.seconds if self.seconds > 0 else 0.0

    @property
    def eta_s(self) -> float | None:
        """Seconds left at the pace so far; None before the first commit."""
        if self.rows_now == 0 or self.shards_done == 0:
            return None
        if self.rows_total is not None:
            rows_left = max(self.rows_total - self.rows_done, 0)
        else:
            shards_left = self.shards_total - self.shards_done - self.shards_quarantined
            rows_left = shards_left * self.rows_done / self.shards_done
        return rows_left / self.images_per_s


OnProgress = Callable[[TallySnapshot], None]


class Listener(Protocol):
    """Hears of every result and of every snapshot."""

    def on_result(self, result: ShardResult, outcome: str) -> None:
        """Outcome: committed, retried or quarantined."""
        ...

    def on_progress(self, snapshot: TallySnapshot) -> None: ...


def ignore_progress(snapshot: TallySnapshot) -> None:
    """The default listener."""


@dataclass
class Tally:
    """Books results: schedule, quarantine, counts, listener. One per driver."""

    schedule: Schedule
    quarantine: Callable[[int, str, int], None]
    """Writes shard, reason and number of attempts to the ledger."""
    shards_total: int
    rows_total: int | None
    shards_done: int = 0
    """Committed, earlier drivers included."""
    rows_done: int = 0
    rows_failed: int = 0
    on_progress: OnProgress = ignore_progress
    rows_now: int = 0
    quarantined: dict[int, str] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)
    has_begun: bool = False
    ended: float | None = None
    listeners: list[Listener] = field(default_factory=list)
    metrics: Any = None
    """A `pipeline.metrics.Metrics` among the listeners, for engines that export by themselves."""
    at_work: Callable[[], tuple[int, tuple[ShardProgress, ...]]] = lambda: (0, ())
    """Set by the engine: how many workers are up, and how far their shards are."""

    def begin(self) -> None:
        """The first worker is ready: pace counts from here. Later calls change nothing."""
        if not self.has_begun:
            self.has_begun, self.started = True, time.monotonic()
            self.tell()

    def end(self) -> None:
        """No shard is left: closing the engine does not count."""
        self.ended = time.monotonic()

    @property
    def shards_left(self) -> int:
        """Neither committed nor quarantined."""
        return self.shards_total - self.shards_done - len(self.quarantined)

    @property
    def seconds(self) -> float:
        """From the first worker being ready to the last result, or to now."""
        if not self.has_begun:
            return 0.0
        return (self.ended or time.monotonic()) - self.started

    def tell(self) -> None:
        """Pass the counts on to the listeners."""
        snapshot = self.snapshot()
        for listener in self.listeners:
            listener.on_progress(snapshot)
        self.on_progress(snapshot)

    def snapshot(self) -> TallySnapshot:
        workers, at_work = self.at_work()
        return TallySnapshot(
            shards_total=self.shards_total,
            shards_done=self.shards_done,
            shards_quarantined=len(self.quarantined),
            rows_total=self.rows_total,
            rows_done=self.rows_done,
            rows_failed=self.rows_failed,
            rows_now=self.rows_now,
            seconds=self.seconds,
            workers=workers,
            at_work=at_work,
        )

    def book(self, result: ShardResult) -> None:
        """Count a result and queue, quarantine or give up.

        Raises:
            RefineryError: the run cannot go on (the reason is the worker's message).
        """
        if result.error is None:
            self.schedule.succeeded(result.shard)
            self.shards_done += 1
            self.rows_done += result.rows
            self.rows_failed += result.failed
            self.rows_now += result.rows
            self._pass_on(result, "committed")
            self.tell()
            return
        if result.is_fatal:
            raise RefineryError(result.error)
        verdict = self.schedule.failed(result.shard, result.failure, time.monotonic())
        if verdict is Verdict.GIVE_UP:
            raise LedgerError(result.error)
        if verdict is Verdict.QUARANTINE:
            self.quarantined[result.shard] = result.error
            self.quarantine(result.shard, result.error, self.schedule.attempts(result.shard))
            logger.warning("shard=%05d quarantined: %s", result.shard, result.error)
            self._pass_on(result, "quarantined")
            self.tell()
            return
        self._pass_on(result, "retried")
        if result.failure is not Failure.NEIGHBOUR:
            logger.warning(
                "shard=%05d will be tried again (%s): %s",
                result.shard,
                result.failure,
                result.error,
            )

    def _pass_on(self, result: ShardResult, outcome: str) -> None:
        for listener in self.listeners:
            listener.on_result(result, outcome)
