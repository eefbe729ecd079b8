"""Which shard next, and what a failure means: plain bookkeeping without Ray or clocks of its own.

The ledger remembers what is done; this remembers, for one driver's life, what was tried and failed.
Shard numbers come from an iterator, so a million of them cost nothing here.
"""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

MAX_WAIT_S = 120.0


class Failure(StrEnum):
    """Why an attempt did not end in a commit marker."""

    SHARD = "shard"
    """The work raised: a broken input, an unexpected error. Counts against the shard."""
    DAMAGED = "damaged"
    """The input is corrupt: no later try will help, so it is quarantined at once."""
    DEATH = "death"
    """The worker died. Whoever was in flight is a suspect and is next tried alone."""
    TIMEOUT = "timeout"
    """The shard held its worker for too long. Counts, and is next tried alone."""
    STORAGE = "storage"
    """The run directory could not be read or written. Nobody's fault; patience is bounded."""
    NEIGHBOUR = "neighbour"
    """The worker was stopped because of another shard. Free."""


class Verdict(StrEnum):
    RETRY = "retry"
    QUARANTINE = "quarantine"
    GIVE_UP = "give up"


@dataclass(frozen=True)
class Taken:
    shard: int
    is_alone: bool
    """A suspect: nothing else may run in the same worker meanwhile."""


class Schedule:
    """Fresh shards in order, retries after a back-off, suspects alone.

    Args:
        shards: numbers to do, in order.
        max_attempts: failures that count, per shard, before it is quarantined.
        retry_wait_s: wait before the second try; four times longer for each further one, up to
            `MAX_WAIT_S`.
        patience_s: how long storage may fail without a success in between.
    """

    def __init__(
        self, shards: Iterable[int], *, max_attempts: int, retry_wait_s: float, patience_s: float
    ) -> None:
        self._fresh = iter(shards)
        self._next: int | None = next(self._fresh, None)
        self._retries: list[tuple[float, int]] = []
        self._alone: list[tuple[float, int]] = []
        self._attempts: dict[int, int] = {}
        self._suspects: set[int] = set()
        self._storage_fails_since: float | None = None
        self._max_attempts, self._retry_wait_s = max_attempts, retry_wait_s
        self._patience_s = patience_s

    def is_empty(self) -> bool:
        """Nothing left to hand out (what is in flight may still come back)."""
        return self._next is None and not self._queues(is_idle=True)

    def take(self, now: float, *, is_idle: bool) -> Taken | None:
        """The next shard for a worker, or None when there is none for it now.

        Args:
            now: seconds, any monotonic clock.
            is_idle: the worker has nothing in flight, so a suspect may go there.
        """
        due = [queue for queue in self._queues(is_idle=is_idle) if queue[0][0] <= now]
        if due:
            _, shard = heapq.heappop(min(due))
            return Taken(shard, shard in self._suspects)
        if self._next is None:
            return None
        shard, self._next = self._next, next(self._fresh, None)
        return Taken(shard, False)

    def wait_s(self, now: float) -> float:
        """Seconds until a retry is due; 0 when something can be taken now."""
        queues = self._queues(is_idle=True)
        if self._next is not None or not queues:
            return 0.0
        return max(min(queues)[0][0] - now, 0.0)

    def _queues(self, *, is_idle: bool) -> list[list[tuple[float, int]]]:
        """Heaps of due times and shards that are not empty; suspects are for idle workers."""
        return [queue for queue in (self._retries, self._alone if is_idle else []) if queue]

    def succeeded(self, shard: int) -> None:
        self._attempts.pop(shard, None)
        self._suspects.discard(shard)
        self._storage_fails_since = None

    def failed(self, shard: int, failure: Failure, now: float) -> Verdict:
        """Count an attempt and say what to do; RETRY has been queued already."""
        if failure is Failure.NEIGHBOUR:
            return self._again(shard, now)
        if failure is Failure.STORAGE:
            if self._storage_fails_since is None:
                self._storage_fails_since = now
            waited = now - self._storage_fails_since
            if waited > self._patience_s:
                return Verdict.GIVE_UP
            return self._again(shard, now + min(self._retry_wait_s + waited, 30.0))
        tried = self._attempts[shard] = self._attempts.get(shard, 0) + 1
        if failure in (Failure.DEATH, Failure.TIMEOUT):
            self._suspects.add(shard)
        if tried >= self._max_attempts or failure is Failure.DAMAGED:
            return Verdict.QUARANTINE
        wait_s = self._retry_wait_s * 4 ** (tried - 1)
        return self._again(shard, now + min(wait_s, MAX_WAIT_S))

    def attempts(self, shard: int) -> int:
        """Failures counted against a shard so far."""
        return self._attempts.get(shard, 0)

    def _again(self, shard: int, due: float) -> Verdict:
        queue = self._alone if shard in self._suspects else self._retries
        heapq.heappush(queue, (due, shard))
        return Verdict.RETRY
