"""The command `refinery`. Heavy imports wait inside the commands, so that --help is immediate."""

import logging
import os
import signal
import sys
from typing import Annotated, Any, Literal, TextIO

from cyclopts import App, CycloptsError, Group, Parameter
from rich.console import Console
from rich.logging import RichHandler

from models.errors import RefineryError

LOG_WIDTH = 160
OK, UNCLEAN, WRONG, BUG, STOPPED = 0, 1, 2, 3, 130
"""Exit codes: fine; finished with quarantined shards or problems; a setting, a file or a place is
wrong; an error of ours; stopped by Ctrl-C or SIGTERM."""


def _console(stream: TextIO, *, stderr: bool) -> Console:
    """A log file is not cut to 80 characters."""
    is_free = not stream.isatty() and "COLUMNS" not in os.environ
    return Console(stderr=stderr, width=LOG_WIDTH if is_free else None)


console = _console(sys.stdout, stderr=False)
error_console = _console(sys.stderr, stderr=True)

app = App(
    name="refinery",
    help="Invert image collections with StyleGAN2: pictures in object storage to latent codes, "
    "reconstructions and metrics in Parquet.",
    help_epilogue="Any command takes --debug: full tracebacks and logs. "
    "Exit codes: 0 fine; 1 finished, but shards were quarantined or verification found problems; "
    "2 a setting, a file or a place is wrong; 130 stopped (run again to resume).",
    default_parameter=Parameter(negative_iterable=()),
    suppress_keyboard_interrupt=False,
    console=console,
    error_console=error_console,
)
RUNS, MODELS = Group("Runs", sort_key=0), Group("Models", sort_key=1)

In = Annotated[
    str, Parameter(name="IN", help="Pictures, WebDataset tars or Parquet: a path or s3:// prefix.")
]
Out = Annotated[str, Parameter(name="OUT", help="The run directory, a path or s3:// prefix.")]
Run = Annotated[str, Parameter(name="RUN", help="A run directory, a path or s3:// prefix.")]
Config = Annotated[str | None, Parameter(name="--config", help="TOML file.")]
Sets = Annotated[
    list[str] | None,
    Parameter(name="--set", help="Override, e.g. method.0.steps=200. May be repeated."),
]
Methods = Annotated[
    list[str] | None,
    Parameter(name="--method", help="Method chain: --method e4e --method wplus."),
]
Limit = Annotated[int | None, Parameter(name="--limit", help="Only the first samples.")]


@app.command(group=RUNS)
def demo(*, out: str = "runs") -> int:
    """Plan, invert, query and report on a small sample made on the spot. Needs no server.

    Args:
        out: folder in which a new run directory is made.
    """
    from pipeline.demo import run_demo

    return run_demo(console, error_console, out)


@app.command(group=RUNS)
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


@app.command(group=RUNS)
def invert(  # noqa: PLR0913 - a command's options are its arguments
    source: In,
    output: Out,
    /,
    *,
    config: Config = None,
    sets: Sets = None,
    methods: Methods = None,
    engine: Literal["ray", "inline"] | None = None,
    limit: Limit = None,
    dry_run: bool = False,
    flow: bool = True,
) -> int:
    """Invert every picture of IN into the run OUT. Run the same command again to resume.

    Args:
        engine: where the shards run; inline is a loop in this process, for debugging.
        dry_run: print the plan and the resolved config, do nothing.
        flow: run as a Prefect flow, on the server of PREFECT_API_URL or a private one.
    """
    sets = [*(sets or []), *([f"engine.kind={engine}"] if engine else [])]
    if dry_run:
        return _dry_run(source, output, config, sets, methods or [], limit)
    server = None
    if flow:
        from pipeline.prefect_server import start_server

        server = start_server()  # comes up while the rest is loading
    from pipeline.config import load_config
    from pipeline.progress import progress_line
    from pipeline.run import check_places
    from pipeline.run import invert as invert_plainly
    from pipeline.screen import show_summary

    settings = load_config(config, sets, methods or [])
    check_places(source, output)
    with progress_line(error_console) as on_progress:
        if not flow:
            summary = invert_plainly(source, output, settings, limit=limit, on_progress=on_progress)
        else:
            if server is not None:
                server.wait()
            from pipeline.flows import IncompleteRun, invert_dataset, listening

            try:
                with listening(on_progress):
                    summary = invert_dataset(source, output, config, sets, methods, limit)
            except IncompleteRun as incomplete:
                summary = incomplete.summary
    show_summary(console, summary)
    return OK if summary.is_clean else UNCLEAN


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


