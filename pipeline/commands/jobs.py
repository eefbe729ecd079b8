"""How a command runs a job: plainly, or as a Prefect flow; what it shows meanwhile and then."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from pipeline.commands.terminal import OK, UNCLEAN, console, error_console

if TYPE_CHECKING:
    from pipeline.prefect_server import PrivateServer
    from pipeline.run import Summary
    from pipeline.tally import OnProgress


def begin_server(flow: bool) -> "PrivateServer | None":
    """A private Prefect server, where a flow needs one; it comes up while the rest is loading."""
    if not flow:
        return None
    from pipeline.prefect_server import start_server

    return start_server()


def run_job(
    plainly: "Callable[[OnProgress], Summary]",
    in_flow: "Callable[[], Summary] | None",
    server: "PrivateServer | None",
) -> int:
    """Run a job to its end and show its summary.

    Args:
        plainly: all stages in this process.
        in_flow: the same as a flow; None to run plainly.
        server: of `begin_server`.

    Returns:
        The exit code.
    """
    from pipeline.progress import progress_line
    from pipeline.screen import show_summary

    with progress_line(error_console) as on_progress:
        if in_flow is None:
            summary = plainly(on_progress)
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
