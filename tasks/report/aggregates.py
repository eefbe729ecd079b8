"""Aggregates over the rows of a run: computed in DuckDB, so never all rows are in memory."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from tasks.job import INPUTS
from tasks.run.large import quoted, text

Ask = Callable[[str], pa.Table]
"""SQL over the views of a run to a small table (`tasks.run.query.open_views`)."""

MIN_BINS, MAX_BINS = 10, 40
PAIRS = 8
"""Pictures of each rank; fewer where the ranks would overlap."""
FAILURES_SHOWN = 50
EXACT_ROWS = 2_000_000
"""Above so many rows quantiles are estimated (t-digest) instead of sorted."""
TAIL = 0.005
"""Share of rows on each side that may lie outside a histogram whose range they would stretch."""
RANKING = ("lpips", "trunk_distance", "mse")
"""Beginnings of the metric that ranks pictures, by preference; all are better when smaller."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One float column of `latents`: its values in short, and its histogram.

    Attributes:
        count: rows with a finite value.
        low, high: range of the histogram; `below` and `above` rows lie outside it.
        counts: rows in each of the equal bins, more of them for more rows.
    """

    name: str
    count: int
    mean: float
    median: float
    smallest: float
    largest: float
    low: float
    high: float
    counts: tuple[int, ...]
    below: int
    above: int


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One picture beside its inversion, as encoded bytes (either may not be stored)."""

    key: str
    value: float
    original: bytes | None
    inversion: bytes | None


@dataclass(frozen=True, kw_only=True)
class PairGroup:
    """A few pictures of one rank: best, median or worst."""

    title: str
    pairs: tuple[Pair, ...]


def metrics(ask: Ask, latents: pa.Schema, rows: int) -> tuple[Metric, ...]:
    """Every float column, in the order of the file. Columns without a finite value are left out,
    and those of single edits ("drift@older"), which have a table of their own."""
    names = [f.name for f in latents if pa.types.is_floating(f.type) and "@" not in f.name]
    if not names:
        return ()
    quantile = "quantile_cont" if rows <= EXACT_ROWS else "approx_quantile"
    wanted = []
    for index, column in enumerate(map(quoted, names)):
        for call in (
            f"count({column})",
            f"avg({column})",
            f"min({column})",
            f"max({column})",
            f"{quantile}({column}, [{TAIL}, 0.5, {1 - TAIL}])",
        ):
            wanted.append(f"{call} FILTER (WHERE isfinite({column})) AS c{index}_{len(wanted) % 5}")
    found = ask(f"SELECT {', '.join(wanted)} FROM latents").to_pylist()[0]
    summaries = []
    for index, name in enumerate(names):
        count, mean, smallest, largest, quantiles = (found[f"c{index}_{i}"] for i in range(5))
        if count:
            low, median, high = quantiles
            low, high = _range(smallest, low, high, largest)
            summaries.append((name, count, mean, median, smallest, largest, low, high))
    counts = _histograms(ask, [(s[0], s[6], s[7], _num_bins(s[1])) for s in summaries])
    return tuple(
        Metric(
            name=name,
            count=count,
            mean=mean,
            median=median,
            smallest=smallest,
            largest=largest,
            low=low,
            high=high,
            counts=tuple(counts[name].get(i, 0) for i in range(_num_bins(count))),
            below=counts[name].get(-1, 0),
            above=counts[name].get(_num_bins(count), 0),
        )
        for name, count, mean, median, smallest, largest, low, high in summaries
    )


def _range(smallest: float, low: float, high: float, largest: float) -> tuple[float, float]:
    """All values where tails are short, else the bulk: one outlier must not flatten the rest."""
    bulk = high - low
    low = smallest if low - smallest <= bulk / 2 else low
    high = largest if largest - high <= bulk / 2 else high
    if high <= low:  # all values are equal
        margin = abs(low) * 0.05 or 0.5
        return low - margin, high + margin
    return low, high


def _num_bins(rows: int) -> int:
    """Enough to show a shape, not so many that a few rows become single spikes."""
    return min(max(round(2 * rows**0.5), MIN_BINS), MAX_BINS)


