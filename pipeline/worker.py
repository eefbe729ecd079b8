"""What runs shards: one station, one lock around its device.

The same object is called in a loop by `pipeline.inline` and lives in a Ray actor in
`pipeline.pool`. torch is imported when work starts, not with this file.
"""

import gc
import logging
import os
import socket
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from models.errors import AssetError, ConfigError, LedgerError, RefineryError
from pipeline.faults import is_cuda_error, is_passing, is_refused
from pipeline.schedule import Failure
from tasks.input.sample import CorruptFileError
from tasks.work.kinds import load_station

if TYPE_CHECKING:
    from tasks.job import Job
    from tasks.run.run_json import RunHandle
    from tasks.work.station import Station

logger = logging.getLogger(__name__)

CUDA_EXIT_CODE = 70
MEMORY_SHARE = 0.9
"""Of a machine's memory, for workers."""


@dataclass(frozen=True)
class WorkOrder:
    """All that a worker needs to know: small values, never weights or pictures.

    Attributes:
        run: where to commit, and under which run id.
        hashes: the weight hashes that the run was made with; a worker that loads others refuses.
        device: "cpu" or "cuda".
        threads: CPU threads of PyTorch.
        memory_bytes: that it is expected to need; 0 where nobody knows.
    """

    job: "Job"
    run: "RunHandle"
    hashes: dict[str, str]
    device: str
    threads: int
    memory_bytes: int = 0


@dataclass(frozen=True)
class ShardResult:
    """How one attempt ended. `error` is None after a commit.

    Attributes:
        attempt, bytes, memory_bytes, failures: as in the marker.
        is_fatal: every other shard would fail the same way (a missing asset, a full disk).
    """

    shard: int
    rows: int = 0
    failed: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    attempt: str = ""
    bytes: int = 0
    memory_bytes: int = 0
    failures: dict[str, int] = field(default_factory=dict)
    error: str | None = None
    failure: Failure = Failure.SHARD
    is_fatal: bool = False


@dataclass(frozen=True)
class ShardProgress:
    """How far one attempt at one shard is.

    Attributes:
        rows: computed so far; not yet visible.
        seconds: since the attempt began.
    """

    shard: int
    rows: int
    seconds: float


class ShardWorker:
    """Loads the models once, then runs shards; several threads may call `run` at the same time."""

    def __init__(self, order: WorkOrder, station: "Station | None" = None) -> None:
        self.order = order
        self._station = station if station is not None and _suits(station, order) else None
        self._building = threading.Lock()
        self._device_lock = threading.Lock()
        self._at_work: dict[int, tuple[float, int]] = {}
        self.on_rows: Callable[[], None] | None = None
        """Called after each batch."""

    def start(self) -> str:
        """Load the models, check that they are the run's.

        Returns:
            Where this worker lives, for the log.

        Raises:
            AssetError: the weights are missing, or not those that the run was made with.
        """
        self._loaded()
        gc.freeze()  # what is loaded stays: else each collection goes through it, with the GIL held
        return f"{socket.gethostname()}:{os.getpid()} {self.order.device}"

    def run(self, shard: int) -> ShardResult:
        """One attempt at one shard; an error comes back as a value.

        A CUDA error ends the process: its context is unusable from then on.
        """
        from tasks.run.manifest import read_shard_spec
        from tasks.work.shard import do_shard

        started = time.monotonic()
        self._note(shard, started, 0)
        try:
            station = self._loaded()
            spec = read_shard_spec(self.order.run.uri, shard)
            tell = partial(self._note, shard, started)
            marker = do_shard(spec, self.order.run, station, self._device_lock, tell)
        except Exception as error:
            if is_cuda_error(error):
                self._leave(shard, error)
            # What the error tree names is said by the driver; a traceback is for what it does not.
            is_named = isinstance(error, RefineryError)
            logger.log(
                logging.INFO if is_named else logging.WARNING,
                "shard=%05d failed after %.1f s",
                shard,
                time.monotonic() - started,
                exc_info=not is_named,
            )
            return failed_result(shard, error)
        finally:
            self._at_work.pop(shard, None)
        return ShardResult(
            shard=shard,
            rows=marker.rows,
            failed=marker.failed,
            seconds=dict(marker.seconds),
            attempt=marker.attempt,
            bytes=sum(part.bytes for part in marker.parts.values()),
            memory_bytes=marker.memory_bytes,
            failures=dict(marker.failures),
        )

    def progress(self) -> tuple[ShardProgress, ...]:
        """Of the shards that are at work."""
        now = time.monotonic()
        return tuple(
            ShardProgress(shard, rows, round(now - since, 3))
            for shard, (since, rows) in sorted(self._at_work.copy().items())
        )

    def _note(self, shard: int, since: float, rows: int) -> None:
        self._at_work[shard] = (since, rows)
        if self.on_rows:
            self.on_rows()

    def _loaded(self) -> "Station":
        import torch

        # Per thread: OpenMP keeps the count of the thread that set it.
        torch.set_num_threads(self.order.threads)
        with self._building:
            if self._station is None:
                station = load_station(self.order.job, self.order.device, self.order.threads)
                if station.hashes != self.order.hashes:
                    raise AssetError(changed_weights(self.order.hashes, station.hashes))
                self._station = station
            return self._station

    def _leave(self, shard: int, error: Exception) -> None:
        logger.critical("shard=%05d the CUDA context is broken, leaving: %s", shard, error)
        logging.shutdown()
        os._exit(CUDA_EXIT_CODE)


def _suits(station: "Station", order: WorkOrder) -> bool:
    asked = (order.job, order.device, order.threads, order.hashes)
    return (station.asked, station.device.type, station.threads, station.hashes) == asked


def _unforeseen(error: BaseException) -> str:
    """Type, message and place: the traceback stays in the worker's log."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" (at {Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


def that_fit(places: int, room_bytes: float, memory_bytes: int) -> int:
    """How many of `places` workers have room in a machine's or cluster's memory, one at least.

    Args:
        memory_bytes: of one worker; 0 where nobody knows.
    """
    if memory_bytes:
        places = min(places, int(MEMORY_SHARE * room_bytes / memory_bytes))
    return max(places, 1)


def changed_weights(expected: dict[str, str], found: dict[str, str]) -> str:
    """Which weight files differ from those of the run."""
    names = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
    detail = "; ".join(
        f"{n}: run {expected.get(n, 'none')[:12]}, here {found.get(n, 'none')[:12]}" for n in names
    )
    return (
        f"this worker loads other weights than the run was made with ({detail}); put the same "
        "files on every machine, or write to a new output"
    )


def failed_result(shard: int, error: BaseException) -> ShardResult:
    """What an exception means for the shard and for the run."""
    is_refinery = isinstance(error, RefineryError)
    failure = Failure.SHARD
    if isinstance(error, LedgerError) or is_passing(error):
        failure = Failure.STORAGE
    elif isinstance(error, CorruptFileError):
        failure = Failure.DAMAGED
    return ShardResult(
        shard=shard,
        error=str(error) if is_refinery else _unforeseen(error),
        failure=failure,
        is_fatal=isinstance(error, AssetError | ConfigError) or is_refused(error),
    )
