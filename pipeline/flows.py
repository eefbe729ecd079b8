"""The Prefect flow: one task per stage, artifacts to look at, a GPU quota where the server has one.

Prefect says when. What the stages do is in `pipeline.run`; how shards are retried is in
`pipeline.schedule`. The ledger is the cache, so no task result is ever cached by Prefect.
"""

import base64
import logging
import math
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from prefect import flow, task
from prefect.artifacts import (
    create_image_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.cache_policies import NO_CACHE
from prefect.concurrency.sync import concurrency
from prefect.runtime import flow_run

from models.errors import RefineryError
from pipeline import run as stages
from pipeline.config import EngineConfig, RunConfig, load_config, load_stored_config
from pipeline.faults import OUTAGE_WAITS_S, is_passing
from pipeline.preview import preview_png
from pipeline.run import Outcome, Summary
from pipeline.tally import OnProgress, TallySnapshot, ignore_progress
from tasks.report import write_report
from tasks.report.alignment import alignment_line
from tasks.report.forecast import forecast
from tasks.run.lease import hold
from tasks.verify.run import verify

logger = logging.getLogger(__name__)

GPU_LIMIT = "gpu-pool"
"""Global concurrency limit, `prefect gcl create gpu-pool --limit 8`; no such limit, no quota."""
PROGRESS_INTERVAL_S = 10.0

_listener: ContextVar[OnProgress] = ContextVar("listener", default=ignore_progress)


class IncompleteRun(RefineryError):
    """The run went to its end, but shards were quarantined or verification found problems.

    Attributes:
        summary: what `invert_dataset` would have returned.
    """

    def __init__(self, summary: Summary) -> None:
        self.summary = summary
        outcome = summary.outcome
        super().__init__(
            f"{outcome.run_uri}: {len(outcome.quarantined)} of {outcome.num_shards} shards "
            f"quarantined, {len(summary.problems)} problems found by verify; see failed/ in the run"
        )


@contextmanager
def listening(listener: OnProgress) -> Iterator[None]:
    """Pass the progress of flows in this block to a listener in this process (a terminal)."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def _is_worth_retrying(task: Any, run: Any, state: Any) -> bool:
    """Only a storage that did not answer; a wrong setting stays wrong."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, BaseException) and is_passing(error)


RETRY_ON_OUTAGE: dict[str, Any] = {
    "cache_policy": NO_CACHE,
    "retries": len(OUTAGE_WAITS_S),
    "retry_delay_seconds": list(OUTAGE_WAITS_S),
    "retry_condition_fn": _is_worth_retrying,
}


def run_name() -> str:
    """A flow run is called as the run that it writes."""
    return dated(str(flow_run.parameters["output_uri"]))


@flow(name="invert-dataset", flow_run_name=run_name)
def invert_dataset(
    input_uri: str,
    output_uri: str,
    config: str | None = None,
    overrides: list[str] | None = None,
    methods: list[str] | None = None,
    limit: int | None = None,
    update: list[str] | None = None,
) -> Summary:
    """Invert a dataset: plan, run shards, seal, verify, report.

    Args:
        input_uri: a prefix of pictures, WebDataset tars or Parquet files; local or s3://.
        output_uri: the run directory. `{date}` becomes the day the run was scheduled for (UTC), so
            that a nightly deployment writes one run a night.
        config: TOML file; the defaults without it.
        overrides: as `--set`, e.g. ["engine.actors=8"].
        methods: names of the method chain, instead of the file's.
        limit: only the first samples.
        update: earlier runs, whose samples are left out unless they have changed.

    Raises:
        IncompleteRun: shards were quarantined, or verification found problems.
        RefineryError: as the stages of `pipeline.run`.
    """
    run_uri = dated(output_uri)
    settings = load_config(config, overrides or [], methods or [])
    return run_stages(input_uri, run_uri, settings, limit, update or [])


@flow(name="run-over-run", flow_run_name=run_name)
def run_over_run(
    kind: str,
    source_uri: str,
    output_uri: str,
    config: str | None = None,
    overrides: list[str] | None = None,
    limit: int | None = None,
) -> Summary:
    """A job of any kind over a run's stored samples: plan, run shards, seal, verify, report.

    Args:
        kind: a name of `tasks.work.kinds.KINDS`, e.g. "rescore".
        source_uri: a finished run. `{date}` as in `output_uri`.
        output_uri, config, overrides, limit: as in `invert_dataset`.

    Raises:
        IncompleteRun, RefineryError: as `invert_dataset`.
    """
    source, run_uri = dated(source_uri), dated(output_uri)
    settings = load_stored_config(kind, source, config, overrides or [])
    return run_stages(source, run_uri, settings, limit)


def run_stages(
    source: str,
    run_uri: str,
    config: RunConfig[Any],
    limit: int | None,
    update: Sequence[str] = (),
) -> Summary:
    """All stages, inside a flow.

    Raises:
        IncompleteRun: shards were quarantined, or verification found problems.
    """
    stages.check_places(source, run_uri)
    with hold(run_uri, config.engine.if_busy):
        plan_run(source, run_uri, config, limit, update)
        outcome = run_shards(run_uri, config.engine)
        problems = seal_and_verify(run_uri)
    summary = Summary(
        outcome=outcome,
        problems=problems,
        report_uri=report(run_uri),
        warning=alignment_line(run_uri),
        forecast=forecast(run_uri),
    )
    publish(summary)
    if not summary.is_clean:
        raise IncompleteRun(summary)
    return summary


@task(name="plan", **RETRY_ON_OUTAGE)
def plan_run(
    source: str,
    run_uri: str,
    config: RunConfig[Any],
    limit: int | None,
    update: Sequence[str] = (),
) -> None:
    stages.plan(source, run_uri, config, limit=limit, update=update)


@task(name="run-shards", **RETRY_ON_OUTAGE)
def run_shards(run_uri: str, engine: EngineConfig) -> Outcome:
    listener, bar = _listener.get(), ProgressBar("Shards done")

    def on_progress(snapshot: TallySnapshot) -> None:
        listener(snapshot)
        bar(snapshot.shards_done + snapshot.shards_quarantined, snapshot.shards_total)

    with gpu_quota(engine):
        return stages.run(run_uri, engine, on_progress)


@task(name="seal-and-verify", **RETRY_ON_OUTAGE)
def seal_and_verify(run_uri: str) -> tuple[str, ...]:
    stages.seal(run_uri)
    return tuple(verify(run_uri).problems)


@task(name="report", **RETRY_ON_OUTAGE)
def report(run_uri: str) -> str:
    return write_report(run_uri)


@task(name="publish", **RETRY_ON_OUTAGE)
def publish(summary: Summary) -> None:
    """What the Prefect UI shows of the run: figures, reasons, a few pairs of pictures."""
    outcome = summary.outcome
    rows = [
        {"what": "rows", "value": outcome.rows},
        {"what": "failed rows", "value": outcome.failed},
        {"what": "shards", "value": outcome.num_shards},
        {"what": "images/s", "value": round(outcome.images_per_s, 2)},
        {"what": "report", "value": summary.report_uri},
        *({"what": each.name, "value": each.both} for each in summary.forecast),
        *({"what": f"quarantined {i:05d}", "value": w} for i, w in outcome.quarantined.items()),
        *({"what": "problem", "value": problem} for problem in summary.problems),
    ]
    create_table_artifact(table=rows, key="summary", description=f"Run {outcome.run_uri}")
    picture = preview_png(outcome.run_uri)
    if picture is None:
        create_markdown_artifact("No picture was committed.", key="preview")
        return
    show_picture(picture, "preview", "Inputs above, their inversions and edits below")


def show_picture(png: bytes, key: str, description: str) -> None:
    """A picture in the Prefect UI, without a place to lie in."""
    # Keys of artifacts: lower case, digits and dashes.
    key = re.sub(r"[^a-z0-9]+", "-", key.lower()).strip("-") or "picture"
    url = "data:image/png;base64," + base64.b64encode(png).decode()
    create_image_artifact(image_url=url, key=key, description=description)


class ProgressBar:
    """A bar in the Prefect UI, moved at most every few seconds while the server is there."""

    def __init__(self, description: str) -> None:
        self._artifact = create_progress_artifact(0.0, key="progress", description=description)
        self._moved_at = -math.inf

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        is_due = done == total or now - self._moved_at > PROGRESS_INTERVAL_S
        if is_due and isinstance(self._artifact, UUID):
            self._moved_at = now
            try:
                update_progress_artifact(self._artifact, progress=100.0 * done / max(total, 1))
            except Exception as error:
                if not is_passing(error):
                    raise
                logger.warning("the Prefect server does not answer, the run goes on: %s", error)


def gpu_quota(engine: EngineConfig) -> Any:
    """Hold as many slots of the server's GPU limit as the pool will use, while it runs."""
    gpus = gpus_wanted(engine)
    return concurrency(GPU_LIMIT, occupy=gpus) if gpus else nullcontext()


def gpus_wanted(engine: EngineConfig) -> int:
    if engine.gpus_per_actor == 0:
        return 0
    if engine.gpus_per_actor == "auto" and stages.local_device() == "cpu" and not engine.address:
        return 0
    per_actor = 1.0 if engine.gpus_per_actor == "auto" else engine.gpus_per_actor
    actors = 1 if engine.actors == "auto" or engine.kind == "inline" else engine.actors
    return max(math.ceil(per_actor * actors), 1)


def dated(uri: str) -> str:
    """`{date}` becomes the day the flow run was scheduled for, or else today; UTC, 2026-01-31."""
    when = flow_run.scheduled_start_time or datetime.now(UTC)
    return uri.replace("{date}", when.strftime("%Y-%m-%d"))