@app.command(group=RUNS)
def status(run: Run, /) -> int:
    """Where a run stands: commits, rows, failures, pace. Works while it runs and after a crash."""
    from pipeline.screen import show_status
    from pipeline.status import read_status

    found = read_status(run)
    show_status(console, found)
    return UNCLEAN if found.quarantined else OK


@app.command(group=RUNS)
def verify(run: Run, /, *, deep: bool = True) -> int:
    """Check that every sample of the manifest is there exactly once, and every part as committed.

    Args:
        deep: read the parts and check their sha256 and keys too.
    """
    from pipeline.run import verify as verify_run
    from pipeline.screen import count

    found = verify_run(run, deep=deep)
    for line in (*found.problems, *(f"note: {note}" for note in found.notes)):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    verdict = count(len(found.problems), "problem") if found.problems else "clean"
    console.print(f"{run}: {verdict}", highlight=False, soft_wrap=True)
    return UNCLEAN if found.problems else OK


@app.command(group=RUNS)
def query(run: Run, sql: str, /, *, out: str | None = None) -> int:
    """SQL over the committed rows: views latents, images and commits (DuckDB).

    Args:
        sql: e.g. "SELECT sample_key, psnr FROM latents ORDER BY psnr LIMIT 10".
        out: write the result to a .csv, .json or .parquet file instead of printing it.
    """
    from tasks.query import export
    from tasks.query import query as run_query

    found = run_query(run, sql)
    if out is not None:
        export(found, out)
        console.print(f"{found.num_rows} rows written to {out}", highlight=False)
        return OK
    from pipeline.screen import query_table

    console.print(query_table(found, console.width))
    return OK


@app.command(group=RUNS)
def report(run: Run, /) -> int:
    """Write the run's page of pictures and figures, one HTML file."""
    from pipeline.run import report as write_report

    console.print(write_report(run), highlight=False, soft_wrap=True)
    return OK


@app.command(group=MODELS)
def methods() -> int:
    """List the inversion methods and their settings."""
    from pipeline.method_table import method_table

    console.print(method_table())
    return OK


@app.command(group=MODELS)
def convert(source: str, target: str, /, *, half: bool = False, terms: str | None = None) -> int:
    """Convert a checkpoint. The target's ending decides: .safetensors is ours, .pt is rosinality's.

    Args:
        source: rosinality .pt, NVIDIA .pkl (nothing in it is executed), ours, or a bundled name.
        target: file to write.
        half: store half precision (.safetensors).
        terms: licence line for the card.
    """
    import torch

    from models.checkpoints.convert import convert as convert_checkpoint

    card = {} if terms is None else {"terms": terms}
    dtype = torch.float16 if half else torch.float32
    for path in convert_checkpoint(source, target, dtype=dtype, card=card):
        console.print(str(path), highlight=False, soft_wrap=True)
    return OK


@app.command(group=MODELS)
def statistics(generator: str, target: str, /, *, samples: int = 10_000, seed: int = 0) -> int:
    """Compute what methods need to know of a generator: latent average, PCA, style statistics.

    Args:
        generator: a bundled name or a checkpoint.
        target: .safetensors file to write.
        samples: draws of z.
        seed: of the draws.
    """
    from models.checkpoints.load import load_generator
    from models.statistics import compute_statistics, save_statistics

    save_statistics(compute_statistics(load_generator(generator), samples, seed), target)
    console.print(target, highlight=False, soft_wrap=True)
    return OK


