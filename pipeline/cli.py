"""The command `refinery`. Heavy imports wait inside the commands, so that --help is immediate."""

import atexit
import contextlib
import errno
import logging
import os
import signal
import sys
import threading
from typing import Any, NoReturn

from cyclopts import App, CycloptsError, Group, Parameter
from rich.logging import RichHandler

from models.errors import RefineryError
from pipeline.commands import asking, browse, editing, models, photos, runs, similar, upkeep
from pipeline.commands.misuse import misuse
from pipeline.commands.terminal import BUG, OK, STOPPED, WRONG, console, error_console
from tasks.work.kinds import KINDS

app = App(
    name="refinery",
    help="Invert, edit and re-style image collections with StyleGAN2: pictures in object storage "
    "to latent codes, edits and metrics in Parquet.",
    help_epilogue="Any command takes --debug: full tracebacks and logs. "
    "Exit codes: 0 fine; 1 finished, but shards were quarantined or verification found problems; "
    "2 a setting, a file or a place is wrong; 3 a bug of ours; "
    "130 stopped (run again to resume).",
    default_parameter=Parameter(negative_iterable=()),
    suppress_keyboard_interrupt=False,
    console=console,
    error_console=error_console,
)
COMMANDS = {
    Group("Runs", sort_key=0): (
        runs.demo,
        runs.plan,
        runs.invert,
        editing.edit,
        runs.retry,
        runs.status,
        runs.verify,
        runs.report,
        asking.runs,
        asking.query,
        similar.index,
        similar.similar,
        similar.duplicates,
        asking.diff,
        asking.reproduce,
        photos.export,
        browse.browse,
        upkeep.compact,
        upkeep.gc,
    ),
    Group("Models", sort_key=1): (
        models.methods,
        models.settings,
        editing.adapt,
        editing.move,
        models.convert,
        models.statistics,
        models.train,
    ),
}
for group, commands in COMMANDS.items():
    for command in commands:
        app.command(command, group=group)
for kind in KINDS:
    if kind not in app:  # a kind without options of its own
        app.command(runs.over_run(kind), name=kind, group=next(iter(COMMANDS)))
for sub_app in (editing.directions, models.benchmark):
    sub_app.group = tuple(COMMANDS)[1]
    app.command(sub_app)


def main() -> None:
    """The console script."""
    # A preempted machine sends SIGTERM: leave as with Ctrl-C.
    signal.signal(signal.SIGTERM, _interrupt)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    leave(run_app(sys.argv[1:]))


def leave(code: int) -> NoReturn:
    """End the process as `sys.exit` would, but without taking PyTorch's modules apart: that takes
    0.8 s, longer than many commands."""
    try:
        with contextlib.suppress(KeyboardInterrupt):  # the command is done, and its code stands
            threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, ends idle ones
            atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:  # whoever read has read enough
        pass
    except OSError as error:
        os.write(2, f"error: what was printed is not all there: {error}\n".encode())
        code = code or WRONG
    os._exit(code)


def run_app(tokens: list[str]) -> int:
    """Run one command.

    Returns:
        The exit code; errors of ours are one line on stderr, with --debug a traceback.
    """
    is_debug = "--debug" in tokens
    tokens = [token for token in tokens if token != "--debug"]
    _set_up_logging(is_debug)
    try:
        code = app(tokens, exit_on_error=False, print_error=False, result_action="return_value")
        return code if isinstance(code, int) else OK
    except CycloptsError as error:
        return _complain("error", misuse(app, error), is_debug, WRONG)
    except BaseException as error:
        return _end(error, is_debug)


def _end(error: BaseException, is_debug: bool) -> int:
    """Say what went wrong; the exit code."""
    # Inside Ray's own loops an interrupt surfaces as the cause of a SystemError; a library in whose
    # callback it comes (DuckDB, Arrow) makes an error of its own of it.
    is_stopped = any(isinstance(e, KeyboardInterrupt) for e in _causes(error))
    if is_stopped or (_signals and isinstance(error, Exception)):
        error_console.print("stopped; what is committed is kept, run again to go on")
        return STOPPED
    is_disk_full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    if isinstance(error, RefineryError) or is_disk_full:
        return _complain("error", error, is_debug, WRONG)
    if isinstance(error, Exception):
        return _complain(f"internal error ({type(error).__name__})", error, is_debug, BUG)
    raise error


def _causes(error: BaseException) -> list[BaseException]:
    from pipeline.faults import causes

    return causes(error)


def _complain(what: str, error: BaseException | str, is_debug: bool, code: int) -> int:
    if is_debug:
        error_console.print_exception()
    hint = "" if is_debug or code != BUG else "\nrun again with --debug for the traceback"
    error_console.print(f"[red]{what}:[/red]", end=" ", highlight=False)
    error_console.print(f"{error}{hint}", highlight=False, markup=False, soft_wrap=True)
    return code


_signals: list[int] = []
"""That this process has got since its command began."""


def _interrupt(number: int, frame: Any) -> None:
    _signals.append(number)
    raise KeyboardInterrupt


def _set_up_logging(is_debug: bool) -> None:
    handler = RichHandler(console=error_console, show_path=is_debug, show_time=is_debug)
    logging.basicConfig(
        level=logging.INFO if is_debug else logging.WARNING,
        format="%(message)s",
        handlers=[handler],
    )
    os.environ.setdefault("PYTHONUNBUFFERED", "1")


if __name__ == "__main__":
    main()
