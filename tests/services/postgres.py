"""A PostgreSQL of its own on loopback, where its programs are installed."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.services.prefect_site import free_port


def _unprivileged() -> list[str]:
    """PostgreSQL refuses to run as root."""
    return ["setpriv", "--reuid=nobody", "--clear-groups"] if os.geteuid() == 0 else []


class Postgres:
    """The server in a folder; `start` and `kill` as often as a test wants.

    Attributes:
        url: for SQLAlchemy with asyncpg.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.url = f"postgresql+asyncpg://prefect@127.0.0.1:{self.port}/postgres"
        self.process: subprocess.Popen[bytes] | None = None
        folder.mkdir()
        for parent in (folder, *folder.parents):  # pytest's folders are the owner's alone
            if parent.stat().st_uid == os.geteuid() and parent != Path("/"):
                parent.chmod(parent.stat().st_mode | 0o011)
        if os.geteuid() == 0:
            shutil.chown(folder, "nobody")
        command = ["initdb", "-D", str(folder / "data"), "-A", "trust", "-U", "prefect"]
        subprocess.run([*_unprivileged(), *command], check=True, capture_output=True, cwd="/")

    def start(self) -> None:
        command = ["postgres", "-D", str(self.folder / "data"), "-p", str(self.port)]
        command += ["-c", "listen_addresses=127.0.0.1", "-k", str(self.folder)]
        with (self.folder.parent / "postgres.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*_unprivileged(), *command], stdout=log, stderr=log, cwd="/"
            )
        ready = ["pg_ctl", "status", "-D", str(self.folder / "data")]
        deadline = time.monotonic() + 60
        while subprocess.run([*_unprivileged(), *ready], capture_output=True, cwd="/").returncode:
            assert time.monotonic() < deadline, "PostgreSQL does not start"
            time.sleep(0.2)

    def kill(self) -> None:
        """As a machine that loses its power."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(30)
            (self.folder / "data" / "postmaster.pid").unlink(missing_ok=True)


@contextmanager
def postgres(folder: Path) -> Iterator[Postgres]:
    """A server for the length of a block, or a skipped test where there is none."""
    missing = [name for name in ("postgres", "initdb", "pg_ctl") if not shutil.which(name)]
    if missing:
        pytest.skip(f"PostgreSQL is not installed: no {', '.join(missing)} on PATH")
    found = Postgres(folder)
    found.start()
    try:
        yield found
    finally:
        found.kill()
