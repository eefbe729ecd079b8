"""Who works on a run: one driver at a time, so that no work is done twice.

    drivers/0003.json   the third driver of the run; the highest number holds it

The ledger is right without it (`tasks.run.ledger`); two drivers would only waste each other's time.
A driver takes the run by creating the next number, and rewrites its file every few seconds. Another
that comes meanwhile watches whether the file changes, by its own clock: clocks need not agree. A
process that has ended on the same machine is known to be dead at once.
"""

import logging
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter

from models.errors import LedgerError
from tasks.run.records import Count, DamagedError, Moment, NewerError, parse, to_json
from tasks.run.run_json import utc_now
from tasks.storage.files import (
    exists,
    find_bytes,
    is_local,
    join,
    list_files,
    local_path,
    remove,
    write_bytes,
)
from tasks.storage.once import create_bytes

logger = logging.getLogger(__name__)

IfBusy = Literal["refuse", "wait", "take"]
BEAT_S = 5.0
STALE_S = 30.0
"""A driver that shows no sign for so long is dead."""
POLL_S = 0.5
VERSION = 1
_NAME = re.compile(r"(\d{4,})\.json")


@dataclass(frozen=True, kw_only=True)
class Driver:
    """Who holds a run, or held it.

    Attributes:
        host, pid: where it runs.
        machine: host, boot and process namespace: within it, pid and `born` name one process.
        born: when the process started, in the kernel's ticks; 0 where that is not known.
        since: UTC, ISO 8601.
        beats: signs of life so far.
        ended: UTC, ISO 8601; empty while it holds the run.
    """

    host: str
    pid: Count
    machine: str
    born: Count
    since: Moment
    beats: Count = 0
    ended: Moment = ""
    version: Annotated[int, Field(ge=1, le=VERSION)] = VERSION

    def __str__(self) -> str:
        return f"{self.host}, process {self.pid}, since {self.since}"

    @property
    def state(self) -> str:
        """ "at work" (unless it has died on another machine), "ended" or "died"."""
        return "ended" if self.ended else "died" if self.has_died() else "at work"

    def has_died(self) -> bool:
        """Whether it was a process of this machine and is no more."""
        return self.machine == _machine() and self.born > 0 and _born(self.pid) != self.born


_DRIVER = TypeAdapter(Driver)
_held: ContextVar[dict[str, "Lease"] | None] = ContextVar("held", default=None)


class Lease:
    """This process holds a run, until `release` or until another takes it."""

    def __init__(self, run_uri: str, number: int, driver: Driver) -> None:
        self._run_uri, self._number, self._driver = run_uri, number, driver
        self._lost_to: Driver | None = None
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """
        Raises:
            LedgerError: another driver has taken the run.
        """
        if self._lost_to is not None:
            raise LedgerError(
                f"{self._run_uri}: taken over by another driver ({self._lost_to}); what is "
                "committed stays, and that one goes on with it"
            )

    def release(self) -> None:
        """Say that the run is free. Nothing of a driver stays where no run came of it."""
        self._is_over.set()
        self._thread.join()
        if self._lost_to is not None:
            return
        with _best_effort():
            if exists(join(self._run_uri, "run.json")):
                self._write(replace(self._driver, ended=utc_now()))
                return
            remove([_place(self._run_uri, self._number)])
            if is_local(self._run_uri):
                os.rmdir(local_path(join(self._run_uri, "drivers")))
                os.rmdir(local_path(self._run_uri))

    def _beat(self) -> None:
        while not self._is_over.wait(BEAT_S):
            with _best_effort():
                number, last = _last(self._run_uri)
                if number > self._number:
                    self._lost_to = last
                    logger.warning("%s: taken over by %s; ending", self._run_uri, last)
                    return
                self._write(replace(self._driver, beats=self._driver.beats + 1))

    def _write(self, driver: Driver) -> None:
        write_bytes(_place(self._run_uri, self._number), to_json(driver))
        self._driver = driver


@contextmanager
def hold(run_uri: str, if_busy: IfBusy = "refuse") -> Iterator[Lease]:
    """Hold a run inside the block; nested blocks of one driver share its lease.

    Args:
        if_busy: what to do where a driver is at work: refuse, wait until it is done, or take the
            run from it. A dead one's run is taken in any case, after `STALE_S` at most.

    Raises:
        LedgerError: another driver is at work, and who.
    """
    held = _held.get() or {}
    if run_uri in held:
        yield held[run_uri]
        return
    lease = Lease(run_uri, *_take(run_uri, if_busy))
    token = _held.set({**held, run_uri: lease})
    try:
        yield lease
    finally:
        _held.reset(token)
        lease.release()


def read_driver(run_uri: str) -> Driver | None:
    """The last driver of a run, at work or not.

    Raises:
        NewerError: a later version of this program.
    """
    return _last(run_uri)[1]


def _take(run_uri: str, if_busy: IfBusy) -> tuple[int, Driver]:
    watched: tuple[int, Driver | None] | None = None
    since = 0.0
    while True:
        number, driver = found = _last(run_uri)
        is_free = driver is None or bool(driver.ended) or driver.has_died() or if_busy == "take"
        if found != watched:
            if watched and watched[0] == number and not is_free and if_busy == "refuse":
                raise _refusal(run_uri, driver)  # it has shown a sign of life
            watched, since = found, time.monotonic()
        if is_free or time.monotonic() - since > STALE_S:
            mine = _myself()
            if create_bytes(_place(run_uri, number + 1), to_json(mine)):
                if driver is not None and not driver.ended:
                    logger.warning("%s: taken over from %s", run_uri, driver)
                return number + 1, mine
            continue
        time.sleep(POLL_S)


def _refusal(run_uri: str, driver: Driver | None) -> LedgerError:
    return LedgerError(
        f"{run_uri}: another driver is at work on this run ({driver}); let it end, or stop it and "
        "run again. --force takes the run from it, --set engine.if_busy=wait waits for its end"
    )


def _last(run_uri: str) -> tuple[int, Driver | None]:
    """The highest number, and who has it; (0, None) where the run had no driver yet."""
    names = [name for name, _, _ in list_files(join(run_uri, "drivers"), LedgerError)]
    number = max((int(match[1]) for name in names if (match := _NAME.fullmatch(name))), default=0)
    data = find_bytes(_place(run_uri, number)) if number else None
    if data is None:
        return number, None
    try:
        advice = "run again, which takes the run over"
        return number, parse(_DRIVER, data, _place(run_uri, number), newest=VERSION, advice=advice)
    except NewerError:
        raise
    except DamagedError as error:
        logger.warning("%s", error)
        return number, None


def _place(run_uri: str, number: int) -> str:
    return join(run_uri, "drivers", f"{number:04d}.json")


def _myself() -> Driver:
    pid = os.getpid()
    return Driver(
        host=socket.gethostname(), pid=pid, machine=_machine(), born=_born(pid), since=utc_now()
    )


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _born(pid: int) -> int:
    """When a living process of this machine started, in ticks since boot; 0 where there is none."""
    try:
        # The name of the program, in parentheses, may hold anything.
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return 0
    return 0 if state in "ZX" else int(fields[18])


@contextmanager
def _best_effort() -> Iterator[None]:
    """A sign of life that storage refuses is only a sign: the next may pass."""
    with suppress(OSError):
        try:
            yield
        except LedgerError as error:
            logger.debug("lease: %s", error)
