"""`refinery invert` while its Ray, a node of its cluster, its workers or itself are killed."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from pipeline.ray_session import LOOPBACK, OBJECT_STORE_BYTES
from tasks.run.ledger import committed
from tests.e2e.small_dataset import NUM_SHARDS, Dataset, fingerprint, rows, run_inline
from tests.processes import below, command_line, named, send, wait_for

SLOW = "method=[{name='wplus', steps=400, perceptual='none'}]"
"""Some seconds a shard: time to aim."""


@pytest.fixture(scope="module")
def slow_run(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What the disturbed runs must equal."""
    run = str(tmp_path_factory.mktemp("slow") / "run")
    assert run_inline(dataset, run, SLOW).is_clean
    return run


class Driver:
    """A running `refinery invert` with one actor and a Ray of its own."""

    def __init__(self, dataset: Dataset, run: str, log: Path, *sets: str) -> None:
        settings = ["engine.actors=1", "engine.shards_in_flight=1", SLOW, *sets]
        command = [sys.executable, "-m", "pipeline.cli", "invert", dataset.source, run, "--no-flow"]
        command += ["--config", dataset.config, *(f"--set={item}" for item in settings)]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        self.run, self.log = run, log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command, env=environment, stdout=file, stderr=file, start_new_session=True
            )

    def wait_for_commits(self, number: int) -> None:
        def is_there() -> bool:
            assert self.process.poll() is None, self.said
            return len(committed(self.run)) >= number

        wait_for(is_there, 240, f"commit {number}")

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def end(self) -> None:
        family = [*below(self.process.pid), self.process.pid]
        send(family, signal.SIGKILL)
        self.process.wait(30)


@pytest.fixture
def driver(dataset: Dataset, tmp_path: Path) -> Iterator[Driver]:
    found = Driver(dataset, str(tmp_path / "run"), tmp_path / "log")
    yield found
    found.end()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_raylet_killed_then_driver(
    driver: Driver, dataset: Dataset, slow_run: str, tmp_path: Path
) -> None:
    pid = driver.process.pid
    driver.wait_for_commits(1)
    send(named(pid, "raylet"), signal.SIGKILL)
    wait_for(lambda: "starting Ray again" in driver.said, 90, "the loss is noticed")
    assert "Ray's raylet (pid " in driver.said
    driver.wait_for_commits(3)  # the next Ray works

    family = below(pid)
    workers = named(pid, "ray::")
    assert workers
    send(workers[:1], signal.SIGSTOP)  # it cannot even see that its parents are gone
    driver.process.kill()
    driver.process.wait(30)
    wait_for(lambda: not any(map(command_line, family)), 10, f"the end of all of {family}")

    assert run_inline(dataset, driver.run, SLOW).is_clean
    assert fingerprint(driver.run) == fingerprint(slow_run)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("daemon", ["raylet", "gcs_server"])
def test_a_daemon_of_ray_is_lost(
    daemon: str, sign: signal.Signals, driver: Driver, slow_run: str
) -> None:
    driver.wait_for_commits(1)
    send(named(driver.process.pid, daemon), sign)
    assert driver.process.wait(240) == 0, driver.said
    assert f"Ray's {daemon} (pid " in driver.said
    assert fingerprint(driver.run) == fingerprint(slow_run)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_ray_that_dies_again_and_again_ends_the_run_with_the_reason(driver: Driver) -> None:
    pid = driver.process.pid
    for _ in range(3):
        driver.wait_for_commits(0)
        wait_for(lambda: named(pid, "raylet"), 120, "a raylet")
        (raylet,) = named(pid, "raylet")
        wait_for(lambda: named(pid, "ray::PoolActor"), 120, "its worker")
        send([raylet], signal.SIGKILL)
        wait_for(lambda: not command_line(raylet), 60, "its end")  # noqa: B023
    assert driver.process.wait(120) == 2, driver.said
    assert "3 times without a commit in between" in driver.said
    assert "gpus_per_actor" not in driver.said
    assert "Traceback" not in driver.said


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head without a place for workers."""
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    sigterm = signal.getsignal(signal.SIGTERM)  # a node in this process would answer it
    found = Cluster()
    try:
        add_node(found, num_cpus=0, include_dashboard=False)
        yield found
    finally:
        found.shutdown()
        signal.signal(signal.SIGTERM, sigterm)


def add_node(cluster: Cluster, **settings: Any) -> Any:
    memory = OBJECT_STORE_BYTES
    return cluster.add_node(node_ip_address=LOOPBACK, object_store_memory=memory, **settings)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_nodes_of_a_cluster_join_and_die(
    cluster: Cluster, dataset: Dataset, tmp_path: Path
) -> None:
    first = add_node(cluster, num_cpus=1)
    raylet = first.all_processes["raylet"][0].process.pid
    method = SLOW.replace("400", "100")
    # A stopped worker keeps its shard: the node is to die with it.
    sets = [method, "engine.actors=auto", "engine.heartbeat_s=600", "engine.straggler_factor=0"]
    run, log, calm = str(tmp_path / "run"), tmp_path / "log", str(tmp_path / "calm")
    driver = Driver(dataset, run, log, f"engine.address={cluster.address}", *sets)
    try:
        driver.wait_for_commits(1)
        (worker,) = named(raylet, "ray::PoolActor")
        send([worker], signal.SIGSTOP)
        before = len(committed(run))
        add_node(cluster, num_cpus=1)
        driver.wait_for_commits(before + 2)  # by the second node
        cluster.remove_node(first, allow_graceful=False)
        send([worker], signal.SIGKILL)
        assert len(committed(run)) < NUM_SHARDS
        assert driver.process.wait(240) == 0, driver.said
    finally:
        driver.end()
    assert run_inline(dataset, calm, method).is_clean
    assert fingerprint(run) == fingerprint(calm)
    assert rows(run).equals(rows(calm))
