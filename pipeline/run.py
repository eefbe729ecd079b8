"""One run, stage by stage: plan -> run -> seal -> verify -> report.

Plain functions over the run directory. The command line, the Prefect flow and a notebook call the
same ones; each stage starts from what the one before it left in storage, so each can be repeated.
"""

import gc
import importlib
import importlib.metadata
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from threading import Thread
from typing import TYPE_CHECKING, Any, TypeVar

from models.errors import ConfigError, LedgerError
from pipeline.config import EngineConfig, RunConfig
from pipeline.faults import patiently
from pipeline.forecaster import Forecaster
from pipeline.metadata import metadata_kept
from pipeline.run_log import kept_log
from pipeline.schedule import Schedule
from pipeline.tally import OnProgress, Tally, TallySnapshot, ignore_progress
from pipeline.worker import WorkOrder, that_fit
from tasks.job import THUMBNAIL_PX, Job
from tasks.run import ledger, manifest, run_json
from tasks.run.lease import hold
from tasks.run.metadata import write_metadata
from tasks.run.prediction import drop_prediction_of_other, prediction_for, read_prediction
from tasks.run.update import check_settings, plan_update
from tasks.storage.files import exists, join
from tasks.work.kinds import load_job, load_station, station_class

if TYPE_CHECKING:
    from tasks.report.forecast import Forecast
    from tasks.work.station import Station

J = TypeVar("J", bound=Job)
logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What stands in the run after the work.

    Attributes:
        rows, failed: over all commits.
        rows_now, seconds: of this driver alone, from the first worker being ready.
        startup_s: until then: engine, model loading.
        quarantined: reason by shard.
    """

    run_uri: str
    num_shards: int
    rows: int
    failed: int
    rows_now: int
    seconds: float
    startup_s: float
    quarantined: dict[int, str] = field(default_factory=dict)

    @property
    def images_per_s(self) -> float:
        return self.rows_now / self.seconds if self.seconds > 0 else 0.0


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The end of a run: the outcome, what verification found, where the report is.

    Attributes:
        warning: pictures do not look aligned.
        forecast: what was predicted, beside what the run took.
    """

    outcome: Outcome
    problems: tuple[str, ...]
    report_uri: str
    warning: str | None = None
    forecast: tuple["Forecast", ...] = ()

    @property
    def is_clean(self) -> bool:
        """Nothing quarantined, nothing wrong. Failed rows are rows, and clean."""
        return not self.outcome.quarantined and not self.problems


def code_version() -> str:
    """The version of this distribution, as the ledger and the markers record it."""
    return importlib.metadata.version("style-refinery")


def plan(
    source: str,
    run_uri: str,
    config: RunConfig[Any],
    *,
    limit: int | None = None,
    update: Sequence[str] = (),
) -> None:
    """List the input, write manifest and run.json, or recognise the run that is already there.

    The job's models are loaded once on the CPU: a wrong checkpoint fails before any other work.

    Args:
        source: what the job reads: pictures, or a run.
        limit: only the first samples.
        update: runs of the same settings, whose samples are left out unless they have changed.

    Raises:
        NothingNewError: that leaves none.
        AssetError, ConfigError: weights are missing or wrong, or a setting does not fit them.
        ShardError: the input cannot be listed, or is empty.
        LedgerError: the directory holds another run, another driver is at work on it, or it cannot
            be written.
    """
    _plan(source, run_uri, config, limit, update)
    gc.collect()


def _plan(
    source: str, run_uri: str, config: RunConfig[Any], limit: int | None, update: Sequence[str]
) -> "Station":
    """The same; returns what the job's models were loaded into."""
    begun = run_json.find_run(run_uri)
    held = run_json.declared_by(begun, run_uri).kind if begun else config.job.kind
    if held != config.job.kind:
        raise LedgerError(
            f"{run_uri} holds what `refinery {held}` made; choose another folder for what "
            f"`refinery {config.job.kind}` makes"
        )
    config = settled(config, run_uri)
    station = load_station(config.job, "cpu")
    job, hashes = station.asked, dict(station.hashes)
    size = config.engine.shard_size
    if size == "auto":
        size = auto_shard_size(station.generator.resolution)
    if update:
        check_settings(job, hashes, update)
        shards = plan_update(job, source, size, limit, update)
    else:
        shards = station_class(job.kind).plan(job, source, size, limit)
    with hold(run_uri, config.engine.if_busy):
        if begun is None:
            drop_prediction_of_other(run_uri, config.job)
        info = manifest.write_manifest(run_uri, shards, size)
        run_json.create_run(run_uri, job, info, hashes, code_version(), station.declared)
    return station


