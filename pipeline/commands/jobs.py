"""How a command runs a job: plainly, or as a Prefect flow; what it shows meanwhile and then."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pipeline.commands.terminal import OK, UNCLEAN, console, error_console

if TYPE_CHECKING:
    from pipeline.config import RunConfig
    from pipeline.prefect_server import PrivateServer
    from pipeline.run import Summary


def begin_server(flow: bool) -> "PrivateServer | None":
    """A private Prefect server, where a flow needs one; it comes up while the rest is loading."""
    if not flow:
        return None
    from pipeline.prefect_server import start_server

    return start_server()


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
        server: of `begin_server`.

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
