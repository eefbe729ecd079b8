"""The Ray pool against actors that fail in every way; they load no models, so start quickly."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from models.errors import AssetError, LedgerError, RefineryError
from pipeline import pool as pool_module
from pipeline import pulse
from pipeline.actor import forwarded_environment, gpus_per_actor, new_actor
from pipeline.config import EngineConfig
from pipeline.pool import Pool, pool_size
from pipeline.pulse import Beat
from pipeline.schedule import Failure, Schedule
from pipeline.tally import Tally, TallySnapshot
from pipeline.worker import ShardResult, WorkOrder
from tasks.job import JobConfig, MethodConfig
from tasks.run.run_json import RunHandle
from tests.local_ray import shared_ray


class FakeActor:
    """Does shard n as its script says, and leaves a file for every attempt.

    The script travels in the run's URI: "<folder>|<shard>=<what>,...".
    """

    def __init__(self, environment: dict[str, str], threads: int) -> None:
        self.threads = threads

    def start(self, order: WorkOrder) -> str:
        folder, _, script = order.run.uri.partition("|")
        self.folder = Path(folder)
        self.script = dict(item.split("=") for item in script.split(",") if item)
        if self.script.get("start") == "asset":
            raise AssetError("no such checkpoint; name another")
        if self.script.get("start") == "die":
            os._exit(1)
        return f"pid {os.getpid()}"

    def beat(self) -> Beat:
        return Beat.here()

    def run(self, shard: int) -> ShardResult:
        attempt = len(list(self.folder.glob(f"{shard}.*")))
        (self.folder / f"{shard}.{attempt}.{os.getpid()}").touch()
        what = self.script.get(str(shard), "ok")
        if what == "die" or (what == "die-once" and attempt == 0):
            time.sleep(0.3)  # so that a neighbour is in flight
            os._exit(1)
        if what == "meet":  # ends when another worker is at work
            while len({path.suffix for path in self.folder.glob("*")}) < 2:
                time.sleep(0.05)
        time.sleep({"hang": 60, "nap": 4}.get(what, 0))
        self.dawdle(what, shard, attempt)
        if what == "stop-once" and attempt == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        if what == "raise":
            raise RuntimeError("unforeseen")
        if what == "fatal":
            return ShardResult(shard=shard, error="disk full", is_fatal=True)
        if what == "storage":
            return ShardResult(shard=shard, error="no answer", failure=Failure.STORAGE)
        return ShardResult(shard=shard, rows=10, failed=1)

    def dawdle(self, what: str, shard: int, attempt: int) -> None:
        if what == "slow-once" and attempt == 0:
            time.sleep(60)
            (self.folder / "late").touch()
        if what == "both-die-once":  # the first one when a second has begun, which goes on
            while len(list(self.folder.glob(f"{shard}.*"))) < 2:
                time.sleep(0.05)
            if attempt == 0:
                os._exit(1)
            time.sleep(2)


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    # Workers cannot import a test module: send its classes by value.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with shared_ray():
        yield
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


class Booked:
    """A pool over fake actors, and what it told the ledger."""

    def __init__(self, folder: Path, num_shards: int, script: str = "", **engine: Any) -> None:
        settings = {"actors": 1, "retry_wait_s": 0.1, "max_attempts": 2} | engine
        self.engine = EngineConfig(**settings)
        self.tries = dict[int, int]()
        self.folder, self.reasons = folder, dict[int, str]()
        self.snapshots: list[TallySnapshot] = []
        self.tally = Tally(
            schedule=Schedule(
                range(num_shards),
                max_attempts=self.engine.max_attempts,
                retry_wait_s=self.engine.retry_wait_s,
                patience_s=self.engine.patience_s,
            ),
            quarantine=self.quarantine,
            shards_total=num_shards,
            rows_total=10 * num_shards,
            on_progress=self.snapshots.append,
        )
        run = RunHandle(uri=f"{folder}|{script}", run_id="r")
        job = JobConfig(generator="none", methods=(MethodConfig(name="e4e"),))
        order = WorkOrder(job=job, run=run, hashes={}, device="cpu", threads=self.engine.threads)
        self.pool = Pool(order, self.engine, 0.0, self.tally, actor_class=FakeActor)

    def quarantine(self, shard: int, reason: str, attempts: int) -> None:
        self.reasons[shard], self.tries[shard] = reason, attempts

    def attempts(self, shard: int) -> int:
        return len(list(self.folder.glob(f"{shard}.*")))


def test_a_ray_of_ours_has_no_helpers() -> None:
    """`ray.init` waits for them."""
    from ray._private import worker

    assert {"raylet", "gcs_server"} <= set(worker._global_node.all_processes)
    helpers = {"monitor", "log_monitor", "dashboard"}
    assert not helpers & set(worker._global_node.all_processes)


def test_every_shard_once(tmp_path: Path) -> None:
    booked = Booked(tmp_path, 7, actors=2)
    booked.pool.run()
    assert [booked.attempts(shard) for shard in range(7)] == [1] * 7
    last = booked.snapshots[-1]
    assert (last.shards_done, last.rows_done, last.rows_failed) == (7, 70, 7)
    assert last.eta_s == 0.0
    assert booked.reasons == {}


def test_a_shard_that_kills_its_worker_is_given_up_and_its_neighbours_are_not(
    tmp_path: Path,
) -> None:
    booked = Booked(tmp_path, 6, "2=die", shards_in_flight=3, max_attempts=2)
    booked.pool.run()
    assert set(booked.reasons) == {2}
    assert booked.reasons[2].startswith("the worker died while it held this shard (")
    assert booked.tries == {2: 2}
    assert booked.attempts(2) == 2
    assert booked.tally.shards_done == 5
    assert booked.tally.rows_done == 50


def test_a_worker_that_dies_once_costs_nothing(tmp_path: Path) -> None:
    booked = Booked(tmp_path, 3, "1=die-once")
    booked.pool.run()
    assert (booked.tally.shards_done, booked.reasons) == (3, {})
    assert booked.attempts(1) == 2
    pids = {path.suffix for path in tmp_path.glob("*")}
    assert len(pids) == 2


def test_a_shard_that_hangs_is_stopped(tmp_path: Path) -> None:
    booked = Booked(tmp_path, 3, "0=hang", shard_timeout_s=1.5, max_attempts=1)
    booked.pool.run()
    assert booked.reasons == {0: "finished no batch within engine.shard_timeout_s = 1.5 s"}
    assert booked.tally.shards_done == 2


@pytest.mark.parametrize("what", ["slow-once", "both-die-once"])
def test_a_straggler_is_done_by_an_idle_worker_too(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "STRAGGLER_S", 2.0)
    booked = Booked(tmp_path, 4, f"0={what}", actors=2, shards_in_flight=1, max_attempts=1)
    booked.pool.run()
    assert (booked.attempts(0), [booked.attempts(n) for n in (1, 2, 3)]) == (2, [1, 1, 1])
    assert (booked.tally.shards_done, booked.tally.rows_done, booked.reasons) == (4, 40, {})
    assert not (tmp_path / "late").exists()  # nobody waited for it


def test_a_straggler_is_left_alone_where_that_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "STRAGGLER_S", 0.0)
    booked = Booked(tmp_path, 3, "0=nap", actors=2, shards_in_flight=1, straggler_factor=0)
    booked.pool.run()
    assert [booked.attempts(shard) for shard in range(3)] == [1, 1, 1]


def test_a_stopped_worker_is_noticed_by_its_silence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pulse, "BEAT_INTERVAL_S", 0.5)
    booked = Booked(tmp_path, 3, "1=stop-once", shard_timeout_s=7200, heartbeat_s=5)
    booked.pool.run()
    assert (booked.tally.shards_done, booked.reasons) == (3, {})
    assert booked.attempts(1) == 2
    assert "shard=00001 its worker gave no sign of life for " in caplog.text
    stopped = next(tmp_path.glob("1.0.*")).suffix.removeprefix(".")
    assert not Path(f"/proc/{stopped}").exists()


def test_a_worker_that_only_computes_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulse, "BEAT_INTERVAL_S", 0.2)
    booked = Booked(tmp_path, 1, "0=nap", heartbeat_s=2)
    booked.pool.run()
    assert booked.attempts(0) == 1


def test_errors_are_retried_then_quarantined_with_their_reason(tmp_path: Path) -> None:
    booked = Booked(tmp_path, 3, "1=raise", max_attempts=3)
    booked.pool.run()
    assert booked.reasons == {1: "RuntimeError: unforeseen"}
    assert booked.tries == {1: 3}
    assert booked.attempts(1) == 3
    assert booked.tally.shards_done == 2


@pytest.mark.parametrize(
    ("script", "error", "message"),
    [
        ("start=asset", AssetError, "no such checkpoint; name another"),
        ("1=fatal", RefineryError, "disk full"),
    ],
)
def test_what_cannot_go_on_stops_the_run(
    tmp_path: Path, script: str, error: type[Exception], message: str
) -> None:
    booked = Booked(tmp_path, 2, script)
    with pytest.raises(error, match=message):
        booked.pool.run()
    assert booked.reasons == {}


def test_storage_that_stays_away_ends_the_run_within_patience(tmp_path: Path) -> None:
    booked = Booked(tmp_path, 1, "0=storage", max_attempts=1)
    booked.tally.schedule = Schedule([0], max_attempts=1, retry_wait_s=0.1, patience_s=0.3)
    with pytest.raises(LedgerError, match="no answer"):
        booked.pool.run()
    assert booked.attempts(0) > 2
    assert booked.reasons == {}


def test_no_worker_within_patience(tmp_path: Path) -> None:
    booked = Booked(tmp_path, 2, threads=64, patience_s=0.5)
    with pytest.raises(RefineryError, match=r"no worker came up within 0 s: 1 actors want 64 CPU"):
        booked.pool.run()


def test_workers_that_die_as_they_start_are_told(tmp_path: Path) -> None:
    booked = Booked(tmp_path, 2, "start=die", patience_s=4)
    told = r"no worker came up within 4 s: .* the last one that started ended: .*(died|unavailable)"
    with pytest.raises(RefineryError, match=told):
        booked.pool.run()
    assert booked.reasons == {}


def test_the_pool_grows_when_nodes_join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = iter([1, 1])
    monkeypatch.setattr(pool_module, "GROW_INTERVAL_S", 0.05)
    monkeypatch.setattr(pool_module, "pool_size", lambda *_: next(sizes, 2))
    booked = Booked(tmp_path, 2, "0=meet,1=meet", shards_in_flight=1)
    booked.pool.run()
    assert booked.tally.shards_done == 2
    assert len({path.suffix for path in tmp_path.glob("*")}) == 2


def test_the_first_worker_may_be_there_already(tmp_path: Path) -> None:
    booked = Booked(tmp_path, 2, actors=2, shards_in_flight=1)
    there = new_actor(booked.engine, 0.0, FakeActor)
    booked.pool._first = there
    booked.pool.run()
    assert booked.tally.shards_done == 2
    first, second = booked.pool._slots
    assert first.actor is there
    assert second.actor is not there


def test_no_more_workers_than_shards(tmp_path: Path) -> None:
    booked = Booked(tmp_path, 2, actors=4)
    booked.pool.run()
    assert booked.tally.shards_done == 2
    assert len(booked.pool._slots) == 2


def test_nobody_reads_ahead_while_another_has_nothing(tmp_path: Path) -> None:
    limits = {"shards_in_flight": 2, "shard_timeout_s": 60, "max_attempts": 1}
    booked = Booked(tmp_path, 2, "0=meet,1=meet", actors=2, **limits)
    booked.pool.run()
    assert (booked.tally.shards_done, booked.reasons) == (2, {})
    assert len({path.suffix for path in tmp_path.glob("*")}) == 2


def test_sizes() -> None:
    auto = EngineConfig()
    assert pool_size(auto, 0.0, {"CPU": 8.0}) == 8
    assert pool_size(EngineConfig(threads=3), 0.0, {"CPU": 8.0}) == 2
    assert pool_size(auto, 1.0, {"CPU": 8.0, "GPU": 4.0}) == 4
    assert pool_size(auto, 0.25, {"CPU": 8.0, "GPU": 2.0}) == 8
    assert pool_size(auto, 1.0, {"CPU": 8.0}) == 1  # waits for a GPU node
    assert pool_size(EngineConfig(actors=3), 1.0, {}) == 3
    assert gpus_per_actor(auto, {"CPU": 2.0}) == 0.0
    assert gpus_per_actor(auto, {"GPU": 2.0}) == 1.0
    assert gpus_per_actor(EngineConfig(gpus_per_actor=0.5), {}) == 0.5


def test_workers_fit_into_the_memory_of_the_machine() -> None:
    node = {"CPU": 8.0, "memory": 14e9, "object_store_memory": 6e9}
    assert pool_size(EngineConfig(), 0.0, node, memory_bytes=4 * 10**9) == 4  # 0.9 * 20 / 4
    assert pool_size(EngineConfig(), 0.0, node, memory_bytes=10**9) == 8
    assert pool_size(EngineConfig(), 0.0, node, memory_bytes=10**11) == 1
    assert pool_size(EngineConfig(actors=6), 0.0, node, memory_bytes=4 * 10**9) == 6
    assert pool_size(EngineConfig(), 1.0, {**node, "GPU": 2.0}, memory_bytes=10**11) == 2


def test_only_our_variables_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFINERY_X", "1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    assert forwarded_environment()["REFINERY_X"] == "1"
    assert not any(name.startswith("AWS") for name in forwarded_environment())
