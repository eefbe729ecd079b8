"""What the command line prints: short tables, nothing that a log file cannot hold. What reads
pictures waits inside: a question needs none of it."""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.progress import duration
from tasks.report.words import counted, size

if TYPE_CHECKING:
    import pyarrow as pa

    from pipeline.run import Summary
    from pipeline.status import Status
    from tasks.catalogue.diff import Difference

MAX_QUERY_ROWS = 50
MAX_QUERY_RECORDS = 10
MIN_COLUMN = 10
MAX_CELL = 60


def pairs(title: str, values: Mapping[str, Any], style: str = "cyan") -> Table:
    """Names and values, one a line."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style=style, no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in values.items():
        table.add_row(Text(name), Text(str(value)))
    return table


def show_summary(console: Console, summary: "Summary") -> None:
    """The end of `invert`."""
    from tasks.input.plan import in_words
    from tasks.run.manifest import read_skipped

    outcome = summary.outcome
    values: dict[str, Any] = {
        "run": outcome.run_uri,
        "rows": f"{outcome.rows} in {outcome.num_shards} shards, {outcome.failed} failed",
        "this time": f"{outcome.rows_now} rows in {duration(outcome.seconds)} "
        f"({outcome.images_per_s:.1f} images/s) after {outcome.startup_s:.1f} s of start-up",
        "skipped": in_words(read_skipped(outcome.run_uri)) or "nothing",
        "verify": counted(len(summary.problems), "problem") if summary.problems else "clean",
        "report": summary.report_uri,
    }
    values |= {each.name: each.both for each in summary.forecast}
    if summary.warning is not None:
        values["warning"] = summary.warning
    console.print(pairs("", values))
    if outcome.quarantined:
        console.print(reasons("Quarantined shards (run again to retry)", outcome.quarantined))
    given_up = tuple(f"shard {shard:05d}: given up" for shard in outcome.quarantined)
    others = [problem for problem in summary.problems if not problem.startswith(given_up)]
    if others:
        console.print(reasons("Problems", dict(enumerate(others))))


def show_status(console: Console, status: "Status") -> None:
    """The answer of `status`."""
    from tasks.input.plan import in_words

    state = "sealed" if status.is_sealed else "open"
    total = "" if status.rows_total is None else f" of {status.rows_total}"
    shards = f"{status.num_committed} of {status.num_shards} committed"
    values: dict[str, Any] = {
        "run": f"{status.run_uri} ({status.run_id}, {state})",
        "shards": f"{shards}, {status.num_pending} pending",
        "rows": f"{status.rows}{total}",
        "failed rows": _counts(status.failed, status.failures),
        "skipped": in_words(status.skipped) or "nothing",
        "last commit": status.last_commit_at or "none yet",
    }
    if status.driver:
        values["driver"] = status.driver
    if status.at_work:
        values["at work"] = ", ".join(
            f"shard {shard:05d}: {rows} rows in {seconds:.0f} s"
            for shard, rows, seconds in status.at_work
        )
    if status.images_per_s is not None:
        values["pace"] = f"{status.images_per_s:.1f} images/s from first start to last commit"
        values["busy"] = ", ".join(f"{k} {v:.1f} s" for k, v in status.seconds.items())
    console.print(pairs("", values))
    if status.quarantined:
        console.print(reasons("Quarantined shards (run again to retry)", status.quarantined))
    if status.problems:
        console.print(reasons("Problems", dict(enumerate(status.problems))))


def domains_table(folders: Sequence[Path]) -> Table:
    """The end of `adapt`: what each domain's card says."""
    numbers = ("steps", "score", "size")
    table = headed(("domain", "status", *numbers, "preview"), numbers)
    for folder in folders:
        card = json.loads((folder / "card.json").read_text())
        status = f"{card['status']}: {card['note']}" if card["note"] else card["status"]
        table.add_row(
            Text(str(folder)),
            Text(status),
            f"{card['best_step']} of {card['steps']}",
            f"{card['score']:.4g}",
            size(card["bytes"]),
            Text(str(folder / "preview.png")),
        )
    return table


