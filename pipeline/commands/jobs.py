"""How a command runs a job: plainly, or as a Prefect flow; what it shows meanwhile and then."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.commands.terminal import OK, UNCLEAN, JobOptions, console, error_console
from pipeline.start import spare_pandas

if TYPE_CHECKING:
    from pipeline.config import RunConfig
    from pipeline.prefect_server import PrivateServer
    from pipeline.run import Summary


def begin_flow(options: JobOptions) -> "tuple[bool, PrivateServer | None]":
    """Whether to run as a flow, and a private Prefect server where it needs one, which comes up
    while the rest is loading.

    Stages that no server of the user's records are no flow unless asked for: a private server takes
    longer to start than many runs to finish, and forgets them at the end.
    """
    from pipeline.prefect_server import has_server, start_server

    if not (has_server() if options.flow is None else options.flow):
        return False, None
    return True, start_server()


def run_job(
    source: str,
    output: str,
    options: JobOptions,
    load: "Callable[[], RunConfig[Any]]",
    in_flow: "Callable[[], Summary]",
    update: Sequence[str] = (),
) -> int:
    """Run a job to its end and show its summary.

    Args:
        load: makes its config.
        in_flow: all of it as a Prefect flow.
        update: as for `pipeline.run.plan`.

    Returns:
        The exit code.
    """
    is_flow, server = begin_flow(options)
    from pipeline.config import engine_of
    from pipeline.progress import progress_line
    from pipeline.run import carry_out, check_places, engine_on_its_way
    from pipeline.screen import show_summary

    spare_pandas()
    check_places(source, output)
    engine = engine_of(options.config, options.overrides)
    with engine_on_its_way(engine, output):
        config = load()
        with progress_line(error_console) as on_progress:
            if not is_flow:
                limit = options.limit
                summary = carry_out(
                    source, output, config, limit=limit, on_progress=on_progress, update=update
                )
            else:
                if server is not None:
                    server.wait()
                from pipeline.flows import IncompleteRun, listening

                try:
                    with listening(on_progress):
                        summary = in_flow()
                except IncompleteRun as incomplete:
                    summary = incomplete.summary
    show_summary(console, summary)
    return OK if summary.is_clean else UNCLEAN
