"""What changed between two runs: rows, metrics, codes.

Rows are paired by their key. A metric's drift is tested by the signed-rank test of Wilcoxon
(Biometrics Bulletin 1, 1945), which asks no distribution of the differences; the drift of codes by
the T-squared test of Hotelling (Annals of Mathematical Statistics 2, 1931) of their mean difference
along the leading axes of the differences. Probabilities are corrected for their number (Holm,
Scandinavian Journal of Statistics 6, 1979). With many rows every change is significant: the effect,
in deviations of the differences, says whether it matters (below 0.2 it is commonly called small).
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw

from models.errors import ConfigError
from tasks.job import INPUTS
from tasks.run.large import quoted
from tasks.run.lookup import CODES
from tasks.run.metadata import Snapshot, read_snapshot
from tasks.run.query import ask
from tasks.run.views import FIRST, LAST, Session, open_session
from tasks.storage.files import open_write

TESTED_ROWS = 100_000
"""Pairs that a test of a metric looks at, at most; means are of all."""
CODE_ROWS = 4096
AXES = 16
LEVEL = 0.05
SMALL = 0.2
_BEFORE, _AFTER = "A", "B"


@dataclass(frozen=True, kw_only=True)
class Drift:
    """How one value changed over the rows that both runs have.

    Attributes:
        rows: pairs.
        before, after: means; of codes the mean distance from their mean.
        change: mean of the differences; of codes the mean distance of a pair.
        effect: change by the deviation of the differences; of codes by `before`.
        p: of such a change by chance, corrected; None with too few pairs.
        verdict: in words.
    """

    name: str
    rows: int
    before: float
    after: float
    change: float
    effect: float | None
    p: float | None
    verdict: str = ""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What changed from one run to another.

    Attributes:
        counts: rows by what became of them, for people.
        rows: those that changed, by how much, the most changed first.
    """

    counts: dict[str, str]
    drifts: tuple[Drift, ...]
    rows: pa.Table
    snapshots: dict[str, Snapshot]


def compare(before: str, after: str) -> Difference:
    """Compare two runs.

    Raises:
        LedgerError: there is no run, or one is damaged.
        ConfigError: they have no sample in common.
    """
    snapshots = {_BEFORE: read_snapshot(before), _AFTER: read_snapshot(after)}
    with open_session(snapshots) as session:
        metrics = _metrics(session)
        rows = _changed_rows(session, metrics)
        both = _count(session, "SELECT count(*) AS n FROM pairs WHERE in_a AND in_b", metrics)
        if not both:
            raise ConfigError(f"{before} and {after} have no sample_key in common")
        drifts = [_metric_drift(session, name, metrics) for name in metrics]
        drifts += _code_drift(session, snapshots)
    what = rows["what"].value_counts().to_pylist()
    counts = {
        "A": f"{before}: {snapshots[_BEFORE].num_rows} rows",
        "B": f"{after}: {snapshots[_AFTER].num_rows} rows",
        "in both": str(both),
        "as before": str(both - sum(w not in _ONE_SIDED for w in rows["what"].to_pylist())),
        **{found["values"]: str(found["counts"]) for found in what},
    }
    found = tuple(_judged([drift for drift in drifts if drift.rows]))
    return Difference(counts=counts, drifts=found, rows=rows, snapshots=snapshots)


_ONE_SIDED = ("only in A", "only in B")


def _metrics(session: Session) -> list[str]:
    if "samples" not in session.columns():
        return []
    schema = ask(session, "SELECT * FROM samples LIMIT 0").schema
    known = (field.name for field in schema if pa.types.is_floating(field.type))
    return [name for name in known if name not in (*FIRST, *LAST)]


def _pairs(metrics: Sequence[str]) -> str:
    """SQL of a row for each key: what A and B have of it."""
    listed = ", ".join(
        f"a.{quoted(m)} AS {quoted(f'{m}_a')}, b.{quoted(m)} AS {quoted(f'{m}_b')}" for m in metrics
    )
    return (
        "WITH pairs AS (SELECT coalesce(a.sample_key, b.sample_key) AS sample_key, "
        "a.status AS status_a, b.status AS status_b, a.image_sha256 AS sha256_a, "
        "b.image_sha256 AS sha256_b, a.sample_key IS NOT NULL AS in_a, "
        f"b.sample_key IS NOT NULL AS in_b{', ' if listed else ''}{listed} "
        f"FROM (SELECT * FROM samples WHERE run = '{_BEFORE}') a FULL JOIN "
        f"(SELECT * FROM samples WHERE run = '{_AFTER}') b ON a.sample_key = b.sample_key) "
    )


