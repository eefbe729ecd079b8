"""deploy/prefect.yaml against a real Prefect server on loopback: accepted, scheduled, completed.

The server, the worker and every command get a private PREFECT_HOME and a free port, so a Prefect
that already runs on the machine is neither seen nor touched.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from models.checkpoints.native import save_generator
from models.stylegan2.generator import Generator

ROOT = Path(__file__).resolve().parents[2]
PREFECT_YAML = ROOT / "deploy" / "prefect.yaml"
PREFECT = [sys.executable, "-m", "prefect", "--no-prompt"]

CONFIG = """
generator = {generator!r}
perceptual = "none"
batch = 4

[[method]]
name = "wplus"
steps = 1

[engine]
kind = "inline"
shard_size = 4
"""


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
        with urllib.request.urlopen(request, timeout=10) as response:
            return json.load(response)

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


@pytest.fixture
def site(tmp_path: Path) -> Iterator[PrefectSite]:
    port = free_port()
    home = tmp_path / "prefect-home"
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
    found = PrefectSite(f"http://127.0.0.1:{port}/api", env, tmp_path)
    arguments = ("server", "start", "--host", "127.0.0.1", "--port", str(port))
    with found.running("server", *arguments) as server:
        deadline = time.monotonic() + 180
        while True:
            assert server.poll() is None, found.log("server")
            try:
                assert found.api("/health") is True
                break
            except OSError:
                assert time.monotonic() < deadline, found.log("server")
                time.sleep(0.3)
        yield found
    end_leftovers(home)


def wait_for_run(site: PrefectSite, deployment_id: str, patience_s: float) -> dict[str, Any]:
    """The first finished run of a deployment."""
    query = {"deployments": {"id": {"any_": [deployment_id]}}, "sort": "EXPECTED_START_TIME_ASC"}
    deadline = time.monotonic() + patience_s
    while True:
        runs = site.api("/flow_runs/filter", query)
        finished = [r for r in runs if r["state_type"] in {"COMPLETED", "FAILED", "CRASHED"}]
        if finished:
            return finished[0]
        assert time.monotonic() < deadline, (
            f"no run finished in {patience_s} s; states {[r['state_name'] for r in runs]}\n"
            f"worker: {site.log('worker')}"
        )
        time.sleep(0.5)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_scheduled_run_of_the_shipped_deployment_completes(
    site: PrefectSite, tmp_path: Path, tiny_generator: Generator, face_bytes: list[bytes]
) -> None:
    # The file as it is shipped is accepted.
    shipped = yaml.safe_load(PREFECT_YAML.read_text())
    pool = shipped["deployments"][0]["work_pool"]["name"]
    site.command("work-pool", "create", pool, "--type", "process")
    site.command("deploy", "--all", "--prefect-file", str(PREFECT_YAML))
    nightly = site.api("/deployments/name/invert-dataset/nightly-inversion")
    assert nightly["entrypoint"] == shipped["deployments"][0]["entrypoint"]
    assert nightly["parameters"] == shipped["deployments"][0]["parameters"]
    assert nightly["concurrency_options"]["collision_strategy"] == "ENQUEUE"
    assert nightly["global_concurrency_limit"]["limit"] == 1
    assert [s["schedule"]["cron"] for s in nightly["schedules"]] == ["30 1 * * *"]
    assert [s["schedule"]["timezone"] for s in nightly["schedules"]] == ["Etc/UTC"]
    for flow, name in (
        ("nightly-domains", "nightly-domains"),
        ("adapt-domain", "adapt"),
        ("edit-dataset", "edit"),
        ("fit-directions", "directions"),
    ):
        found = site.api(f"/deployments/name/{flow}/{name}")
        (wanted,) = (d for d in shipped["deployments"] if d["name"] == name)
        assert found["parameters"] == wanted.get("parameters", {})
        assert found["parameter_openapi_schema"]["properties"].keys() >= found["parameters"].keys()
        assert not [s for s in found["schedules"] if s["active"]]

    # The same file, with a small job and a schedule that is due in a moment.
    pictures, run = tmp_path / "pictures", tmp_path / "run"
    pictures.mkdir()
    for index, data in enumerate(face_bytes[:5]):
        (pictures / f"{index}.png").write_bytes(data)
    save_generator(tiny_generator, tmp_path / "tiny.safetensors", {})
    config = tmp_path / "config.toml"
    config.write_text(CONFIG.format(generator=str(tmp_path / "tiny.safetensors")))
    soon = shipped["deployments"][0] | {
        "parameters": {
            "input_uri": str(pictures),
            "output_uri": str(run),
            "config": str(config),
        },
        "schedules": [
            {
                # The second firing is for a machine so busy that it misses the first.
                "interval": 45,
                "anchor_date": (datetime.now(UTC) + timedelta(seconds=10)).isoformat(),
                "slug": "soon",
            }
        ],
    }
    soon_yaml = tmp_path / "prefect.yaml"
    soon_yaml.write_text(yaml.safe_dump(shipped | {"deployments": [soon]}))
    # As compose.yaml does it: one parameter from the command line, the others from the file.
    site.command(
        *("deploy", "--name", "nightly-inversion", "--prefect-file", str(soon_yaml)),
        *("--param", 'overrides=["seed=7"]'),
    )
    changed = site.api("/deployments/name/invert-dataset/nightly-inversion")
    assert changed["id"] == nightly["id"]
    assert changed["parameters"]["overrides"] == ["seed=7"]
    assert changed["parameters"]["input_uri"] == str(pictures)

    arguments = ("worker", "start", "--pool", pool, "--type", "process")
    with site.running("worker", *arguments):
        finished = wait_for_run(site, nightly["id"], patience_s=300)
    assert finished["state_type"] == "COMPLETED", site.log("worker")
    assert finished["auto_scheduled"] is True
    sealed = json.loads((run / "_SEALED.json").read_text())
    assert (sealed["rows"], sealed["failed"], sealed["num_shards"]) == (5, 0, 2)
    assert json.loads((run / "run.json").read_text())["config"]["seed"] == 7
