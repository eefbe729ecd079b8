"""What a worker does with a shard, whichever kind of job it is of."""

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from tasks.edit_job import EditJobConfig
from tasks.job import ShardSpec
from tasks.run.ledger import Job, RunHandle
from tasks.run.marker import Marker

if TYPE_CHECKING:
    from tasks.work.edit import Editor
    from tasks.work.invert import Inverter

    Machine = Inverter | Editor


def load_machine(job: Job, device: str, threads: int = 1) -> "Machine":
    """Build the job's generator and all it needs on a device; `hashes` names every weight.

    Raises:
        AssetError, ConfigError: weights are missing or wrong, or a setting does not fit them.
    """
    if isinstance(job, EditJobConfig):
        from tasks.work.edit import Editor

        return Editor(job, device, threads=threads)
    from tasks.work.invert import Inverter

    return Inverter(job, device, threads=threads)


def do_shard(
    spec: ShardSpec,
    job: Job,
    run: RunHandle,
    machine: "Machine",
    lock: AbstractContextManager[object] | None = None,
) -> Marker:
    """Do one shard and commit it: see `run_shard` and `edit_shard`."""
    if isinstance(job, EditJobConfig):
        from tasks.work.edit_shard import edit_shard

        return edit_shard(spec, job, run, machine, lock)  # type: ignore[arg-type]
    from tasks.work.shard import run_shard

    return run_shard(spec, job, run, machine, lock)  # type: ignore[arg-type]
