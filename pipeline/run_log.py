"""The log that stays with a run: a JSON object a line, in `logs/<driver>/00000.jsonl` and onwards.

Every attempt that ended is a line with its shard, attempt name, outcome and figures; so is every
warning of the driver. Objects are never appended to: what has come together is a new file now and
then. `logs/progress.json` says how far the shards at work are, for `refinery status`.
"""

import json
import logging
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any

from models.errors import RefineryError
from pipeline.tally import Tally, TallySnapshot
from pipeline.worker import ShardResult
from tasks.run.run_json import utc_now
from tasks.storage.files import find_bytes, join, write_bytes

WRITE_INTERVAL_S = 10.0
LOGGERS = ("pipeline", "tasks")


class RunLog(logging.Handler):
    """A listener of a tally and a handler of the program's own warnings."""

    def __init__(self, run_uri: str, run_id: str) -> None:
        super().__init__(logging.WARNING)
        began = utc_now().replace(":", "").replace("+0000", "Z")
        self._driver = f"{began}-{socket.gethostname()}-{os.getpid()}"
        self._uri, self._run = join(run_uri, "logs"), run_id
        self._lines: list[str] = []
        self._files = 0
        self._progress: TallySnapshot | None = None
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._write_on, name="run log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        self.note("log", level=record.levelname, logger=record.name, message=message)

    def on_result(self, result: ShardResult, outcome: str) -> None:
        """One attempt has ended."""
        told: dict[str, Any] = {"shard": result.shard, "attempt": result.attempt}
        if outcome == "committed":
            told |= {"rows": result.rows, "failed": result.failed, "bytes": result.bytes}
            told["seconds"] = result.seconds
        else:
            told |= {"failure": str(result.failure), "reason": result.error}
        self.note(outcome, **told)

    def on_progress(self, snapshot: TallySnapshot) -> None:
        """How things stand: written with the next file."""
        self._progress = snapshot

    def note(self, event: str, **values: Any) -> None:
        """One line."""
        head = {"at": utc_now(), "event": event, "run": self._run, "driver": self._driver}
        self._lines.append(json.dumps({**head, **values}))

    def close(self) -> None:
        """Write the rest."""
        self._is_over.set()
        self._thread.join()
        super().close()

    def _write_on(self) -> None:
        while not self._is_over.wait(WRITE_INTERVAL_S):
            self._write()
        self._write()

    def _write(self) -> None:
        # Storage that is away is told by the work itself; the lines wait.
        with suppress(RefineryError):
            if lines := self._lines[:]:
                text = "\n".join(lines) + "\n"
                name = f"{self._files:05d}.jsonl"
                write_bytes(join(self._uri, self._driver, name), text.encode())
                self._files += 1
                del self._lines[: len(lines)]
            if self._progress is not None:
                told = {"at": utc_now(), "is_over": self._is_over.is_set()}
                data = json.dumps({**told, **asdict(self._progress)}, indent=1)
                write_bytes(join(self._uri, "progress.json"), data.encode() + b"\n")


@contextmanager
def kept_log(tally: Tally, run_uri: str, run_id: str) -> Iterator[None]:
    """Keep the log of a tally with its run until the block ends."""
    log = RunLog(run_uri, run_id)
    tally.listeners.append(log)
    for name in LOGGERS:
        logging.getLogger(name).addHandler(log)
    try:
        yield
    except BaseException as error:
        log.note("ended", reason=f"{type(error).__name__}: {error}")
        raise
    else:
        log.note("finished", shards=tally.shards_done, rows=tally.rows_done)
    finally:
        for name in LOGGERS:
            logging.getLogger(name).removeHandler(log)
        log.close()


def read_progress(run_uri: str) -> dict[str, Any] | None:
    """What the driver at work has said last, or None where none is at work or it cannot be read."""
    data = find_bytes(join(run_uri, "logs", "progress.json"))
    with suppress(ValueError):
        told = json.loads(data or b"null")
        if isinstance(told, dict) and not told.get("is_over"):
            return told
    return None
