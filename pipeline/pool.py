"""The Ray engine: restartable actors, a `ray.wait` loop, and the schedule that says what is next.

Ray's default is at-most-once and an error may be raised although the task did run; that is fine
here, because a shard may be done twice. So every error is requeued; the ledger says what is done.

    starting --start() ok--> ready --any actor error--> resting --back-off--> starting

Near the end an idle actor gets a shard that another is slow with; the first result is booked.

Beside its work every actor answers heartbeats (`pipeline.pulse`). One that does not is ended; so is
one that holds a shard for too long. A Ray of ours whose daemons die is started anew.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayError, RayTaskError

from models.errors import RefineryError
from pipeline.actor import PoolActor, cpus_per_actor, gpus_per_actor, new_actor
from pipeline.config import EngineConfig
from pipeline.metrics import exported_by_ray
from pipeline.pulse import Pulse
from pipeline.ray_session import RayLost, check_daemons, end_stopped_workers, ray_session
from pipeline.schedule import Failure, Taken
from pipeline.tally import Tally
from pipeline.worker import (
    ShardProgress,
    ShardResult,
    WorkOrder,
    failed_result,
    that_fit,
)

logger = logging.getLogger(__name__)

TICK_S = 1.0
GROW_INTERVAL_S = 5.0
MAX_REST_S = 10.0
MAX_FAILED_STARTS = 5
MAX_RAY_LOSSES = 3
STRAGGLER_S = 30.0
"""A shard at work for less is not given to another worker, whatever the others took."""


@dataclass(eq=False)
class _Slot:
    """One actor as the driver sees it."""

    number: int
    actor: Any
    start_ref: Any = None
    is_ready: bool = False
    rest_until: float = 0.0
    failed_starts: int = 0
    in_flight: dict[Any, tuple[Taken, float]] = field(default_factory=dict)
    pulse: Pulse = field(default_factory=Pulse)
    moved: dict[int, tuple[int, float]] = field(default_factory=dict)
    """Rows of a shard when we last heard of it, and since when."""
    stopped: dict[int, str] = field(default_factory=dict)
    """Why we ended its process, by the shards that were the reason."""

    def room(self, limit: int) -> int:
        if not self.is_ready or any(taken.is_alone for taken, _ in self.in_flight.values()):
            return 0
        return limit - len(self.in_flight)


class Pool:
    """Runs scheduled shards on actors until none is left.

    Args:
        order: what every worker gets. Its device is "cuda" exactly when `gpus` > 0.
        gpus: of one actor; a fraction shares a GPU.
        actor_class: made with (environment, threads); has `start(order)`, `run(shard)`, `beat()`.
        first: an actor that is there already.
    """

    def __init__(
        self,
        order: WorkOrder,
        engine: EngineConfig,
        gpus: float,
        tally: Tally,
        actor_class: type = PoolActor,
        first: Any = None,
    ) -> None:
        self._order, self._engine, self._gpus, self._tally = order, engine, gpus, tally
        self._actor_class = actor_class
        self._cpus = cpus_per_actor(engine, gpus)
        self._first = first
        self._slots: list[_Slot] = []
        self._all_down_since = time.monotonic()
        self._grown_at = -math.inf
        self._last_end = ""
        """Why a worker did not come up."""
        self._took_s: list[float] = []
        """Of the shards that this pool has committed."""

    def run(self) -> None:
        """Work until every shard is committed or quarantined.

        Raises:
            RayLost: a daemon of our own Ray died. The shards in flight are scheduled again.
            RefineryError: the run cannot go on. What is committed stays; run again to resume.
        """
        self._tally.at_work = self._at_work
        try:
            self._tally.tell()
            while not self._tally.schedule.is_empty() or any(s.in_flight for s in self._slots):
                if check_daemons():
                    self._step()
                else:  # stopped: every call of Ray would wait for it
                    time.sleep(TICK_S)
            self._tally.end()
        except RayLost:
            self._take_back()
            raise
        finally:
            for slot in self._slots:
                ray.kill(slot.actor, no_restart=True)

    def _at_work(self) -> tuple[int, tuple[ShardProgress, ...]]:
        beats = [slot.pulse.last for slot in self._slots if slot.pulse.last is not None]
        held = {taken.shard for slot in self._slots for taken, _ in slot.in_flight.values()}
        found = (shard for beat in beats for shard in beat.shards if shard.shard in held)
        furthest = {at.shard: at for at in sorted(found, key=lambda at: at.rows)}
        return sum(slot.is_ready for slot in self._slots), tuple(furthest.values())

    def _step(self) -> None:
        now = time.monotonic()
        if now - self._grown_at > GROW_INTERVAL_S:
            self._grow(now)
        for slot in self._slots:
            self._wake(slot, now)
            self._fill(slot, now)
            self._stop_overdue(slot, now)
            self._stop_silent(slot, now)
        self._check_alive(now)
        waiting = {ref: slot for slot in self._slots for ref in slot.in_flight}
        waiting |= {s.start_ref: s for s in self._slots if s.start_ref is not None}
        if not waiting:
            time.sleep(min(TICK_S, 0.1))
            return
        pause = self._tally.schedule.wait_s(now)
        ready, _ = ray.wait(
            list(waiting),
            num_returns=1,
            timeout=min(TICK_S, pause) if pause else TICK_S,
            fetch_local=False,
        )
        for ref in ready:
            slot = waiting[ref]
            if ref is slot.start_ref:
                self._finish_start(slot)
            else:
                self._finish_shard(slot, ref)
        if not ready:
            self._tally.tell()

    # ------------------------------------------------------------------ actors

    def _grow(self, now: float) -> None:
        """One slot per place in the cluster, never more than shards are left; called again and
        again, because nodes join."""
        self._grown_at = now
        end_stopped_workers()
        memory = self._order.memory_bytes
        wanted = pool_size(self._engine, self._gpus, ray.cluster_resources(), memory)
        wanted = min(wanted, self._tally.shards_left)
        while len(self._slots) < wanted:
            slot = _Slot(len(self._slots), self._first or self._new_actor())
            self._first = None
            slot.start_ref = slot.actor.start.remote(self._order)
            self._slots.append(slot)

    def _new_actor(self) -> Any:
        return new_actor(self._engine, self._gpus, self._actor_class)

    def _wake(self, slot: _Slot, now: float) -> None:
        if not slot.is_ready and slot.start_ref is None and now >= slot.rest_until:
            slot.start_ref = slot.actor.start.remote(self._order)

    def _finish_start(self, slot: _Slot) -> None:
        reference, slot.start_ref = slot.start_ref, None
        try:
            where = ray.get(reference)
        except RayTaskError as error:
            # The models do not load: they would not load anywhere else either.
            raise _as_refinery_error(error) from error
        except RayError as error:
            slot.failed_starts += 1
            self._last_end = _first_line(error)
            if isinstance(error, ActorDiedError):
                if slot.failed_starts >= MAX_FAILED_STARTS:
                    raise RefineryError(
                        f"worker {slot.number} died {slot.failed_starts} times while it started: "
                        f"{_first_line(error)}; see its log under /tmp/ray, or try --engine inline"
                    ) from error
                slot.actor = self._new_actor()
            slot.rest_until = time.monotonic() + min(2.0**slot.failed_starts / 4, MAX_REST_S)
            slot.pulse = Pulse()
            return
        self._tally.begin()
        self._last_end = ""
        slot.is_ready, slot.failed_starts = True, 0
        slot.stopped.clear()
        logger.info("worker %d is up at %s", slot.number, where)

    def _check_alive(self, now: float) -> None:
        if any(slot.is_ready for slot in self._slots):
            self._all_down_since = now
        elif now - self._all_down_since > self._engine.patience_s:
            raise RefineryError(
                f"no worker came up within {self._engine.patience_s:.0f} s: {len(self._slots)} "
                f"actors want {self._cpus} CPU and {self._gpus:g} GPU each, "
                f"{self._why_none(ray.cluster_resources())}. Run again to resume"
            )

    def _why_none(self, found: Mapping[str, float]) -> str:
        if found.get("CPU", 0.0) < self._cpus or found.get("GPU", 0.0) < self._gpus:
            return (
                f"the cluster has {found}; lower engine.gpus_per_actor or engine.threads, add "
                "nodes, or raise engine.patience_s"
            )
        if self._last_end:
            return f"and the last one that started ended: {self._last_end}"
        return (
            f"which the cluster has ({found}), but others hold it or the workers do not start; see "
            "`ray status`, and the workers' logs under /tmp/ray/session_latest/logs"
        )

    # ------------------------------------------------------------------ shards

    def _fill(self, slot: _Slot, now: float) -> None:
        while slot.room(self._engine.shards_in_flight) > 0:
            if slot.in_flight and not self._is_plenty():
                return
            taken = self._tally.schedule.take(now, is_idle=not slot.in_flight)
            taken = taken or self._straggler(slot, now)
            if taken is None:
                return
            slot.in_flight[slot.actor.run.remote(taken.shard)] = (taken, now)

    def _is_plenty(self) -> bool:
        """More shards wait than workers have none, also those that are coming up: then one may
        read ahead."""
        held = {taken.shard for slot in self._slots for taken, _ in slot.in_flight.values()}
        idle = sum(not slot.in_flight for slot in self._slots)
        return self._tally.shards_left - len(held) > idle

    def _straggler(self, slot: _Slot, now: float) -> Taken | None:
        """The shard that takes far longer than others did, for a worker with nothing to do when
        nothing is left: whichever is done first is the commit (`tasks.run.ledger`)."""
        factor = self._engine.straggler_factor
        if slot.in_flight or not factor or not self._took_s or not self._tally.schedule.is_empty():
            return None
        at_work = [entry for other in self._slots for entry in other.in_flight.values()]
        held = [taken.shard for taken, _ in at_work]
        late = [
            (since, t.shard) for t, since in at_work if held.count(t.shard) == 1 and not t.is_alone
        ]
        since, shard = min(late, default=(now, -1))
        if now - since < max(STRAGGLER_S, factor * median(self._took_s)):
            return None
        logger.info("shard=%05d is slow (%.0f s); worker %d, too", shard, now - since, slot.number)
        return Taken(shard, is_alone=False)

    def _held(self, shard: int) -> list[tuple[_Slot, Any]]:
        """Where a shard is at work."""
        places = ((slot, ref) for slot in self._slots for ref in slot.in_flight)
        return [(slot, ref) for slot, ref in places if slot.in_flight[ref][0].shard == shard]

    def _finish_shard(self, slot: _Slot, ref: Any) -> None:
        taken, since = slot.in_flight.pop(ref)
        result: ShardResult
        try:
            result = ray.get(ref)
        except RayTaskError as error:
            result = failed_result(taken.shard, _cause(error))
        except RayError as error:
            result = self._lost(slot, taken.shard, error)
        others = self._held(taken.shard)
        if result.error is None:
            self._took_s.append(time.monotonic() - since)
            for other, copy in others:  # it finds the commit, or comes second
                del other.in_flight[copy]
        elif others and not result.is_fatal:
            logger.info("shard=%05d is at work elsewhere, too: %s", taken.shard, result.error)
            return
        self._tally.book(result)

    def _lost(self, slot: _Slot, shard: int, error: RayError) -> ShardResult:
        """The worker went away under a shard."""
        slot.is_ready = False
        slot.pulse = Pulse()
        slot.rest_until = time.monotonic() + 0.25
        if shard in slot.stopped:
            return ShardResult(shard=shard, error=slot.stopped[shard], failure=Failure.TIMEOUT)
        if slot.stopped:
            return ShardResult(
                shard=shard, error="its worker was stopped", failure=Failure.NEIGHBOUR
            )
        logger.info("worker %d was lost: %s", slot.number, _first_line(error))
        reason = "the worker died while it held this shard (out of memory? a crash in native code?)"
        return ShardResult(shard=shard, error=reason, failure=Failure.DEATH)

    def _stop_overdue(self, slot: _Slot, now: float) -> None:
        limit_s = self._engine.shard_timeout_s
        reason = f"finished no batch within engine.shard_timeout_s = {limit_s:g} s"
        for shard in slot.pulse.last.shards if slot.pulse.last else ():
            if slot.moved.get(shard.shard, (0, 0.0))[0] != shard.rows:
                slot.moved[shard.shard] = (shard.rows, now)
        late = {
            taken.shard: reason
            for taken, since in slot.in_flight.values()
            if now - max(since, slot.moved.get(taken.shard, (0, 0.0))[1]) > limit_s
        }
        if late and not slot.stopped:
            self._stop(slot, late)

    def _stop_silent(self, slot: _Slot, now: float) -> None:
        """A stopped process, or one stuck in native code, holds its shards without a word."""
        if slot.stopped or now < slot.rest_until:
            return
        silent_s = slot.pulse.silent_s(slot.actor, now)
        if silent_s > self._engine.heartbeat_s:
            reason = (
                f"its worker gave no sign of life for {silent_s:.0f} s (stopped? stuck in native "
                "code?); engine.heartbeat_s is the limit"
            )
            self._stop(slot, {taken.shard: reason for taken, _ in slot.in_flight.values()})

    def _stop(self, slot: _Slot, reasons: dict[int, str]) -> None:
        why = "; ".join(f"shard={shard:05d} {reason}" for shard, reason in reasons.items())
        logger.warning("worker %d is restarted: %s", slot.number, why or "silent at its start")
        slot.stopped, slot.is_ready = reasons, False
        if not slot.pulse.end_process():
            ray.kill(slot.actor, no_restart=False)
        slot.pulse = Pulse()

    def _take_back(self) -> None:
        held = {taken.shard for slot in self._slots for taken, _ in slot.in_flight.values()}
        for shard in sorted(held):
            lost = ShardResult(shard=shard, error="Ray died", failure=Failure.NEIGHBOUR)
            self._tally.book(lost)


def run_on_ray(make_order: Callable[[str], WorkOrder], engine: EngineConfig, tally: Tally) -> None:
    """Run every scheduled shard on the engine's Ray. One of our own that dies is started again, as
    long as shards are committed in between.

    Args:
        make_order: the order for a device, "cpu" or "cuda".

    Raises:
        RefineryError: the run cannot go on. What is committed stays; run again to resume.
    """
    losses, done = 0, tally.shards_done
    while True:
        try:
            with ray_session(engine.address) as first, exported_by_ray(tally.metrics):
                gpus = gpus_per_actor(engine, ray.cluster_resources())
                order = make_order("cuda" if gpus > 0 else "cpu")
                Pool(order, engine, gpus, tally, first=first).run()
                return
        except RayLost as lost:
            ray.shutdown()  # also one that somebody else began in this process
            losses = 1 if tally.shards_done > done else losses + 1
            done = tally.shards_done
            if losses >= MAX_RAY_LOSSES:
                raise RefineryError(
                    f"{lost}, {losses} times without a commit in between; see its logs under "
                    "/tmp/ray, give the machine more memory, or try --engine inline. Run again to "
                    "resume"
                ) from lost
            logger.warning("%s; starting Ray again", lost)


def pool_size(
    engine: EngineConfig, gpus: float, resources: Mapping[str, float], memory_bytes: int = 0
) -> int:
    """How many actors the engine wants on a cluster with these resources (at least one).

    Args:
        memory_bytes: of an actor on a CPU; 0 where nobody knows.
    """
    if engine.actors != "auto":
        return engine.actors
    if gpus > 0:
        return max(int(resources.get("GPU", 0.0) / gpus + 1e-6), 1)
    places = int(resources.get("CPU", 1.0)) // engine.threads
    # Ray keeps a part for an object store, where we put nothing.
    room = resources.get("memory", 0.0) + resources.get("object_store_memory", 0.0)
    return that_fit(places, room, memory_bytes)


def _cause(error: RayTaskError) -> BaseException:
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error


def _as_refinery_error(error: RayTaskError) -> RefineryError:
    cause = _cause(error)
    if isinstance(cause, RefineryError):
        return cause
    return RefineryError(
        f"the worker cannot load its models: {type(cause).__name__}: {_first_line(cause)}; "
        "`--engine inline --debug` shows where"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
