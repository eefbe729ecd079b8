"""Whether a run's pictures look aligned: one line for whoever started it."""

import pyarrow as pa

from tasks.report.aggregates import RANKING, Ask
from tasks.run.large import quoted
from tasks.run.ledger import read_markers
from tasks.run.query import query
from tasks.run.run_json import read_declared

FAR = 6.0
"""Standard deviations above the median (as the median of absolute deviations tells them) from where
on a distance is far outside of its run's; of a normal distribution one value in a billion is."""
SHOWN = 3


def alignment_line(run_uri: str) -> str | None:
    """What a run of inversions says of pictures whose faces are not where the generator has them;
    None where there is nothing to say.

    Raises:
        LedgerError: there is no run, or a part is damaged.
    """
    declared = read_declared(run_uri)
    markers = read_markers(run_uri).values()
    if declared.kind != "invert" or declared.faces or not any(m.parts for m in markers):
        return None

    def ask(sql: str) -> pa.Table:
        return query(run_uri, sql)

    columns = ask("SELECT * FROM latents LIMIT 0").column_names
    if "looks_aligned" in columns:
        return _flagged(ask)
    named = (name for start in RANKING for name in declared.metrics if name.startswith(start))
    metric = next(named, None)
    return None if metric is None else _far(ask, metric)


def _flagged(ask: Ask) -> str | None:
    where, total = "NOT looks_aligned", "count(looks_aligned)"
    keys, count, seen = _found(ask, where, "sample_key", total)
    if not count:
        return None
    return (
        f"{count} of {seen} pictures do not look aligned: no upright face where the generator has "
        f"it ({keys}); query looks_aligned, and use --align for photographs"
    )


def _far(ask: Ask, metric: str) -> str | None:
    name = quoted(metric)
    limit = (
        f"(SELECT median({name}) + {FAR} * 1.4826 * mad({name}) FROM latents WHERE status = 'ok')"
    )
    keys, count, seen = _found(ask, f"{name} > {limit}", f"{name} DESC, sample_key", "count(*)")
    if not count:
        return None
    return (
        f"{count} of {seen} inversions are far worse than the run's others by {metric} ({keys}); "
        "pictures that are not aligned look so"
    )


def _found(ask: Ask, where: str, order: str, total: str) -> tuple[str, int, int]:
    """The first keys, in words, how many there are, and among how many."""
    rows = "FROM latents WHERE status = 'ok'"
    first = ask(f"SELECT sample_key {rows} AND {where} ORDER BY {order} LIMIT {SHOWN}")
    counts = ask(f"SELECT count(*) FILTER ({where}) AS n, {total} AS total {rows}").to_pylist()[0]
    keys = ", ".join(first["sample_key"].to_pylist())
    return keys + (", ..." if counts["n"] > SHOWN else ""), counts["n"], counts["total"]
