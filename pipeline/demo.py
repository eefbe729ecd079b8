"""`refinery demo`: the whole road on a small sample, on a local Ray, without a server."""

from datetime import datetime
from pathlib import Path

from rich.console import Console

from pipeline.config import load_config
from pipeline.estimate import estimate
from pipeline.progress import progress_line
from pipeline.screen import query_table, show_summary

METHODS = ("e4e", "wplus")
SETS = ("method.1.steps=20",)
SQL = """SELECT split_part(sample_key, ':', -1) AS picture, status, error_kind,
    round(psnr, 2) AS psnr, round(ssim, 3) AS ssim
FROM latents ORDER BY status, psnr DESC"""


def run_demo(console: Console, error_console: Console, out: str, config: str | None = None) -> int:
    """Make the sample, plan, invert (e4e, then 20 steps of wplus), query, report.

    Args:
        out: a new folder `demo-<time>` is made in it.
        config: TOML file to run with instead of the bundled generator and this chain.

    Returns:
        0 when every stage did what it should.
    """
    from models.checkpoints.load import load_generator
    from pipeline.run import invert
    from tasks.demo_data import write_demo_shard
    from tasks.query import query

    folder = Path(out) / f"demo-{datetime.now():%Y%m%d-%H%M%S}"
    _say(console, "A sample: pictures drawn by the generator, one photograph, three broken files")
    chain = [f"--config {config}"] if config else [f"--method {name}" for name in METHODS]
    sets = () if config else SETS
    settings = load_config(config, sets, () if config else METHODS)
    generator = load_generator(settings.generator)
    source = write_demo_shard(folder / "pictures", generator=generator)
    run_uri = str(folder / "run")

    _say(console, f"refinery plan {source}")
    console.print(estimate(source, settings, limit=None, count=8))

    flags = " ".join([*chain, *(f"--set {item}" for item in sets)])
    _say(console, f"refinery invert {source} {run_uri} {flags}")
    with progress_line(error_console) as on_progress:
        summary = invert(source, run_uri, settings, on_progress=on_progress)
    show_summary(console, summary)

    _say(console, f'refinery query {run_uri} "{" ".join(SQL.split())}"')
    console.print(query_table(query(run_uri, SQL), console.width))

    _say(console, "The report, one file to open in a browser")
    console.print(str(Path(summary.report_uri).absolute()), highlight=False, soft_wrap=True)
    return 0 if summary.is_clean else 1


def _say(console: Console, text: str) -> None:
    console.print(f"\n[bold]==> [/bold]{text}", highlight=False, soft_wrap=True)
