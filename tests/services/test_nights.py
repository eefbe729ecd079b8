"""`make test-prefect`: a night that dies with its server, worker and database in any state of its
flow run must not keep the next one from starting, and a night that lives must go on.

Real servers, real kills, the intervals of deploy/: minutes a test, so only with REFINERY_SOAK=1.
"""

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from models.stylegan2.generator import Generator
from tasks.run.lease import hold
from tests.deploy.test_prefect_deployment import PREFECT_YAML, write_job
from tests.processes import wait_for
from tests.services.postgres import Postgres, postgres
from tests.services.prefect_site import ROOT, PrefectSite, end_leftovers, prefect_site, server

NEXT_NIGHT_S = 360.0
LEASE_S = 300.0
"""Of a flow run, fixed in Prefect; a client renews it after three quarters."""
COMPOSE = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())["services"]
STORAGE = "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif("REFINERY_SOAK" not in os.environ, reason="minutes each: REFINERY_SOAK=1"),
]


class Nights:
    """A Prefect site with the shipped deployment over five pictures."""

    def __init__(self, folder: Path, generator: Generator, pictures: list[bytes]) -> None:
        self.folder, self.number = folder, 0
        self.stack, self.processes = ExitStack(), ExitStack()
        source, config = write_job(folder, generator, pictures)
        self.common = {"input_uri": str(source), "config": str(config)}
        self.database: Postgres | None = None

    def open(self, database: str) -> None:
        settings = {STORAGE: COMPOSE["prefect-server"]["environment"][STORAGE]}
        if database == "postgresql":
            self.database = self.stack.enter_context(postgres())
            settings["PREFECT_SERVER_DATABASE_CONNECTION_URL"] = self.database.url
        self.site: PrefectSite = self.stack.enter_context(prefect_site(self.folder, **settings))
        self.start()
        shipped = yaml.safe_load(PREFECT_YAML.read_text())
        night = shipped["deployments"][0] | {"schedules": [], "parameters": self.common}
        file = self.folder / "prefect.yaml"
        file.write_text(yaml.safe_dump(shipped | {"deployments": [night]}))
        self.site.command("work-pool", "create", "refinery", "--type", "process")
        automations = str(ROOT / "deploy" / "automations.yaml")
        self.site.command("automation", "create", "--from-file", automations)
        self.site.command("deploy", "--all", "--prefect-file", str(file))
        self.deployment = self.site.api("/deployments/name/invert-dataset/nightly-inversion")["id"]

    def start(self) -> None:
        self.processes = ExitStack()
        self.server = self.processes.enter_context(server(self.site))

    def start_worker(self) -> None:
        arguments = ("worker", "start", "--pool", "refinery", "--type", "process")
        self.worker = self.processes.enter_context(self.site.running("worker", *arguments))

    def lose_everything(self) -> None:
        """The machine with server, worker, flow and database loses its power."""
        end_leftovers(self.folder / "prefect-home")
        self.processes.close()
        if self.database is not None:
            self.database.kill()
            self.database.start()

    def night(self, *sets: str) -> str:
        """A run of the deployment, now; its id."""
        self.number += 1
        output = str(self.folder / "runs" / f"{self.number}")
        parameters = {**self.common, "output_uri": output, "overrides": list(sets)}
        path = f"/deployments/{self.deployment}/create_flow_run"
        return self.site.api(path, {"parameters": parameters, "state": {"type": "SCHEDULED"}})["id"]

    def lease_s(self) -> float:
        """Seconds until the deployment's one lease ends; below zero, it may be taken."""
        (lease,) = (self.folder / "prefect-home" / "concurrency_leases").glob("*-*.json")
        ends = datetime.fromisoformat(json.loads(lease.read_text())["expiration"])
        return (ends - datetime.now(UTC)).total_seconds()

    def run(self, flow_run: str) -> dict[str, Any]:
        return self.site.api(f"/flow_runs/{flow_run}")

    def wait(self, flow_run: str, patience_s: float, *states: str) -> float:
        """Seconds until the run is in one of the states."""
        began = time.monotonic()
        wait_for(
            lambda: self.run(flow_run)["state_type"] in states,
            patience_s,
            f"{self.run(flow_run)['state_name']} to become {states}; {self.site.log('worker')}",
        )
        return time.monotonic() - began


LONG = "method=[{name='wplus', steps=100000}]"


@pytest.fixture(params=["sqlite", "postgresql"])
def nights(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    tiny_generator: Generator,
    face_bytes: list[bytes],
) -> Iterator[Nights]:
    found = Nights(tmp_path, tiny_generator, face_bytes)
    try:
        found.open(request.param)
        yield found
    finally:
        found.processes.close()
        found.stack.close()


def next_night(nights: Nights) -> float:
    """Server and worker start again; seconds until the next night of the deployment runs."""
    nights.start()
    nights.start_worker()
    following = nights.night()
    waited_s = nights.wait(following, NEXT_NIGHT_S, "RUNNING", "COMPLETED")
    nights.wait(following, 300, "COMPLETED")
    return waited_s


def test_everything_dies_while_a_night_runs(nights: Nights) -> None:
    nights.start_worker()
    lost = nights.night(LONG)
    nights.wait(lost, 300, "RUNNING")
    time.sleep(45)  # at least one heartbeat
    nights.lose_everything()
    waited_s = next_night(nights)
    assert nights.run(lost)["state_type"] == "CRASHED"
    note(nights, "running", waited_s)


def test_a_worker_dies_before_its_run_begins(nights: Nights) -> None:
    # What a worker does first; this one is then gone.
    lost = nights.night()
    state = {"state": {"type": "PENDING", "name": "Pending"}, "force": False}
    answer = nights.site.api(f"/flow_runs/{lost}/set_state", state)
    assert answer["status"] == "ACCEPT"
    nights.lose_everything()
    waited_s = next_night(nights)
    note(nights, "pending", waited_s)


@pytest.mark.parametrize(("renewal", "away_s"), [("first", 20), ("next", 120)])
def test_a_night_outlives_its_server(nights: Nights, renewal: str, away_s: float) -> None:
    """Away as it begins, so that the server forgets events; away long, as its lease is due."""
    run = nights.folder / "runs" / "1"
    nights.start_worker()
    # The night waits for this driver: it lives as long as it should, and costs nothing.
    with hold(str(run)):
        living = nights.night("engine.if_busy=wait")
        nights.wait(living, 300, "RUNNING")
        if renewal == "next":
            time.sleep(nights.lease_s() - LEASE_S / 4 - 5)
        os.killpg(nights.server.pid, signal.SIGKILL)
        time.sleep(away_s)
        nights.server = nights.processes.enter_context(server(nights.site))
        time.sleep(LEASE_S + 30)  # longer than any automation, renewal or grace
        assert nights.run(living)["state_type"] == "RUNNING", nights.site.log("worker")
        assert nights.lease_s() > 0
    nights.wait(living, 300, "COMPLETED")
    assert json.loads((run / "_SEALED.json").read_text())["rows"] == 5


def note(nights: Nights, state: str, waited_s: float) -> None:
    """For benchmarks/reliability.md."""
    if out := os.environ.get("REFINERY_SOAK_OUT"):
        database = "sqlite" if nights.database is None else "postgresql"
        with Path(out).open("a") as file:
            file.write(f"{database} {state} {waited_s:.0f}\n")
