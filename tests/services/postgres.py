"""A PostgreSQL of its own on loopback, where its programs are installed."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.processes import wait_for
from tests.services.prefect_site import free_port


def _unprivileged() -> list[str]:
    """PostgreSQL refuses to run as root."""
    return ["setpriv", "--reuid=nobody", "--clear-groups"] if os.geteuid() == 0 else []


class Postgres:
    """The server in a folder; `start` and `kill` as often as a test wants.

    Attributes:
        url: for SQLAlchemy with asyncpg.
    """

    def __init__(self) -> None:
        # Not among pytest's folders: those are closed to other users, again with every session.
        self.folder, self.port = Path(tempfile.mkdtemp(prefix="refinery-postgres-")), free_port()
        self.url = f"postgresql+asyncpg://prefect@127.0.0.1:{self.port}/postgres"
        self.process: subprocess.Popen[bytes] | None = None
        if os.geteuid() == 0:
            shutil.chown(self.folder, "nobody")
        self._data = self.folder / "data"
        command = ["initdb", "-D", str(self._data), "-A", "trust", "-U", "prefect"]
        subprocess.run([*_unprivileged(), *command], check=True, capture_output=True, cwd="/")

    def start(self) -> None:
        command = ["postgres", "-D", str(self._data), "-p", str(self.port)]
        command += ["-c", "listen_addresses=127.0.0.1", "-k", str(self.folder)]
        self.process = subprocess.Popen(
            [*_unprivileged(), *command],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
        )
        wait_for(self._is_ready, 60, "PostgreSQL")

    def _is_ready(self) -> bool:
        file = self._data / "postmaster.pid"
        return file.exists() and file.read_text().rstrip().endswith("ready")

    def kill(self) -> None:
        """As a machine that loses its power."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(30)
            (self._data / "postmaster.pid").unlink(missing_ok=True)


@contextmanager
def postgres() -> Iterator[Postgres]:
    """A server for the length of a block, or a skipped test where there is none."""
    missing = [name for name in ("postgres", "initdb") if not shutil.which(name)]
    if missing:
        pytest.skip(f"PostgreSQL is not installed: no {', '.join(missing)} on PATH")
    found = Postgres()
    found.start()
    try:
        yield found
    finally:
        found.kill()
        shutil.rmtree(found.folder, ignore_errors=True)
