"""The HTML page of a run: one file, no script, no external resource.

Every value that comes from a run is escaped where it is written, and a content security policy
forbids scripts and loads, so a hostile file name or error text stays text.
"""

import shlex
from html import escape

from tasks.input.plan import in_words
from tasks.report.aggregates import FAILURES_SHOWN
from tasks.report.data import ReportData
from tasks.report.edits import edit_pictures, edit_summary
from tasks.report.results import metrics, pictures, stages, throughput
from tasks.report.style import CSS
from tasks.report.words import counted, duration, number, pre, table, when

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def render_page(data: ReportData) -> str:
    """The whole page as HTML text."""
    name = data.run_uri.rstrip("/").rsplit("/", 1)[-1]
    edits = data.edits
    parts = [
        ("pictures", "Pictures", edit_pictures(edits) if edits else pictures(data)),
        *([("edits", "Edits", edit_summary(edits))] if edits else []),
        ("metrics", "Metrics", metrics(data)),
        ("throughput", "Throughput", throughput(data)),
        ("stages", "Where the time went", stages(data)),
        ("failures", "Failures", _failures(data)),
        ("quarantine", "Quarantined shards", _quarantine(data)),
        ("query", "Ask this run", _how_to_query(data)),
    ]
    links = "".join(f'<li><a href="#{key}">{title}</a></li>' for key, title, _ in parts)
    body = "".join(
        f'<section id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">{title}</h2>'
        f"{content}</section>"
        for key, title, content in parts
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Run {escape(name)}</title><style>{CSS}</style></head><body>"
        f"<header><h1>Run {escape(name)}</h1>{_lead(data)}"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>{_facts(data)}</header>'
        f"<main>{body}</main>"
        f"<footer>Written by <code>refinery report</code> from the committed parts of "
        f'<span class="mono">{escape(data.run_uri)}</span>.</footer></body></html>\n'
    )


# ------------------------------------------------------------------ header


def _lead(data: ReportData) -> str:
    chain = " then ".join(data.methods) or "no method"
    done = data.rows - data.failed
    what = f"inverted with {escape(chain)}"
    if data.edits:
        count = counted(len(data.edits.variants), "edit")
        what = f'of <span class="mono">{escape(data.edits.source)}</span> rendered with {count}'
    text = (
        f"{number(done)} of {counted(data.rows, 'picture')} {what} in "
        f"{duration(data.timeline.seconds)} of working time."
    )
    if data.is_sealed:
        state = '<span class="state good">Complete and sealed.</span>'
    else:
        state = (
            f'<span class="state bad">Not sealed: {data.shards_done} of '
            f"{counted(data.shards_planned, 'shard')} committed.</span>"
        )
    return f'<p class="lead">{text} {state}</p>'


def _facts(data: ReportData) -> str:
    seconds = data.timeline.seconds
    rate = f"{data.rows / seconds:.3g}" if seconds > 0 else "unknown"
    line = data.timeline
    facts = [
        ("Rows", number(data.rows), "big"),
        ("Failed rows", number(data.failed), "big"),
        ("Quarantined shards", number(len(data.quarantined)), "big"),
        ("Images/s", rate, "big"),
        ("Method chain", " \N{RIGHTWARDS ARROW} ".join(data.methods), ""),
        ("Device", ", ".join(data.devices) or "unknown", ""),
        ("Shards", f"{number(data.shards_done)} of {number(data.shards_planned)}", ""),
        ("Working time", duration(seconds), ""),
        ("Files skipped", in_words(data.skipped) or "none", ""),
        ("First shard started", when(line.first), ""),
        ("Last commit", when(line.last), ""),
        ("Code version", ", ".join(data.code_versions), "mono"),
        ("Run id", data.run_id, "mono"),
        ("Generator", data.generator, ""),
        ("Generator sha256", data.weights.get("generator", "unknown"), "mono wide"),
    ]
    cells = []
    for term, value, kind in facts:
        wide = ' class="wide"' if "wide" in kind else ""
        css = f' class="{kind}"' if kind else ""
        cells.append(f"<div{wide}><dt>{term}</dt><dd{css}>{escape(value)}</dd></div>")
    notes = "".join(
        f"<li>{escape(note)} ({counted(shards, 'shard')})</li>" for note, shards in data.notes
    )
    listed = f"<h2 class='small'>Notes of the workers</h2><ul>{notes}</ul>" if notes else ""
    return f'<dl class="facts">{"".join(cells)}</dl>{listed}'


