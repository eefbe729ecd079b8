"""How a command runs a job: plainly, or as a Prefect flow; what it shows meanwhile and then."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.commands.terminal import OK, UNCLEAN, console, error_console

if TYPE_CHECKING:
    from pipeline.config import RunConfig
    from pipeline.prefect_server import PrivateServer
    from pipeline.run import Summary


def begin_flow(
    flow: bool, config: str | None, sets: Sequence[str]
) -> "tuple[bool, PrivateServer | None]":
    """Whether to run as a flow, and a private Prefect server where it needs one, which comes up
    while the rest is loading.

    A loop in this process that no server of the user's records is no flow: the private server would
    cost more than many such runs, and forgets them at the end.
    """
    from pipeline.config import engine_kind
    from pipeline.prefect_server import has_server, start_server

    if not flow or (engine_kind(config, sets) == "inline" and not has_server()):
        return False, None
    return True, start_server()


def with_engine(sets: list[str] | None, engine: str | None) -> list[str]:
    """The overrides, --engine among them."""
    return [*(sets or []), *([f"engine.kind={engine}"] if engine else [])]


def run_job(
    source: str,
    output: str,
    config: "RunConfig[Any]",
    limit: int | None,
    in_flow: "Callable[[], Summary] | None",
    server: "PrivateServer | None",
) -> int:
    """Run a job to its end and show its summary.

    Args:
        in_flow: the same as a flow; None to run plainly.
        server: of `begin_flow`.

    Returns:
        The exit code.
    """
    from pipeline.progress import progress_line
    from pipeline.run import carry_out, check_places
    from pipeline.screen import show_summary

    check_places(source, output)
    with progress_line(error_console) as on_progress:
        if in_flow is None:
            summary = carry_out(source, output, config, limit=limit, on_progress=on_progress)
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
