"""The pages as HTML text: an index of runs, a grid of rows, one picture, statistics, SQL.

Values of a run go to the templates as they are, which escape them.
"""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from models.errors import RefineryError
from models.inversion.base import Inversion
from tasks.browse.address import Parameters, first, link, page_link, wish_of, wished
from tasks.browse.library import BrowsedRun, Library
from tasks.browse.neighbours import Neighbours
from tasks.browse.sql import Answer
from tasks.browse.studio import Photo, Slider, Studio
from tasks.browse.table import PAGE, Page
from tasks.job import INPUTS
from tasks.report.look import environment
from tasks.report.results import METRIC_NOTES, histogram
from tasks.report.statistics import FAR, read_statistics
from tasks.run.ledger import shard_name

VARIANTS_SHOWN = 3
"""Edits that a grid shows of each row where nobody chose."""
NEIGHBOURS = 12
TEXTS = ("image_uri", "image_sha256", "method", "seed", "run_id")
"""Columns of a row that say where it comes from."""
EXAMPLES = (
    "SELECT error_kind, count(*) AS rows FROM latents GROUP BY ALL",
    "SELECT sample_key, {metric} FROM latents WHERE status = 'ok' ORDER BY {metric} LIMIT 20",
    "SELECT shard, rows, failed, wall_s, device FROM shards ORDER BY wall_s DESC LIMIT 10",
)


def _page(template: str, **values: Any) -> str:
    values = {"link": link, "tab": template.removesuffix(".html"), **values}
    return environment("tasks.browse").get_template(template).render(values)


def index_page(library: Library) -> str:
    """Every run, newest first."""
    return _page("index.html", place=library.place, cards=library.cards(), run=None, tab="")


def error_page(status: int, error: str) -> str:
    """What is wrong, in the words of the error."""
    return _page("error.html", status=status, error=error, run=None, tab="")


# ------------------------------------------------------------------ the grid


def shown_columns(run: BrowsedRun, parameters: Parameters) -> list[str]:
    """The pictures that a grid shows of each row."""
    stored = run.declared.pictures
    chosen = [name for name in stored if name in parameters.get("show", ())]
    if chosen:
        return chosen
    variants = run.declared.variants
    base = [name for name in stored if name not in variants]
    if variants:
        base = [name for name in base if name not in INPUTS]
    return [*base, *variants[:VARIANTS_SHOWN]]


def grid_page(run: BrowsedRun, parameters: Parameters) -> str:
    """A page of rows, and the form that asks for others.

    Raises:
        ConfigError: the address asks for what is not there, or a condition is wrong.
    """
    wish = wish_of(parameters, run.table.metrics)
    found, problem = Page(rows=[], total=0, before=None, after=None), ""
    try:
        found = run.table.page(wish)
    except RefineryError as error:
        problem = str(error)
    at = int(first(parameters, "at", "0") or 0) if first(parameters, "at").isdigit() else 0
    return _page(
        "grid.html",
        run=run,
        wish=wish,
        page=found,
        problem=problem,
        at=at,
        columns=shown_columns(run, parameters),
        spans=run.table.spans,
        value_of=wish.sort if wish.sort in run.table.metrics else "",
        before=page_link(parameters, found.before, max(at - PAGE, 0)),
        after=page_link(parameters, found.after, at + len(found.rows)),
        all_keys=link("/keys", **wished(parameters)),
        filters=len(wish.ranges) + bool(wish.where.strip()),
    )


# ------------------------------------------------------------------ one picture


@dataclass(frozen=True, kw_only=True)
class LiveEditor:
    """What the live editor needs.

    Attributes:
        base: address of the render, without the sliders' values: the unedited picture.
        groups: sliders under their headings.
        run_uri: for the command that does the same to a whole run.
        problem: why there are no sliders.
    """

    base: str = ""
    groups: tuple[tuple[str, list[Slider]], ...] = ()
    run_uri: str = ""
    resolution: int = 0
    problem: str = ""


def _groups(sliders: Sequence[Slider]) -> tuple[tuple[str, list[Slider]], ...]:
    titles = {"direction": "Directions", "domain": "Domains", "residual": "Own detail"}
    by_kind = {t: [s for s in sliders if s.kind == kind] for kind, t in titles.items()}
    return tuple((title, found) for title, found in by_kind.items() if found)