def _histograms(ask: Ask, ranges: list[tuple[str, float, float, int]]) -> dict[str, dict[int, int]]:
    """Rows by bin for each (metric, low, high, bins); bin -1 lies below the range, `bins` above."""
    found: dict[str, dict[int, int]] = {name: {} for name, *_ in ranges}
    selects = []
    for index, (name, low, high, bins) in enumerate(ranges):
        column, width = f"{quoted(name)}::DOUBLE", (high - low) / bins
        # The largest value belongs to the last bin, not to one of its own.
        bin_number = (
            f"CASE WHEN {column} < {low!r} THEN -1 WHEN {column} > {high!r} THEN {bins} "
            f"ELSE least(floor(({column} - {low!r}) / {width!r})::INTEGER, {bins - 1}) END"
        )
        selects.append(
            f"SELECT {index} AS metric, {bin_number} AS bin, count(*) AS n FROM latents "
            f"WHERE isfinite({column}) GROUP BY bin"
        )
    if selects:
        for row in ask(" UNION ALL ".join(selects)).to_pylist():
            found[ranges[row["metric"]][0]][row["bin"]] = row["n"]
    return found


def ranking_metric(found: tuple[Metric, ...]) -> Metric | None:
    """The metric that says which inversions are good: perceptual where there is one, else mse."""
    for start in RANKING:
        for metric in found:
            if metric.name.startswith(start):
                return metric
    return None


def pair_groups(
    ask: Ask, schemas: Mapping[str, pa.Schema], ranked: Metric | None
) -> tuple[PairGroup, ...]:
    """Best, median and worst pictures; without a metric, the first ones in order of their keys."""
    stored = stored_pictures(schemas)
    if not stored:
        return ()
    if ranked is None:
        orders = {"First pictures": ("0.0::DOUBLE", "sample_key")}
    else:
        column = quoted(ranked.name)
        distance = f"abs({column} - {ranked.median!r})"
        orders = {
            "Best": (column, f"{column}, sample_key"),
            "Median": (column, f"{distance}, sample_key"),
            "Worst": (column, f"{column} DESC, sample_key"),
        }
    shown = PAIRS if ranked is None else min(PAIRS, -(-ranked.count // 3))
    chosen: dict[str, list[dict[str, Any]]] = {}
    for title, (value, order) in orders.items():
        usable = "" if ranked is None else f"AND isfinite({quoted(ranked.name)})"
        chosen[title] = ask(
            f"SELECT sample_key, {value} AS value FROM latents WHERE status = 'ok' {usable} "
            f"ORDER BY {order} LIMIT {shown}"
        ).to_pylist()
    keys = {row["sample_key"] for found in chosen.values() for row in found}
    pictures = pictures_of(ask, stored, keys)

    def pair(key: str, value: float) -> Pair:
        own = pictures.get(key, {})
        original = next(filter(None, map(own.get, INPUTS)), None)
        return Pair(key=key, value=value, original=original, inversion=own.get("inversion"))

    return tuple(
        PairGroup(title=title, pairs=tuple(pair(r["sample_key"], r["value"]) for r in found))
        for title, found in chosen.items()
        if found
    )


def stored_pictures(schemas: Mapping[str, pa.Schema]) -> list[str]:
    """The columns of inputs and inversions that a run has."""
    images = schemas.get("images", pa.schema([])).names
    return [name for name in (*INPUTS, "inversion") if name in images]


def pictures_of(
    ask: Ask, stored: Sequence[str], keys: Collection[str]
) -> dict[str, dict[str, bytes | None]]:
    """The encoded pictures of a few samples, in order of their keys."""
    if not keys or not stored:
        return {}
    wanted = ", ".join(map(quoted, stored))
    listed = ", ".join(map(text, sorted(keys)))
    found = ask(
        f"SELECT sample_key, {wanted} FROM images WHERE sample_key IN ({listed}) "
        "ORDER BY sample_key"
    )
    return {
        row["sample_key"]: {name: row[name] and row[name]["bytes"] for name in stored}
        for row in found.to_pylist()
    }


def failed_rows(ask: Ask) -> tuple[tuple[str, str, str], ...]:
    """(sample key, kind, reason) of the first failed rows in order of their keys."""
    found = ask(
        "SELECT sample_key, error_kind, error FROM latents WHERE status = 'failed' "
        f"ORDER BY sample_key LIMIT {FAILURES_SHOWN}"
    ).to_pylist()
    return tuple((r["sample_key"], r["error_kind"] or "", r["error"] or "") for r in found)
