"""Commands over runs. Heavy imports wait inside, so that --help is immediate."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from pipeline.commands.jobs import run_job
from pipeline.commands.terminal import (
    ALIGN_SETS,
    DEFAULTS,
    OK,
    UNCLEAN,
    Align,
    Config,
    Engine,
    In,
    JobOptions,
    Limit,
    Methods,
    Out,
    Run,
    Sets,
    console,
    error_console,
    say,
)
from tasks.work.kinds import KINDS

if TYPE_CHECKING:
    from pipeline.config import RunConfig
    from pipeline.run import Summary

PLANNED = (
    "The run that is planned: it keeps the prediction, and its summary and report set what it "
    "takes beside it."
)


def demo(*, out: str = "runs") -> int:
    """Plan, invert, query and report on a small sample made on the spot. Needs no server.

    Args:
        out: folder in which a new run directory is made.
    """
    from pipeline.demo import run_demo

    return run_demo(console, error_console, out)


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What only `plan` takes."""

    probe: int | None = None
    """Samples to invert for it; without it four batches, or as many as take 15 s, 0 for none."""
    price_per_hour: float | None = None
    """Of a worker (a GPU, else a core): what the run costs."""
    engine: Engine = None


def plan(
    source: In,
    output: Annotated[str | None, Parameter(name="OUT", help=PLANNED)] = None,
    /,
    *,
    config: Config = None,
    sets: Sets = None,
    methods: Methods = None,
    align: Align = False,
    limit: Limit = None,
    asked: PlanOptions = PlanOptions(),
) -> int:
    """What a run will take: shards, images and bytes, and time, memory and disk as a probe on this
    machine measures them."""
    from pipeline.config import load_config
    from pipeline.estimate import estimate

    options = JobOptions(sets=sets, engine=asked.engine)
    settings = load_config(
        config, [*(ALIGN_SETS if align else ()), *options.overrides], methods or []
    )
    table = estimate(
        source,
        settings,
        limit=limit,
        count=asked.probe,
        output=output,
        price=asked.price_per_hour,
    )
    console.print(table)
    return OK


def invert(
    source: In,
    output: Out,
    /,
    *,
    methods: Methods = None,
    align: Align = False,
    update: list[str] | None = None,
    dry_run: bool = False,
    options: JobOptions = DEFAULTS,
) -> int:
    """Invert every picture of IN into the run OUT. Run the same command again to resume.

    Args:
        update: an earlier run of the same settings (may be repeated): OUT gets only what is new in
            IN or has changed since.
        dry_run: print the plan and the resolved config, do nothing.
    """
    sets = [*(ALIGN_SETS if align else ()), *options.overrides]
    config, limit = options.config, options.limit
    if dry_run:
        return _dry_run(source, output, config, sets, methods or [], limit)

    def load() -> "RunConfig[Any]":
        from pipeline.config import load_config

        return load_config(config, sets, methods or [])

    def in_flow() -> "Summary":
        from pipeline.flows import invert_dataset

        return invert_dataset(source, output, config, sets, methods, limit, update)

    from tasks.input.plan import NothingNewError

    try:
        return run_job(source, output, options, load, in_flow, update or ())
    except NothingNewError as nothing:
        say(nothing)
        return OK


def retry(
    run: Run,
    /,
    *,
    failed: bool = False,
    where: str | None = None,
    config: Config = None,
    sets: Sets = None,
    engine: Engine = None,
) -> int:
    """Try again what RUN has given up: its quarantined shards, and with --failed those with failed
    rows.

    A shard is done again as a whole, by the settings of the run, and its new commit replaces the
    old one: rows and bytes are those of a run in which nothing went wrong. A shard that fails again
    leaves the old commit.

    Args:
        failed: shards with failed rows too.
        where: only shards with a failed row that meets this SQL condition, e.g.
            "error_kind = 'read'"; implies --failed.
        config: TOML file, of which [engine] is read; the rest is the run's own.
        sets: overrides of [engine], e.g. engine.actors=2.
    """
    from pipeline.config import load_engine
    from pipeline.progress import progress_line
    from pipeline.run import finish
    from pipeline.screen import show_summary
    from tasks.run.redo import shards_to_redo

    options = JobOptions(config=config, sets=sets, engine=engine)
    settings = load_engine(options.config, options.overrides)
    redo = shards_to_redo(run, where) if failed or where is not None else {}
    with progress_line(error_console) as on_progress:
        summary = finish(run, settings, on_progress, redo)
    show_summary(console, summary)
    return OK if summary.is_clean else UNCLEAN


def over_run(kind: str) -> Callable[..., int]:
    """The command of a kind of job that works on the samples of a run."""

    def command(run: Run, output: Out, /, *, options: JobOptions = DEFAULTS) -> int:
        def load() -> "RunConfig[Any]":
            from pipeline.config import load_stored_config

            return load_stored_config(kind, run, options.config, options.overrides)

        def in_flow() -> "Summary":
            from pipeline.flows import run_over_run

            sets = options.overrides
            return run_over_run(kind, run, output, options.config, sets, options.limit)

        return run_job(run, output, options, load, in_flow)

    command.__name__ = kind
    command.__doc__ = KINDS[kind].summary
    return command


def _dry_run(
    source: str,
    output: str,
    config: str | None,
    sets: list[str],
    methods: list[str],
    limit: int | None,
) -> int:
    from pipeline.config import load_config
    from pipeline.estimate import estimate
    from pipeline.run import check_places, settled

    check_places(source, output)
    settings = settled(load_config(config, sets, methods), output)
    console.print(estimate(source, settings, limit=limit, count=0))
    say(f"\n# The run would be written to {output} with this config:")
    say(settings.to_toml())
    return OK


def status(run: Run, /, *, watch: bool = False, every_s: float = 5.0) -> int:
    """Where a run stands: commits, rows, failures, pace. Works while it runs and after a crash.

    Args:
        watch: show it again and again until the run is sealed.
        every_s: seconds between two looks.
    """
    from pipeline.screen import show_status
    from pipeline.status import read_status

    found = read_status(run)
    while watch and not found.is_sealed:
        if console.is_terminal:
            console.clear()
        show_status(console, found)
        time.sleep(every_s)
        found = read_status(run)
    show_status(console, found)
    return UNCLEAN if found.quarantined or found.problems else OK


def verify(run: Run, /, *, deep: bool = True) -> int:
    """Check that every sample of the manifest is there exactly once, and every part as committed.

    Args:
        deep: read the parts and check their sha256 and keys too.
    """
    from tasks.report.words import counted
    from tasks.verify.run import verify as verify_run

    found = verify_run(run, deep)
    for line in (*found.problems, *(f"note: {note}" for note in found.notes)):
        say(line)
    verdict = counted(len(found.problems), "problem") if found.problems else "clean"
    say(f"{run}: {verdict}")
    return UNCLEAN if found.problems else OK


def report(run: Run, /, *, against: str | None = None) -> int:
    """Write the run's page of pictures and figures, one HTML file.

    Args:
        against: another run, whose distributions these are compared with.
    """
    from tasks.report import write_report

    say(write_report(run, against))
    return OK
