"""The worker as a Ray actor, made before anybody knows what it will do.

    actor process:  up, imports ------ start(order): loads the models ------ run(shard) ...
    driver:         config, plan ----------^

A process needs seconds to be up and to import PyTorch, so a driver that starts its own Ray makes
the first actor as soon as Ray is there, while it still plans (`pipeline.ray_session`).
"""

import importlib
import logging
import os
from collections.abc import Mapping
from threading import Thread
from typing import Any

import ray

from pipeline.config import EngineConfig
from pipeline.pulse import Beat, die_with_parent
from pipeline.start import spare_pandas
from pipeline.worker import ShardResult, ShardWorker, WorkOrder

FORWARDED_PREFIX = "REFINERY_"


class PoolActor:
    """Its constructor cannot fail, so Ray always restarts it; the driver then starts it again.

    Args:
        environment: variables for the process.
        threads: CPU threads of PyTorch, which reads them once.
    """

    def __init__(self, environment: dict[str, str], threads: int) -> None:
        die_with_parent()
        os.environ.update(environment)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        spare_pandas()
        logging.basicConfig(
            level=logging.WARNING, format="%(levelname)s %(name)s pid=%(process)d %(message)s"
        )
        self._worker: ShardWorker | None = None
        # In a thread: a slow disk must not keep the process from answering heartbeats.
        Thread(target=importlib.import_module, args=("tasks.work.shard",), daemon=True).start()

    def start(self, order: WorkOrder) -> str:
        """Load the order's models; as `ShardWorker.start`."""
        self._worker = ShardWorker(order)
        return self._worker.start()

    def run(self, shard: int) -> ShardResult:
        """One attempt at one shard; as `ShardWorker.run`."""
        assert self._worker is not None, "run() before start()"
        return self._worker.run(shard)

    def beat(self) -> Beat:
        """How far this worker's shards are."""
        return Beat.here(self._worker.progress() if self._worker else ())


def new_actor(engine: EngineConfig, gpus: float, actor_class: type = PoolActor) -> Any:
    """An actor that Ray restarts for ever.

    Args:
        gpus: of one actor; a fraction shares a GPU.
    """
    return (
        ray.remote(actor_class)
        .options(
            num_cpus=cpus_per_actor(engine, gpus),
            num_gpus=gpus,
            max_restarts=-1,
            max_task_retries=0,
            # Shards overlap in threads; one more answers start() after a restart, one beat().
            max_concurrency=engine.shards_in_flight + 2,
        )
        .remote(forwarded_environment(), engine.threads)
    )


def first_actor(engine: EngineConfig) -> Any:
    """One for a Ray that has just come up, as `new_actor` would make it for a run."""
    return new_actor(engine, gpus_per_actor(engine, ray.cluster_resources()))


def cpus_per_actor(engine: EngineConfig, gpus: float) -> int:
    """Whoever holds a GPU computes there."""
    return engine.threads if gpus == 0 else 1


def gpus_per_actor(engine: EngineConfig, resources: Mapping[str, float]) -> float:
    """The setting, or with "auto" a whole GPU where the cluster has any."""
    if engine.gpus_per_actor != "auto":
        return engine.gpus_per_actor
    return 1.0 if resources.get("GPU", 0.0) >= 1 else 0.0


def forwarded_environment() -> dict[str, str]:
    """Our own variables go to the workers; credentials belong to the environment of each node."""
    return {k: v for k, v in os.environ.items() if k.startswith(FORWARDED_PREFIX)}
