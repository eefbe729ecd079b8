"""The HTML page of a run: one file, no script, no external resource.

Templates escape every value that comes from a run, and a content security policy forbids scripts
and loads, so a hostile file name or error text stays text.
"""

import shlex

from markupsafe import Markup

from tasks.input.plan import in_words
from tasks.report.aggregates import FAILURES_SHOWN
from tasks.report.data import ReportData
from tasks.report.edits import edit_pictures, edit_summary
from tasks.report.look import CSS, environment, section
from tasks.report.results import codes, metrics, pictures, stages, throughput
from tasks.report.words import duration, number, size, when
from tasks.run.large import text

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def render_page(data: ReportData) -> str:
    """The whole page as HTML text."""
    edits = data.edits
    has_drift = data.statistics is not None and bool(data.statistics.against)
    parts = [
        ("pictures", "Pictures", edit_pictures(edits) if edits else pictures(data)),
        *([("edits", "Edits", edit_summary(edits))] if edits else []),
        ("metrics", "Metrics", metrics(data)),
        ("codes", "Outliers and clusters", codes(data.statistics)),
        *([("drift", "Drift", section("drift", data.statistics))] if has_drift else []),
        ("throughput", "Throughput", throughput(data)),
        ("stages", "Where the time went", stages(data)),
        ("failures", "Failures", section("failures", data, FAILURES_SHOWN)),
        ("quarantine", "Quarantined shards", section("quarantine", data)),
        ("query", "Ask this run", _query(data)),
    ]
    return (
        environment()
        .get_template("report.html")
        .render(
            name=data.run_uri.rstrip("/").rsplit("/", 1)[-1],
            data=data,
            parts=parts,
            facts=_facts(data),
            css=Markup(CSS),
            policy=POLICY,
        )
    )


def _facts(data: ReportData) -> list[tuple[str, str, str]]:
    seconds = data.timeline.seconds
    rate = f"{data.rows / seconds:.3g}" if seconds > 0 else "unknown"
    line = data.timeline
    return [
        ("Rows", number(data.rows), "big"),
        ("Failed rows", number(data.failed), "big"),
        ("Quarantined shards", number(len(data.quarantined)), "big"),
        ("Images/s", rate, "big"),
        ("Method chain", " \N{RIGHTWARDS ARROW} ".join(data.methods), ""),
        ("Device", ", ".join(data.devices) or "unknown", ""),
        ("Shards", f"{number(data.shards_done)} of {number(data.shards_planned)}", ""),
        ("Working time", duration(seconds), ""),
        ("Disk", size(data.bytes), ""),
        *((f"Predicted {each.name}", each.both, "") for each in data.forecast),
        ("Files skipped", in_words(data.skipped) or "none", ""),
        ("First shard started", when(line.first), ""),
        ("Last commit", when(line.last), ""),
        ("Code version", ", ".join(data.code_versions), "mono"),
        ("Run id", data.run_id, "mono"),
        ("Generator", data.generator, ""),
        ("Generator sha256", data.weights.get("generator", "unknown"), "mono wide"),
    ]


def _query(data: ReportData) -> str:
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
            f"SELECT * FROM edits WHERE variant = {text(data.edits.variants[0].name)}"
        )
        shell += ["# what one edit changed", f"refinery query {run} \\", f"  {first}", ""]
    if data.groups:
        key = shlex.quote(f"SELECT * FROM nearest({text(data.groups[0].pairs[0].key)}, 5)")
        shell += ["# the pictures most like this one", f"refinery query {run} \\", f"  {key}", ""]
    shell += ["# every sample accounted for, every part as committed", f"refinery verify {run}"]
    python = [
        "from tasks.run.query import query",
        "",
        f"run = {data.run_uri!r}",
        "sql = \"SELECT sample_key, w_plus FROM latents WHERE status = 'ok'\"",
        "table = query(run, sql)  # a pyarrow.Table",
    ]
    return section("query", data, "\n".join(shell), "\n".join(python))