@app.command(group=MODELS)
def train(
    what: str,
    /,
    *,
    config: Config = None,
    sets: Sets = None,
    workers: int = 1,
) -> int:
    """Train a network from a TOML config; run the same command again to resume.

    Args:
        what: generator, trunk, a method's network (e4e, psp, w-encoder, lsap, cycle, clcae-align,
            clcae, refine), or release: the bundle of a trained generator.
        workers: GPUs (or CPU processes) to train on, by Ray Train; 1 trains in this process.
    """
    from pipeline.train import train as train_network

    logging.getLogger("tasks.training").setLevel(logging.INFO)
    found = train_network(what, config, sets or [], workers)
    console.print(str(found), highlight=False, soft_wrap=True)
    return OK


@app.command(group=MODELS)
def benchmark(
    what: Literal["inversion"],
    out: str = "runs/benchmark",
    /,
    *,
    data: str,
    limit: int | None = None,
    methods: str | None = None,
    weights: str | None = None,
    generator: str = "faces64",
    engine: Literal["ray", "inline"] = "ray",
) -> int:
    """Compare all inversion methods on the same pictures: a table, a plot, a grid. Run the same
    command again to resume; finished runs are not computed again.

    Args:
        what: inversion.
        out: folder for the table and one run for each chain.
        data: pictures at the generator's size, e.g. a Parquet file.
        limit: only the first pictures.
        methods: rows of the table, separated by commas; all without it.
        weights: folder of trained networks, <method>.safetensors; the bundled ones without it.
        generator: a bundled name or a checkpoint.
        engine: where the runs are computed; inline is a loop in this process.
    """
    from pipeline.benchmark import benchmark_inversion

    page = benchmark_inversion(
        out,
        data=data,
        limit=limit,
        methods=methods.split(",") if methods else None,
        weights=weights,
        generator_name=generator,
        engine=engine,
        console=error_console,
    )
    console.print(str(page), highlight=False, soft_wrap=True)
    return OK


def main() -> None:
    """The console script."""
    # A preempted machine sends SIGTERM: leave as with Ctrl-C.
    signal.signal(signal.SIGTERM, _interrupt)
    sys.exit(run_app(sys.argv[1:]))


def run_app(tokens: list[str]) -> int:
    """Run one command.

    Returns:
        The exit code; errors of ours are one line on stderr, with --debug a traceback.
    """
    is_debug = "--debug" in tokens
    tokens = [token for token in tokens if token != "--debug"]
    _set_up_logging(is_debug)
    try:
        code = app(tokens, exit_on_error=False, result_action="return_value")
        return code if isinstance(code, int) else OK
    except CycloptsError:
        return WRONG  # cyclopts has printed it
    except BaseException as error:
        return _end(error, is_debug)


def _end(error: BaseException, is_debug: bool) -> int:
    """Say what went wrong; the exit code."""
    # Inside Ray's own loops an interrupt surfaces as the cause of a SystemError.
    if any(isinstance(e, KeyboardInterrupt) for e in _causes(error)):
        error_console.print("stopped; what is committed is kept, run again to go on")
        return STOPPED
    if isinstance(error, RefineryError):
        return _complain("error", error, is_debug, WRONG)
    if isinstance(error, Exception):
        return _complain(f"internal error ({type(error).__name__})", error, is_debug, BUG)
    raise error


def _causes(error: BaseException) -> list[BaseException]:
    from pipeline.faults import causes

    return causes(error)


def _complain(what: str, error: Exception, is_debug: bool, code: int) -> int:
    if is_debug:
        error_console.print_exception()
    hint = "" if is_debug or code != BUG else "\nrun again with --debug for the traceback"
    error_console.print(f"[red]{what}:[/red]", end=" ", highlight=False)
    error_console.print(f"{error}{hint}", highlight=False, markup=False, soft_wrap=True)
    return code


def _interrupt(number: int, frame: Any) -> None:
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
