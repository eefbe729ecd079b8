"""The kinds of job, one line each. Nothing heavy is loaded with the table."""

import importlib
from typing import TYPE_CHECKING, Any, NamedTuple

from models.errors import LedgerError
from tasks.job import Job

if TYPE_CHECKING:
    from tasks.work.station import Station


class Kind(NamedTuple):
    """Where a kind's job and station are, and what it does, as the command line says it."""

    job: str
    station: str
    summary: str


KINDS = {
    "invert": Kind("tasks.job:JobConfig", "tasks.work.invert:Inverter", "Invert every picture."),
    "edit": Kind("tasks.edit_job:EditJobConfig", "tasks.work.edit:Editor", "Edit stored samples."),
    "rescore": Kind(
        "tasks.work.rescore:RescoreJob",
        "tasks.work.rescore:Rescorer",
        "Score the stored pictures of RUN again into the run OUT, with other metrics or networks.",
    ),
    "index": Kind(
        "tasks.work.index:IndexJob",
        "tasks.work.index:Indexer",
        "Index the samples of RUN for `similar` and `duplicates`.",
    ),
    "compose": Kind(
        "tasks.work.compose:ComposeJob",
        "tasks.work.compose:Composer",
        "Put the faces of RUN back into their photographs, as files in the run OUT.",
    ),
}


def job_class(kind: str) -> type[Job]:
    """What a job of a kind says."""
    return _load(KINDS[kind].job)


def station_class(kind: str) -> "type[Station]":
    """Where jobs of a kind are done."""
    return _load(KINDS[kind].station)


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
    from pydantic import TypeAdapter, ValidationError

    from tasks.run.run_json import declared_by, read_run

    record = read_run(run_uri)
    kind = declared_by(record, run_uri).kind
    config = {k: v for k, v in record["config"].items() if k != "kind"}
    try:
        return TypeAdapter(job_class(kind)).validate_python(config)
    except (ValidationError, KeyError) as problem:
        first = " ".join(str(problem).split())[:200]
        raise LedgerError(
            f"{run_uri}/run.json: damaged, its config is of no {kind} job ({first}); restore it "
            "from a copy, or start again in another output folder"
        ) from problem


def _load(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)
