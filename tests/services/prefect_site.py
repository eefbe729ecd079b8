"""A Prefect server, workers and commands with a private PREFECT_HOME and a free port, so that a
Prefect that already runs on the machine is neither seen nor touched."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PREFECT = [sys.executable, "-m", "prefect", "--no-prompt"]


@dataclass(frozen=True)
class PrefectSite:
    """A server's address and the environment in which commands and workers talk to it."""

    api_url: str
    env: dict[str, str]
    logs: Path

    def api(self, path: str, body: dict[str, Any] | None = None) -> Any:
        request = urllib.request.Request(
            self.api_url + path,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        for attempt in range(20):
            try:
                with urllib.request.urlopen(request, timeout=30) as response:
                    return json.load(response)
            except urllib.error.HTTPError as error:  # busy, as it says itself
                if error.code != 503 or attempt == 19:
                    raise
                time.sleep(1)
        raise AssertionError

    def command(self, *args: str) -> str:
        done = subprocess.run(
            [*PREFECT, *args],
            env=self.env,
            cwd=self.logs,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, f"prefect {args}: {done.stdout}{done.stderr}"
        return done.stdout

    @contextmanager
    def running(self, name: str, *args: str) -> Iterator[subprocess.Popen[bytes]]:
        """A Prefect process that ends with the block, and its children with it."""
        with (self.logs / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [*PREFECT, *args],
                env=self.env,
                cwd=self.logs,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                yield process
            finally:
                end_group(process)

    def log(self, name: str) -> str:
        return (self.logs / f"{name}.log").read_text(errors="replace")[-5000:]


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End the process group that this test started: politely, then surely."""
    for sign, patience_s in ((signal.SIGTERM, 10), (signal.SIGKILL, 10)):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            break
        try:
            process.wait(patience_s)
        except subprocess.TimeoutExpired:
            continue
    process.wait(10)


def end_leftovers(home: Path) -> None:
    """A worker starts flow runs in sessions of their own; all carry our private PREFECT_HOME."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"PREFECT_HOME={home}\0".encode() in (folder / "environ").read_bytes():
                os.kill(int(folder.name), signal.SIGKILL)
        except (OSError, ValueError):
            continue  # it ended meanwhile, or is not ours to read


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@contextmanager
def prefect_site(folder: Path, **settings: str) -> Iterator[PrefectSite]:
    """A site without any process of it running yet.

    Args:
        settings: further variables of all its processes.
    """
    port = free_port()
    home = folder / "prefect-home"
    home.mkdir()
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    env = inherited | {
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "1",
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "PREFECT_WORKER_PREFETCH_SECONDS": "0",
        "DO_NOT_TRACK": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
        # The package under test, also where it is not installed.
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    found = PrefectSite(f"http://127.0.0.1:{port}/api", env | settings, folder)
    try:
        yield found
    finally:
        end_leftovers(home)


@contextmanager
def server(site: PrefectSite) -> Iterator[subprocess.Popen[bytes]]:
    """The site's server, answering; it may be started again after its end."""
    port = site.api_url.removesuffix("/api").rpartition(":")[2]
    arguments = ("server", "start", "--host", "127.0.0.1", "--port", port)
    with site.running("server", *arguments) as process:
        deadline = time.monotonic() + 360
        while True:
            assert process.poll() is None, site.log("server")
            try:
                assert site.api("/health") is True
                break
            except OSError:
                assert time.monotonic() < deadline, site.log("server")
                time.sleep(0.3)
        yield process


def wait_for_run(
    site: PrefectSite,
    deployment_id: str,
    patience_s: float,
    states: tuple[str, ...] = ("COMPLETED", "FAILED", "CRASHED"),
) -> dict[str, Any]:
    """The first run of a deployment that is in one of the states; by default, that is finished."""
    query = {"deployments": {"id": {"any_": [deployment_id]}}, "sort": "EXPECTED_START_TIME_ASC"}
    deadline = time.monotonic() + patience_s
    while True:
        runs = site.api("/flow_runs/filter", query)
        finished = [r for r in runs if r["state_type"] in states]
        if finished:
            return finished[0]
        assert time.monotonic() < deadline, (
            f"no run finished in {patience_s} s; states {[r['state_name'] for r in runs]}\n"
            f"worker: {site.log('worker')}"
        )
        time.sleep(0.5)