def _count(session: Session, sql: str, metrics: Sequence[str]) -> int:
    return ask(session, _pairs(metrics) + sql)["n"][0].as_py()


def _changed_rows(session: Session, metrics: Sequence[str]) -> pa.Table:
    differs = [f"{quoted(f'{m}_a')} IS DISTINCT FROM {quoted(f'{m}_b')}" for m in metrics]
    sizes = [
        f"abs({quoted(f'{m}_b')} - {quoted(f'{m}_a')}) / nullif(stddev({quoted(f'{m}_b')} - "
        f"{quoted(f'{m}_a')}) OVER (), 0)"
        for m in metrics
    ]
    size = f"greatest({', '.join(sizes)})" if sizes else "NULL"
    return ask(
        session,
        f"{_pairs(metrics)}, judged AS (SELECT * EXCLUDE (in_a, in_b), CASE "
        "WHEN NOT in_b THEN 'only in A' WHEN NOT in_a THEN 'only in B' "
        "WHEN status_a <> status_b THEN status_a || ' -> ' || status_b "
        "WHEN sha256_a IS DISTINCT FROM sha256_b THEN 'other input' "
        f"WHEN {' OR '.join(differs) or 'false'} THEN 'other values' END AS what, "
        f"{size} AS change FROM pairs) SELECT sample_key, what, change, * EXCLUDE (sample_key, "
        "what, change) FROM judged WHERE what IS NOT NULL ORDER BY change DESC NULLS LAST, "
        "sample_key",
    )


def _metric_drift(session: Session, name: str, metrics: Sequence[str]) -> Drift:
    from scipy.stats import wilcoxon

    a, b = quoted(f"{name}_a"), quoted(f"{name}_b")
    both = f"FROM pairs WHERE isfinite({a}) AND isfinite({b})"
    row = ask(
        session,
        f"{_pairs(metrics)} SELECT count(*) AS rows, avg({a}) AS before, avg({b}) AS after, "
        f"avg({b}::DOUBLE - {a}) AS change, stddev({b}::DOUBLE - {a}) AS deviation {both}",
    ).to_pylist()[0]
    if not row["rows"]:
        return Drift(name=name, rows=0, before=0, after=0, change=0, effect=None, p=None)
    deviation = row.pop("deviation")
    sample = ask(
        session,
        f"{_pairs(metrics)} SELECT {b}::DOUBLE - {a} AS d {both} "
        f"ORDER BY hash(sample_key) LIMIT {TESTED_ROWS}",
    )["d"].to_numpy()
    p = None
    if len(sample) > 5 and sample.any():
        _, p = map(float, wilcoxon(sample))
    return Drift(name=name, **row, effect=row["change"] / deviation if deviation else None, p=p)


def _code_drift(session: Session, snapshots: dict[str, Snapshot]) -> list[Drift]:
    """None where codes of two generators cannot be compared."""
    a, b = snapshots.values()
    generators = {s.record["weights"].get("generator") for s in (a, b)}
    if a.codes is None or b.codes is None or len(generators) > 1:
        return []
    keys = (
        f"SELECT sample_key FROM samples WHERE status = 'ok' GROUP BY sample_key "
        f"HAVING count(DISTINCT run) = 2 ORDER BY hash(sample_key) LIMIT {CODE_ROWS}"
    )
    codes = {
        run: _flat(
            ask(
                session,
                f"SELECT l.sample_key, l.w_plus FROM latents l JOIN ({keys}) k "
                "ON l.sample_key = k.sample_key WHERE l.run = $run ORDER BY l.sample_key",
                {"run": run},
            )
        )
        for run in (_BEFORE, _AFTER)
    }
    was, now = codes[_BEFORE], codes[_AFTER]
    if not was.size or was.shape != now.shape:  # an index is a run whose rows hold none
        return []
    spreads = [np.linalg.norm(x - x.mean(0), axis=1).mean() for x in (was, now)]
    change = float(np.linalg.norm(now - was, axis=1).mean())
    return [
        Drift(
            name=CODES,
            rows=len(was),
            before=float(spreads[0]),
            after=float(spreads[1]),
            change=change,
            effect=change / spreads[0] if spreads[0] > 0 else None,
            p=hotelling(now - was),
        )
    ]