# ------------------------------------------------------------------ what went wrong


def _failures(data: ReportData) -> str:
    if not data.failed:
        return "<p>No row failed.</p>"
    kinds = "".join(
        f'<tr><th scope="row"><code>{escape(kind)}</code></th>'
        f'<td class="n">{number(count)}</td></tr>'
        for kind, count in data.failed_by_kind
    )
    rows = "".join(
        f'<tr><td class="key mono">{escape(key)}</td><td><code>{escape(kind)}</code></td>'
        f'<td class="reason">{escape(reason)}</td></tr>'
        for key, kind, reason in data.failed_rows
    )
    shown = (
        f"<p>The first {FAILURES_SHOWN} of {number(data.failed)}; the query below lists all.</p>"
        if data.failed > FAILURES_SHOWN
        else ""
    )
    return (
        "<p>A picture that cannot be inverted stays in the run as a row with its reason.</p>"
        + table(
            '<tr><th scope="col">Kind</th><th scope="col" class="n">Rows</th></tr>',
            kinds,
            "Failures by kind",
        )
        + f'<h3 style="margin-top:20px">Rows</h3>{shown}'
        + table(
            '<tr><th scope="col">Sample</th><th scope="col">Kind</th>'
            '<th scope="col">Reason</th></tr>',
            rows,
            "Failed rows",
        )
    )


def _quarantine(data: ReportData) -> str:
    if not data.quarantined:
        return "<p>No shard was given up.</p>"
    rows = "".join(
        f'<tr><td class="n">{shard}</td><td class="n">{attempts}</td>'
        f'<td class="reason">{escape(reason)}</td></tr>'
        for shard, attempts, reason in data.quarantined
    )
    return "<p>These shards failed every attempt; their samples are not in the parts.</p>" + table(
        '<tr><th scope="col" class="n">Shard</th><th scope="col" class="n">Attempts</th>'
        '<th scope="col">Reason</th></tr>',
        rows,
        "Quarantined shards",
    )


# ------------------------------------------------------------------ asking


def _how_to_query(data: ReportData) -> str:
    run = shlex.quote(data.run_uri)
    metric = data.ranked_by or "sample_key"
    shell = [
        "# the rows that failed, and why",
        f"refinery query {run} \\",
        "  \"SELECT sample_key, error_kind, error FROM latents WHERE status = 'failed'\"",
        "",
        "# the hardest pictures, as CSV",
        f"refinery query {run} --out worst.csv \\",
        f"  \"SELECT sample_key, {metric} FROM latents WHERE status = 'ok' "
        f'ORDER BY {metric} DESC LIMIT 20"',
        "",
    ]
    if data.edits:
        first = shlex.quote(
            f"SELECT * FROM edits WHERE variant = {_sql_text(data.edits.variants[0].name)}"
        )
        shell += ["# what one edit changed", f"refinery query {run} \\", f"  {first}", ""]
    if data.groups:
        key = shlex.quote(f"SELECT * FROM nearest({_sql_text(data.groups[0].pairs[0].key)}, 5)")
        shell += ["# the pictures most like this one", f"refinery query {run} \\", f"  {key}", ""]
    shell += ["# every sample accounted for, every part as committed", f"refinery verify {run}"]
    python = [
        "from tasks.run.query import query",
        "",
        f"run = {data.run_uri!r}",
        "sql = \"SELECT sample_key, w_plus FROM latents WHERE status = 'ok'\"",
        "table = query(run, sql)  # a pyarrow.Table",
    ]
    columns = "".join(
        f'<tr><th scope="row"><code>{escape(view)}</code></th>'
        f'<td class="reason mono">{escape(", ".join(names))}</td></tr>'
        for view, names in data.columns.items()
    )
    head = '<tr><th scope="col">View</th><th scope="col">Columns</th></tr>'
    return (
        "<p>Views read committed parts only. The parts are plain Parquet: DuckDB, pandas, Polars "
        "and Hugging Face <code>datasets</code> open them too.</p>"
        f"{pre(shell)}{pre(python)}{table(head, columns, 'Views and their columns')}"
    )


def _sql_text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"
