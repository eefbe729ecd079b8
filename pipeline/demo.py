"""`refinery demo`: the whole road on a small sample, on a local Ray, without a server."""

from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from pipeline.config import InvertConfig, RunConfig, load_config
from pipeline.estimate import estimate
from pipeline.progress import adaptation_line, progress_line
from pipeline.run import Summary
from pipeline.screen import domains_table, query_table, show_summary

METHODS = ("e4e", "wplus")
SETS = ("method.1.steps=20",)
SQL = """SELECT split_part(sample_key, ':', -1) AS picture, status, error_kind,
    round(psnr, 2) AS psnr, round(ssim, 3) AS ssim
FROM latents ORDER BY status, psnr DESC"""
EDITS = ("age", "smile")
DOMAIN, STYLE, ADAPT_STEPS = "painted", "fantasy painting of a face", 40
PHOTO_EDITS = {"age": "+2", "smile": "+2"}
EDITS_SQL = "SELECT variant, count(*) AS pictures, avg(drift) AS drift FROM edits GROUP BY variant"


def run_demo(
    console: Console,
    error_console: Console,
    out: str,
    config: str | None = None,
    adapt_steps: int = ADAPT_STEPS,
) -> int:
    """Make the sample, plan, invert (e4e, then 20 steps of wplus), query; learn a domain from a
    text, edit what was inverted; find the face in a photograph, edit it and put it back; report.

    Args:
        out: a new folder `demo-<time>` is made in it.
        config: TOML file to run with instead of the bundled generator and this chain.
        adapt_steps: of the adaptation.

    Returns:
        0 when every stage did what it should.
    """
    from models.checkpoints.load import load_generator
    from pipeline.demo_data import write_demo_shard
    from pipeline.run import carry_out
    from tasks.run.query import query

    folder = Path(out) / f"demo-{datetime.now():%Y%m%d-%H%M%S}"
    _say(console, "A sample: pictures drawn by the generator, one photograph, three broken files")
    chain = [f"--config {config}"] if config else [f"--method {name}" for name in METHODS]
    sets = () if config else SETS
    settings = load_config(config, sets, () if config else METHODS)
    generator = load_generator(settings.job.generator)
    source = write_demo_shard(folder / "pictures", generator=generator)
    run_uri = str(folder / "run")

    _say(console, f"refinery plan {source}")
    console.print(estimate(source, settings, limit=None, count=8))

    flags = " ".join([*chain, *(f"--set {item}" for item in sets)])
    _say(console, f"refinery invert {source} {run_uri} {flags}")
    with progress_line(error_console) as on_progress:
        summary = carry_out(source, run_uri, settings, on_progress=on_progress)
    show_summary(console, summary)

    _say(console, f'refinery query {run_uri} "{" ".join(SQL.split())}"')
    console.print(query_table(query(run_uri, SQL), console.width))

    edited = _edit(console, error_console, folder, run_uri, settings, adapt_steps)
    composed = _compose(console, error_console, folder, settings)
    _say(console, "The reports, each one file to open in a browser")
    done = [summary, edited, *composed]
    for found in done:
        console.print(Text(str(Path(found.report_uri).absolute())), soft_wrap=True)
    return 0 if all(found.is_clean for found in done) else 1