def auto_shard_size(resolution: int) -> int:
    """Samples per shard of a run that begins: fewer of a large generator, whose pictures take
    longer and more memory."""
    return max(1, manifest.SMALL_SHARD_SIZE * THUMBNAIL_PX // max(resolution, THUMBNAIL_PX))


def settled(config: RunConfig[J], run_uri: str, *, with_chosen: bool = True) -> RunConfig[J]:
    """What is left open of sizes and pictures as the run that is there began with it, or as
    `refinery plan` has chosen it for one that begins.

    Args:
        with_chosen: the latter, too.
    """
    job, engine = config.job, config.engine
    batch: Any = None
    size: int | None = None
    if begun := run_json.find_run(run_uri):
        batch, size = begun["config"].get("batch"), manifest.read_shard_size(run_uri)
        if job.output.pictures == "auto":
            pictures = tuple(begun["config"]["output"]["pictures"])
            job = replace(job, output=replace(job.output, pictures=pictures))
    elif with_chosen and (said := prediction_for(run_uri, job)):
        batch, size = said.batch, said.shard_size
    if job.batch == "auto" and batch is not None:
        job = replace(job, batch=batch)
    if engine.shard_size == "auto" and size is not None:
        engine = engine.model_copy(update={"shard_size": size})
    return RunConfig(job=job, engine=engine)


def run(
    run_uri: str,
    engine: EngineConfig,
    on_progress: OnProgress = ignore_progress,
    redo: Mapping[int, int] | None = None,
    station: "Station | None" = None,
) -> Outcome:
    """Work off every shard that has no commit yet, on the engine of the config.

    Args:
        redo: committed shards to do again, and in which generation (`tasks.run.redo`).
        station: loaded already, for a worker in this process that needs one like it.

    Raises:
        RefineryError: the run cannot go on. What is committed stays; run again to resume.
    """
    with hold(run_uri, engine.if_busy) as lease:

        def tell(snapshot: TallySnapshot) -> None:
            lease.check()
            on_progress(snapshot)

        return _run(run_uri, engine, tell, redo or {}, station)


def _run(
    run_uri: str,
    engine: EngineConfig,
    on_progress: OnProgress,
    redo: Mapping[int, int],
    station: "Station | None",
) -> Outcome:
    record = run_json.read_run(run_uri)
    handle, job = replace(run_json.run_handle(run_uri), redo=redo), load_job(run_uri)
    commits = ledger.read_commits(run_uri, with_parts=True)
    commits.refuse_newer()
    for error in commits.damaged.values():
        logger.warning("%s", error)
    markers = {shard: made for shard, made in commits.markers.items() if shard not in redo}
    waiting = [i for i in range(record["num_shards"]) if i in redo or not commits.has(i)]
    tally = Tally(
        schedule=Schedule(
            waiting,
            max_attempts=engine.max_attempts,
            retry_wait_s=engine.retry_wait_s,
            patience_s=engine.patience_s,
        ),
        quarantine=lambda shard, why, attempts: ledger.quarantine(
            run_uri, shard, why, attempts=attempts
        ),
        shards_total=record["num_shards"],
        rows_total=record["num_samples"],
        shards_done=len(markers) + len(commits.covered),
        rows_done=sum(marker.rows for marker in markers.values()),
        rows_failed=sum(marker.failed for marker in markers.values()),
        on_progress=on_progress,
    )
    del markers, commits
    started = tally.started
    if waiting:
        from pipeline.metrics import exported

        with (
            metadata_kept(run_uri, on_progress) as tally.on_progress,
            kept_log(tally, run_uri, handle.run_id),
            exported(tally, handle.run_id, engine),
        ):
            said = read_prediction(run_uri)
            declared = run_json.declared_by(record, run_uri)
            memory = said.memory_bytes if said else declared.worker_bytes
            if said is None:
                tally.listeners.append(Forecaster(run_uri))

            def order(device: str) -> WorkOrder:
                return WorkOrder(
                    job=job,
                    run=handle,
                    hashes=record["weights"],
                    device=device,
                    threads=engine.threads,
                    memory_bytes=memory,
                )

            _work(order, _within_memory(engine, memory), tally, station)
    on_progress(tally.snapshot())
    return Outcome(
        run_uri=run_uri,
        num_shards=record["num_shards"],
        rows=tally.rows_done,
        failed=tally.rows_failed,
        rows_now=tally.rows_now,
        seconds=tally.seconds,
        startup_s=tally.started - started,
        quarantined=tally.quarantined,
    )


def _work(
    order: Callable[[str], WorkOrder],
    engine: EngineConfig,
    tally: Tally,
    station: "Station | None",
) -> None:
    # What the report is made with is loaded beside the work.
    Thread(target=importlib.import_module, args=("tasks.report.page",)).start()
    if engine.kind == "inline":
        from pipeline.inline import run_inline

        run_inline(order(local_device()), tally, station)
        return
    uri = order("cpu").run.uri
    if "://" not in uri and engine.address:
        logger.warning("%s is a local path: every node of the cluster must see it", uri)
    from pipeline.pool import run_on_ray

    run_on_ray(order, engine, tally)


def _within_memory(engine: EngineConfig, memory_bytes: int) -> EngineConfig:
    """With as many workers as `engine.memory_gb` allows, where they are left open and on CPUs."""
    is_open = engine.kind == "ray" and engine.actors == "auto" and not engine.address
    if engine.memory_gb == "auto" or not is_open or local_device() != "cpu":
        return engine
    actors = that_fit(places("cpu", engine), engine.memory_gb * 1e9, memory_bytes)
    return engine.model_copy(update={"actors": actors})


def places(device: str, engine: EngineConfig) -> int:
    """Workers that a run would have on this machine, if memory allows."""
    if engine.kind == "inline":
        return 1
    if engine.actors != "auto":
        return engine.actors
    if engine.address:  # the size of a cluster is not known here
        return 1
    if device == "cpu":
        return max(len(os.sched_getaffinity(0)) // engine.threads, 1)
    import torch

    return torch.cuda.device_count()


def local_device() -> str:
    """ "cuda" where PyTorch sees a GPU in this process, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def seal(run_uri: str) -> str:
    """Close the run, remove what killed attempts left behind, put its metadata into one file.

    Returns:
        The URI of _SEALED.json.

    Raises:
        LedgerError: a shard is neither committed nor quarantined.
    """
    from tasks.report.forecast import forecast

    with hold(run_uri):
        is_again = ledger.is_sealed(run_uri)  # then somebody may be reading what was there
        uri = ledger.seal(run_uri, {each.name: each.values for each in forecast(run_uri)})
        ledger.remove_orphans(run_uri)
        try:
            write_metadata(run_uri, keep_earlier=is_again)
        except LedgerError as error:  # answers do not need it; verification says what is wrong
            logger.warning("%s: its metadata are not in one file: %s", run_uri, error)
    return uri


def carry_out(
    source: str,
    run_uri: str,
    config: RunConfig[Any],
    *,
    limit: int | None = None,
    on_progress: OnProgress = ignore_progress,
    update: Sequence[str] = (),
) -> Summary:
    """All stages in this process, without Prefect, whichever kind of job it is.

    Raises:
        RefineryError: as the stages.
    """
    with hold(run_uri, config.engine.if_busy), engine_on_its_way(config.engine, run_uri):
        if config.engine.kind != "inline":
            plan(source, run_uri, config, limit=limit, update=update)
            return finish(run_uri, config.engine, on_progress)
        station = _plan(source, run_uri, config, limit, update)
        return finish(run_uri, config.engine, on_progress, station=station)


def engine_on_its_way(engine: EngineConfig, run_uri: str) -> AbstractContextManager[None]:
    """Ray and a worker, where a new run will need them: they come up while the run is planned."""
    if engine.kind == "inline" or exists(join(run_uri, "run.json")):
        return nullcontext()
    from pipeline.ray_session import ray_on_its_way

    def first() -> Any:
        from pipeline.actor import first_actor

        return first_actor(engine)

    return ray_on_its_way(engine.address, first)


def finish(
    run_uri: str,
    engine: EngineConfig,
    on_progress: OnProgress = ignore_progress,
    redo: Mapping[int, int] | None = None,
    station: "Station | None" = None,
) -> Summary:
    """All stages after the plan.

    Args:
        redo, station: as for `run`.

    Raises:
        RefineryError: as the stages.
    """
    from tasks.report import write_report
    from tasks.report.alignment import alignment_line
    from tasks.report.forecast import forecast
    from tasks.verify.run import verify

    with hold(run_uri, engine.if_busy):
        outcome = run(run_uri, engine, on_progress, redo, station)
        patiently(lambda: seal(run_uri))
    found = patiently(lambda: verify(run_uri))
    return Summary(
        outcome=outcome,
        problems=tuple(found.problems),
        report_uri=patiently(lambda: write_report(run_uri)),
        warning=patiently(lambda: alignment_line(run_uri)),
        forecast=patiently(lambda: forecast(run_uri)),
    )


def check_places(input_uri: str, run_uri: str) -> None:
    """Refuse an output inside the input, which would become input of the next run.

    Raises:
        ConfigError: the output folder lies in the input folder.
    """
    inside = run_uri.rstrip("/") + "/"
    if inside.startswith(input_uri.rstrip("/") + "/"):
        raise ConfigError(
            f"OUT {run_uri} lies inside IN {input_uri}: what it writes would be found as "
            "input; choose a folder outside"
        )