def _live_editor(base: str, studio: Studio, inversion: Inversion, run: BrowsedRun) -> LiveEditor:
    groups = _groups(studio.sliders(inversion))
    resolution = studio.generator.resolution
    return LiveEditor(base=base, groups=groups, run_uri=run.uri, resolution=resolution)


def stage_of(library: Library, run: BrowsedRun, key: str) -> LiveEditor:
    """The live editor of a stored sample; without sliders where it cannot be rendered."""
    try:
        source = library.codes_of(run)
        studio = library.studio(source)
        inversion = studio.sample(source.shard_of(key), key)
    except RefineryError as error:
        return LiveEditor(problem=str(error))
    if inversion is None:
        return LiveEditor(problem="This sample was not inverted.")
    base = link("/render", run=source.name, key=key, version=source.version)
    return _live_editor(base, studio, inversion, source)


def picture_page(library: Library, run: BrowsedRun, key: str) -> str:
    """One sample: live editor, stored pictures, metrics, provenance.

    Raises:
        UnknownError: there is no such sample.
    """
    shard = run.shard_of(key)
    row = run.table.row(key) or {}
    is_ok = row["status"] == "ok"
    ranks = run.table.ranks(row) if is_ok else {}
    marker = run.markers[shard]
    return _page(
        "picture.html",
        run=run,
        tab="grid",
        key=key,
        row=row,
        is_ok=is_ok,
        stage=stage_of(library, run, key) if is_ok else LiveEditor(problem=""),
        metrics=[(name, row[name], ranks[name]) for name in run.table.metrics if name in ranks],
        notes=METRIC_NOTES,
        provenance=[
            *((name, row[name]) for name in TEXTS if row.get(name) is not None),
            ("shard", f"{shard_name(shard)}, attempt {marker.attempt}"),
            ("committed", marker.finished_at),
            ("device", marker.device),
            ("code version", marker.code_version),
            ("generator", run.record["config"]["generator"]),
            ("generator sha256", run.record["weights"].get("generator", "")),
        ],
    )


def neighbours_part(run: BrowsedRun, near: Neighbours) -> str:
    """The nearest codes, as a part of the picture's page."""
    columns = shown_columns(run, {})
    column = next((c for c in columns if c not in INPUTS), next(iter(columns), ""))
    shards = run.table.shards([key for key, _ in near.found])
    return _page("neighbours.html", run=run, near=near, shards=shards, column=column)


# ------------------------------------------------------------------ a photo of one's own


def photo_page(library: Library, run: BrowsedRun, token: str, photo: Photo | None) -> str:
    """The place to drop a photo; with one, its inversion and the live editor."""
    stage = LiveEditor()
    if photo is not None:
        base = link("/render", run=run.name, photo=token)
        stage = _live_editor(base, library.studio(run), photo.inversion, run)
    return _page(
        "photo.html",
        run=run,
        token=token,
        photo=photo,
        stage=stage,
        notes=METRIC_NOTES,
    )


def new_token() -> str:
    """A name for an uploaded photo that nobody guesses."""
    return secrets.token_urlsafe(16)


# ------------------------------------------------------------------ statistics and SQL


def statistics_page(library: Library, run: BrowsedRun, against: str) -> str:
    """Distributions, outliers, clusters, drift.

    Raises:
        UnknownError: the run to compare with is not among those that are browsed.
        LedgerError: a part is damaged.
    """
    other = library.uri(against) if against else None
    metrics, statistics = read_statistics(run.uri, other)
    return _page(
        "statistics.html",
        run=run,
        histograms=[histogram(metric) for metric in metrics],
        found=statistics,
        against=against,
        others=[name for name in library.names() if name != run.name],
        far=FAR,
        links=lambda key: link("/picture", run=run.name, key=key),
    )


def sql_page(run: BrowsedRun, sql: str, answer: Answer | None, problem: str) -> str:
    """The SQL box with what it answered."""
    metric = next(iter(run.table.metrics), "seed")
    examples = [text.format(metric=f'"{metric}"') for text in EXAMPLES]
    return _page(
        "sql.html",
        run=run,
        sql=sql,
        answer=answer,
        problem=problem,
        examples=examples,
        columns=run.table.columns,
    )