def reasons(title: str, found: Mapping[int, str]) -> Table:
    """Reasons by number."""
    return pairs(title, {f"{number:05d}": reason for number, reason in found.items()}, "red")


def query_table(found: "pa.Table", width: int) -> Table:
    """The first rows of a result; long lists are cut, pictures named by their size.

    Args:
        width: of the terminal, characters; a result with too many columns for it is shown with one
            value a line.
    """
    if len(found.column_names) * MIN_COLUMN > width:
        return _query_records(found)
    kinds = ("int", "uint", "float", "double")
    numbers = [field.name for field in found.schema if str(field.type).startswith(kinds)]
    table = headed(found.column_names, numbers)
    for row in found.slice(0, MAX_QUERY_ROWS).to_pylist():
        table.add_row(*(Text(cell(value)) for value in row.values()))
    table.caption = _cut_note(found, MAX_QUERY_ROWS)
    return table


def runs_table(found: "pa.Table") -> Table:
    """The answer of `runs`."""
    names = ("run", "kind", "method", "generator", "state")
    numbers = ("rows", "failed", "shards", "size", "worker time")
    table = headed((*names, *numbers, "created", "finished"), numbers)
    for row in found.to_pylist():
        table.add_row(
            *(Text(str(row[name] or "")) for name in names),
            str(row["rows"]),
            str(row["failed"]),
            f"{row['committed']} of {row['shards']}",
            size(row["bytes"]),
            duration(row["worker_s"]),
            *(str(row[n] or "")[:16].replace("T", " ") for n in ("created_at", "finished_at")),
        )
    return table


def show_diff(console: Console, found: "Difference") -> None:
    """The answer of `diff`."""
    console.print(pairs("", found.counts))
    numbers = ("rows", "A", "B", "B - A", "effect", "p")
    table = headed(("metric", *numbers, "verdict"), numbers)
    for drift in found.drifts:
        table.add_row(
            Text(drift.name),
            str(drift.rows),
            *(cell(v) for v in (drift.before, drift.after, drift.change, drift.effect, drift.p)),
            Text(drift.verdict),
        )
    table.caption = "p: probability of such a change by chance, over all rows of the table (Holm)"
    console.print(table)


def _query_records(found: "pa.Table") -> Table:
    table = Table(title_justify="left", show_header=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for row in found.slice(0, MAX_QUERY_RECORDS).to_pylist():
        for name, value in row.items():
            table.add_row(Text(name), Text(cell(value)))
        table.add_section()
    table.caption = _cut_note(found, MAX_QUERY_RECORDS)
    return table


def _cut_note(found: "pa.Table", shown: int) -> str | None:
    if found.num_rows <= shown:
        return None
    return (
        f"the first {shown} of {found.num_rows} rows; --out FILE.csv, .json or .parquet writes all"
    )


def cell(value: Any) -> str:
    """One value, short."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {cell(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        shown = ", ".join(cell(v) for v in value[:3])
        return f"[{shown}{f', ... {len(value)}' if len(value) > 3 else ''}]"
    text = str(value)
    return text if len(text) <= MAX_CELL else text[: MAX_CELL - 3] + "..."


def headed(names: Sequence[str], numbers: Collection[str], title: str | None = None) -> Table:
    """A table with columns of these names, those of numbers to the right."""
    shown = Text(title, "table.title") if title else None
    table = Table(title=shown, title_justify="left", header_style="bold")
    for name in names:
        justify = "right" if name in numbers else "left"
        table.add_column(Text(name), justify=justify, overflow="fold")
    return table


def _counts(total: int, by_kind: Mapping[str, int]) -> str:
    detail = ", ".join(f"{kind} {count}" for kind, count in by_kind.items())
    return f"{total} ({detail})" if detail else str(total)
