"""Commands over runs. Heavy imports wait inside, so that --help is immediate."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pipeline.commands.jobs import run_job
from pipeline.commands.terminal import (
    DEFAULTS,
    OK,
    UNCLEAN,
    Config,
    In,
    JobOptions,
    Limit,
    Methods,
    Out,
    Run,
    Sets,
    console,
    error_console,
)
from tasks.work.kinds import KINDS

if TYPE_CHECKING:
    from pipeline.config import RunConfig
    from pipeline.run import Summary


def demo(*, out: str = "runs") -> int:
    """Plan, invert, query and report on a small sample made on the spot. Needs no server.

    Args:
        out: folder in which a new run directory is made.
    """
    from pipeline.demo import run_demo

    return run_demo(console, error_console, out)


def plan(
    source: In,
    /,
    *,
    config: Config = None,
    sets: Sets = None,
    methods: Methods = None,
    limit: Limit = None,
    probe: int = 16,
) -> int:
    """Shards, images and bytes of a run; time and output size from a measured probe.

    Args:
        probe: samples to invert for the estimate; 0 for none.
    """
    from pipeline.config import load_config
    from pipeline.estimate import estimate

    settings = load_config(config, sets or [], methods or [])
    console.print(estimate(source, settings, limit=limit, count=probe))
    return OK


def invert(
    source: In,
    output: Out,
    /,
    *,
    methods: Methods = None,
    dry_run: bool = False,
    options: JobOptions = DEFAULTS,
) -> int:
    """Invert every picture of IN into the run OUT. Run the same command again to resume.

    Args:
        dry_run: print the plan and the resolved config, do nothing.
    """
    config, sets, limit = options.config, options.overrides, options.limit
    if dry_run:
        return _dry_run(source, output, config, sets, methods or [], limit)

    def load() -> "RunConfig[Any]":
        from pipeline.config import load_config

        return load_config(config, sets, methods or [])

    def in_flow() -> "Summary":
        from pipeline.flows import invert_dataset

        return invert_dataset(source, output, config, sets, methods, limit)

    return run_job(source, output, options, load, in_flow)


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
    from pipeline.run import check_places

    settings = load_config(config, sets, methods)
    check_places(source, output)
    console.print(estimate(source, settings, limit=limit, count=0))
    console.print(f"\n# The run would be written to {output} with this config:", highlight=False)
    console.print(settings.to_toml(), highlight=False, markup=False, soft_wrap=True)
    return OK


def status(run: Run, /) -> int:
    """Where a run stands: commits, rows, failures, pace. Works while it runs and after a crash."""
    from pipeline.screen import show_status
    from pipeline.status import read_status

    found = read_status(run)
    show_status(console, found)
    return UNCLEAN if found.quarantined or found.problems else OK


def verify(run: Run, /, *, deep: bool = True) -> int:
    """Check that every sample of the manifest is there exactly once, and every part as committed.

    Args:
        deep: read the parts and check their sha256 and keys too.
    """
    from pipeline.screen import count
    from tasks.verify.run import verify as verify_run

    found = verify_run(run, deep)
    for line in (*found.problems, *(f"note: {note}" for note in found.notes)):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    verdict = count(len(found.problems), "problem") if found.problems else "clean"
    console.print(f"{run}: {verdict}", highlight=False, soft_wrap=True)
    return UNCLEAN if found.problems else OK


def report(run: Run, /) -> int:
    """Write the run's page of pictures and figures, one HTML file."""
    from tasks.report import write_report

    console.print(write_report(run), highlight=False, soft_wrap=True)
    return OK
