"""The kinds of job, one line each."""

import importlib
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from tasks.job import Job
from tasks.run.ledger import read_declared, read_run

if TYPE_CHECKING:
    from tasks.work.station import Station

KINDS = {
    "invert": ("tasks.job:JobConfig", "tasks.work.invert:Inverter"),
    "edit": ("tasks.edit_job:EditJobConfig", "tasks.work.edit:Editor"),
}
"""Job and station by name."""


def station_class(kind: str) -> "type[Station]":
    """Where jobs of a kind are done."""
    return _load(KINDS[kind][1])


def load_station(job: Job, device: str, threads: int = 1) -> "Station":
    """Build the job's generator and all it needs on a device; `hashes` names every weight.

    Raises:
        AssetError, ConfigError: weights are missing or wrong, or a setting does not fit them.
    """
    return station_class(job.kind)(job, device, threads=threads)


def load_job(run_uri: str) -> Job:
    """The job that a run was started with.

    Raises:
        LedgerError: there is no run at this place, or its run.json is damaged.
    """
    kind = read_declared(run_uri).kind
    config = {k: v for k, v in read_run(run_uri)["config"].items() if k != "kind"}
    return TypeAdapter(_load(KINDS[kind][0])).validate_python(config)


def _load(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)