def _flat(table: pa.Table) -> np.ndarray:
    values = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in table[CODES].chunks]
    return np.concatenate([*values, np.empty(0)]).reshape(table.num_rows, -1).astype(np.float64)


def hotelling(differences: np.ndarray) -> float | None:
    """The probability that differences [N K] of mean 0 have a mean this far from it, along their
    `AXES` leading axes; None with fewer than twice as many rows as axes, or without a difference.
    """
    from scipy.stats import f as f_distribution

    rows = len(differences)
    axes = min(AXES, differences.shape[1], rows // 2)
    if axes < 1 or rows < 4 or not differences.any():
        return None
    # About zero, not about their mean: the mean's own direction is among the axes.
    _, scale, directions = np.linalg.svd(differences, full_matrices=False)
    axes = min(axes, int((scale > 1e-9 * scale[0]).sum()))
    projected = differences @ directions[:axes].T
    mean, covariance = projected.mean(0), np.atleast_2d(np.cov(projected.T))
    t_squared = rows * mean @ np.linalg.pinv(covariance) @ mean
    statistic = (rows - axes) / (axes * (rows - 1)) * t_squared
    return float(f_distribution.sf(statistic, axes, rows - axes))


def _judged(drifts: Sequence[Drift]) -> list[Drift]:
    """The drifts with corrected probabilities and a verdict each."""
    tested = sorted((d for d in drifts if d.p is not None), key=lambda d: d.p or 0)
    corrected: dict[str, float] = {}
    least = 0.0
    for place, drift in enumerate(tested):
        assert drift.p is not None
        least = max(least, min(1.0, drift.p * (len(tested) - place)))
        corrected[drift.name] = least
    return [replace(d, p=corrected.get(d.name), verdict=_verdict(d, corrected)) for d in drifts]


def _verdict(drift: Drift, corrected: dict[str, float]) -> str:
    p = corrected.get(drift.name)
    if p is None:
        return "equal" if drift.change == 0 else "too few rows to tell"
    if p >= LEVEL:
        return "within chance"
    return "drifted, a little" if abs(drift.effect or 0) < SMALL else "drifted"


# ---------------------------------------------------------------------------- pictures


def write_strip(found: Difference, path: str, top: int) -> int:
    """The pictures of the rows that changed most, a row each: input, then A and B.

    Returns:
        How many rows it has.

    Raises:
        ConfigError: neither run has stored pictures of rows that changed.
    """
    keys = [
        row["sample_key"]
        for row in found.rows.select(["sample_key", "what"]).to_pylist()
        if row["what"] not in _ONE_SIDED
    ][: 4 * top]
    with open_session(found.snapshots) as session:
        shown = _pictures(session, keys)
    lines = [shown[key] for key in keys if len(shown.get(key, {})) > 1][:top]
    if not lines:
        raise ConfigError("no pictures to show: no row that changed has stored pictures in A and B")
    _draw(lines, path)
    return len(lines)


def _pictures(session: Session, keys: Sequence[str]) -> dict[str, dict[str, Image.Image]]:
    """Pictures by key and by title."""
    columns = [c for c in session.columns().get("images", ()) if c not in ("sample_key", "run")]
    listed = ", ".join(map(quoted, columns))
    found: dict[str, dict[str, Image.Image]] = {}
    if not columns:
        return found
    table = ask(
        session,
        f"SELECT sample_key, run, {listed} FROM images WHERE sample_key IN "
        "(SELECT unnest($keys)) ORDER BY run",
        {"keys": list(keys)},
    )
    for row in table.to_pylist():
        line = found.setdefault(row["sample_key"], {})
        for name in columns:
            if row[name] is not None:
                title = name if name in INPUTS else f"{row['run']} {name}"
                line.setdefault(title, Image.open(io.BytesIO(row[name]["bytes"])).convert("RGB"))
    return found


def _draw(lines: Sequence[dict[str, Image.Image]], path: str) -> None:
    titles = list(dict.fromkeys(title for line in lines for title in line))
    side = max(max(image.size) for line in lines for image in line.values())
    side, gap, head = max(side, 96), 4, 16
    width, height = len(titles) * (side + gap), head + len(lines) * (side + gap)
    strip = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(strip)
    for column, title in enumerate(titles):
        draw.text((column * (side + gap), 2), title, fill="black")
        for number, line in enumerate(lines):
            if title in line:
                picture = line[title].resize((side, side), Image.Resampling.NEAREST)
                strip.paste(picture, (column * (side + gap), head + number * (side + gap)))
    with open_write(path) as file:
        strip.save(file, "PNG")