def _compose(
    console: Console, error_console: Console, folder: Path, made: InvertConfig
) -> list[Summary]:
    """A raw photograph: align, invert, edit, compose. What it needs and is not there is said."""
    from models.checkpoints.load import load_generator
    from models.editing.find import known_directions
    from models.errors import AssetError
    from pipeline.config import load_stored_config
    from pipeline.demo_data import write_demo_photograph
    from pipeline.edit import Wishes, load_edit_config
    from pipeline.run import carry_out
    from tasks.input.detect import load_mtcnn

    generator = load_generator(made.job.generator)
    known = known_directions(generator, ())
    wished = [f"{name}={strength}" for name, strength in PHOTO_EDITS.items() if name in known]
    lacks = None if wished else f"no direction fits the generator {made.job.generator}"
    if lacks is None and "template" not in generator.provenance.get("card", {}):
        lacks = f"the card of the generator {made.job.generator} names no template of a face"
    try:
        load_mtcnn()
    except AssetError as error:
        lacks = lacks or str(error)
    if lacks is not None:
        _say(console, f"A photograph is left out: {lacks}")
        return []
    photos, place = write_demo_photograph(folder / "photos"), str(folder / "photo")
    flags = "".join(f" --edit {wish}" for wish in wished)
    inverted, edited, composed = (f"{place}-{what}" for what in ("run", "edits", "composed"))
    _say(console, f"refinery invert {photos} {inverted} --align")
    input = replace(made.job.input, fit="align", detector="mtcnn")
    engine = [f"engine.kind={made.engine.kind}"]
    config: RunConfig[Any] = replace(made, job=replace(made.job, input=input))
    summaries = []
    with progress_line(error_console) as on_progress:
        summaries.append(carry_out(photos, inverted, config, on_progress=on_progress))
        _say(console, f"refinery edit {inverted} {edited}{flags} --each")
        config = load_edit_config(inverted, None, engine, Wishes(edits=wished, is_each=True))
        summaries.append(carry_out(inverted, edited, config, on_progress=on_progress))
        _say(console, f"refinery compose {edited} {composed}")
        config = load_stored_config("compose", edited, None, engine)
        summaries.append(carry_out(edited, composed, config, on_progress=on_progress))
    for path in sorted(Path(composed).glob("photos/*/*")):
        console.print(Text(str(path.absolute())), soft_wrap=True)
    return summaries


def _edit(
    console: Console,
    error_console: Console,
    folder: Path,
    run_uri: str,
    made: InvertConfig,
    steps: int,
) -> Summary:
    """A domain from a text, then edits: those that ship for the generator, and that domain."""
    from models.adaptation.domain import known_domains
    from models.checkpoints.load import load_generator
    from models.editing.find import known_directions
    from pipeline.adapt import load_adapt_config
    from pipeline.edit import Wishes, load_edit_config
    from pipeline.run import carry_out
    from tasks.adapt.job import adapt
    from tasks.run.query import query

    sets = [f"steps={steps}", f"out={folder}/domains"]
    _say(
        console, f'refinery adapt {DOMAIN} --text "{STYLE}" --out {folder}/domains --set {sets[0]}'
    )
    wished = {"name": DOMAIN, "guidance": "text", "target_text": STYLE}
    job = load_adapt_config(None, [*sets, f"generator={made.job.generator}"], domains=[wished])
    with adaptation_line(error_console) as on_steps:
        learnt = adapt(job, on_steps)
    console.print(domains_table(learnt))

    generator = load_generator(made.job.generator)
    edits = [f"{name}=+2" for name in EDITS if name in known_directions(generator, ())]
    domains = [*sorted(known_domains(generator, ()))[:1], *map(str, learnt)]
    flags = " ".join([*(f"--edit {e}" for e in edits), *(f"--domain {d}" for d in domains)])
    edits_uri = str(folder / "edits")
    _say(console, f"refinery edit {run_uri} {edits_uri} {flags} --each")
    wishes = Wishes(edits=edits, domains=domains, is_each=True)
    engine = [f"engine.kind={made.engine.kind}"]
    with progress_line(error_console) as on_progress:
        settings = load_edit_config(run_uri, None, engine, wishes)
        summary = carry_out(run_uri, edits_uri, settings, on_progress=on_progress)
    show_summary(console, summary)
    _say(console, f'refinery query {edits_uri} "{EDITS_SQL}"')
    console.print(query_table(query(edits_uri, EDITS_SQL), console.width))
    return summary


def _say(console: Console, text: str) -> None:
    console.print(Text.assemble("\n", ("==> ", "bold"), text), soft_wrap=True)
