"""Signs of life: what a worker answers to a heartbeat, and what the driver makes of silence.

A beat runs in a thread of its own, so a worker that computes answers it. One that does not is
stopped (SIGSTOP, a frozen machine), or stuck in native code that keeps the interpreter's lock.
"""

import ctypes
import os
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.ray_session import end_worker
from pipeline.worker import ShardProgress

BEAT_INTERVAL_S = 5.0
LOOK_INTERVAL_S = 1.0
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Beat:
    """A sign of life: where the process is, and how far its shards are."""

    pid: int
    node: str
    shards: tuple[ShardProgress, ...] = ()

    @staticmethod
    def here(shards: tuple[ShardProgress, ...] = ()) -> "Beat":
        """Of the actor process that calls this."""
        return Beat(os.getpid(), ray.get_runtime_context().get_node_id(), shards)


class Pulse:
    """The heartbeats of one actor process, as its driver hears them.

    Attributes:
        last: None until the process is up.
    """

    def __init__(self) -> None:
        self.last: Beat | None = None
        self._asked: Any = None
        self._asked_at = self._looked_at = 0.0
        self._waited_s = 0.0

    def silent_s(self, actor: Any, now: float) -> float:
        """Ask when it is time to, and say for how long an answer has been due.

        An actor that waits for its place in the cluster is not silent. Time in which the driver
        itself was stopped does not count.

        Args:
            now: seconds, any monotonic clock.
        """
        step_s, self._looked_at = now - self._looked_at, now
        if self._asked is None:
            if now - self._asked_at >= BEAT_INTERVAL_S:
                self._asked, self._asked_at, self._waited_s = actor.beat.remote(), now, 0.0
            return 0.0
        if ray.wait([self._asked], timeout=0, fetch_local=False)[0]:
            # An error is told by what the actor had to do, too.
            with suppress(RayError):
                self.last = ray.get(self._asked)
            self._asked = None
            return 0.0
        if self.last is not None:
            self._waited_s += min(step_s, 2 * LOOK_INTERVAL_S)
        return self._waited_s

    def end_process(self) -> bool:
        """SIGKILL, which a stopped process obeys; Ray's own call asks the process. False where the
        process is not known."""
        if self.last is None:
            return False
        if self.last.node == ray.get_runtime_context().get_node_id():
            return end_worker(self.last.pid)
        there = NodeAffinitySchedulingStrategy(self.last.node, soft=False)
        ray.remote(end_worker).options(num_cpus=0, scheduling_strategy=there).remote(self.last.pid)
        return True


def die_with_parent() -> None:
    """A worker whose raylet is gone has nobody to report to: the kernel ends it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
