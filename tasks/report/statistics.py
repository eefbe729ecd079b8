"""What the rows of a run have in common and which do not: outliers, clusters of codes, drift.

One function for the report and for `refinery browse`. Metrics are looked at in all rows; codes in
at most `SAMPLE` of them, spread evenly over the shards, so that a million rows cost what a few
thousand do.

Legend: N sampled rows, K components.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pyarrow as pa
from jaxtyping import Float
from scipy.cluster.vq import kmeans2
from scipy.sparse.linalg import svds

from tasks.report.aggregates import Ask, Metric, metrics, pictures_of, stored_pictures
from tasks.report.asking import asking
from tasks.run.large import quoted
from tasks.run.ledger import read_markers
from tasks.run.marker import Marker
from tasks.storage.files import join
from tasks.storage.part_files import read_part

SAMPLE, SHARDS = 4096, 32
COMPONENTS = 16
"""Principal components in which codes are compared: the rest of a code is mostly noise."""
CLUSTERS, OUTLIERS = 8, 8
FEWEST = 12
"""Codes below which there is nothing to say of them."""
FAR = 5.0
"""Robust standard deviations (1.4826 MAD) from the median beyond which a value is an outlier."""
QUANTILES = 512


@dataclass(frozen=True, kw_only=True)
class CodeCluster:
    """Codes that lie together.

    Attributes:
        key: the sample nearest to their mean.
        share: of the sampled codes.
        picture: encoded, of that sample; None where the run stores none.
    """

    key: str
    share: float
    picture: bytes | None


@dataclass(frozen=True, kw_only=True)
class CodeOutlier:
    """A code far from the others: `distance` is the root mean square over the components of its
    distance from the median in robust standard deviations, so that 1 is usual. Plain ones would
    grow with the outliers and hide them."""

    key: str
    distance: float
    picture: bytes | None


@dataclass(frozen=True, kw_only=True)
class MetricOutliers:
    """Rows of a metric beyond `low` or `high`, `FAR` robust deviations from its median."""

    name: str
    low: float
    high: float
    rows: int


@dataclass(frozen=True, kw_only=True)
class Shift:
    """One distribution against that of another run: medians, and the largest distance of the
    cumulative distributions (Kolmogorov-Smirnov), 0 for the same and 1 for disjoint ones."""

    name: str
    here: float
    there: float
    distance: float


@dataclass(frozen=True, kw_only=True)
class RunStatistics:
    """What `gather_statistics` found.

    Attributes:
        sampled: codes that were looked at.
        against: the run that `drift` compares with; "" for none.
        drift: of the metrics that both runs have.
        code_shift: distance of the codes' means in standard deviations of this run's, root mean
            square over the components; None where the codes cannot be compared.
    """

    sampled: int
    clusters: tuple[CodeCluster, ...]
    outliers: tuple[CodeOutlier, ...]
    metrics: tuple[MetricOutliers, ...]
    against: str = ""
    drift: tuple[Shift, ...] = ()
    code_shift: float | None = None


@dataclass(frozen=True, kw_only=True)
class Other:
    """A run to compare with: its views and its place."""

    run_uri: str
    ask: Ask
    latents: pa.Schema


@contextmanager
def other_run(run_uri: str | None) -> Iterator[Other | None]:
    """A run to compare with, open; None for none.

    Raises:
        LedgerError: there is no such run, or it has no row yet.
    """
    if run_uri is None:
        yield None
        return
    with asking(run_uri) as (ask, schemas):
        yield Other(run_uri=run_uri, ask=ask, latents=schemas["latents"])


def read_statistics(
    run_uri: str, against: str | None = None
) -> tuple[tuple[Metric, ...], RunStatistics | None]:
    """Distributions of a run's metrics, and what `gather_statistics` finds; nothing of a run that
    has no row yet.

    Raises:
        LedgerError: there is no run, or a part is damaged.
    """
    rows = sum(marker.rows for marker in read_markers(run_uri).values())
    if not rows:
        return (), None
    with asking(run_uri) as (ask, schemas), other_run(against) as other:
        found = metrics(ask, schemas["latents"], rows)
        return found, gather_statistics(run_uri, ask, schemas, other)


def gather_statistics(
    run_uri: str, ask: Ask, schemas: Mapping[str, pa.Schema], other: Other | None = None
) -> RunStatistics:
    """Outliers, clusters and drift of a run.

    Args:
        ask: SQL over the run's views.
        schemas: of the views.
        other: the run to compare with.

    Raises:
        LedgerError: a part is damaged.
    """
    keys, codes = sample_codes(run_uri, read_markers(run_uri))
    clusters: list[tuple[str, float]] = []
    outliers: list[tuple[str, float]] = []
    shift = None
    mean, basis = _components(codes)
    points = (codes - mean) @ basis
    if points.size:
        clusters, outliers = _clusters(keys, points), _outliers(keys, points)
        shift = _code_shift(points, mean, basis, other)
    shown = {key for key, _ in [*clusters, *outliers]}
    found = pictures_of(ask, stored_pictures(schemas)[-1:], shown)
    pictures = {key: next(iter(row.values()), None) for key, row in found.items()}
    return RunStatistics(
        sampled=len(keys),
        clusters=tuple(
            CodeCluster(key=k, share=share, picture=pictures.get(k)) for k, share in clusters
        ),
        outliers=tuple(
            CodeOutlier(key=k, distance=far, picture=pictures.get(k)) for k, far in outliers
        ),
        metrics=_metric_outliers(ask, schemas["latents"]),
        against=other.run_uri if other else "",
        drift=_drift(ask, schemas["latents"], other) if other else (),
        code_shift=shift,
    )


# ------------------------------------------------------------------ codes


def sample_codes(
    run_uri: str, markers: Mapping[int, Marker]
) -> tuple[list[str], Float[np.ndarray, "N S"]]:
    """Keys and flat codes of at most `SAMPLE` inverted rows, evenly from evenly spread shards.

    Raises:
        LedgerError: a part is damaged.
    """
    usable = [m for m in markers.values() if "latents" in m.parts and m.rows > m.failed]
    chosen = [usable[i] for i in _spread(len(usable), SHARDS)]
    keys: list[str] = []
    found: list[np.ndarray] = []
    for marker in chosen:
        part = marker.parts["latents"]
        columns = ["sample_key", "status", "w_plus"]
        table = read_part(join(run_uri, part.path), part.bytes, columns)
        table = table.filter(pa.array([s == "ok" for s in table["status"].to_pylist()]))
        rows = _spread(len(table), SAMPLE // len(chosen))
        table = table.take(rows)
        keys += table["sample_key"].to_pylist()
        flat = table["w_plus"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        found.append(np.asarray(flat, np.float32).reshape(len(table), -1))
    return keys, np.concatenate(found) if found else np.zeros((0, 0), np.float32)


def _spread(count: int, wanted: int) -> list[int]:
    """At most `wanted` of the numbers below `count`, evenly."""
    return sorted({i * count // min(count, wanted) for i in range(min(count, wanted))})


def _components(
    codes: Float[np.ndarray, "N S"],
) -> tuple[Float[np.ndarray, " S"], Float[np.ndarray, "S K"]]:
    """Mean, and a basis in which the codes have variance 1; directions without any are left out.
    An empty one of codes that are too few or all the same."""
    if min(codes.shape) < 2 or len(codes) < FEWEST or not np.ptp(codes, 0).any():
        return np.zeros(codes.shape[1], np.float32), np.zeros((codes.shape[1], 0), np.float32)
    mean = codes.mean(0)
    count = min(COMPONENTS, *(size - 1 for size in codes.shape))
    start = np.random.default_rng(0).standard_normal(min(codes.shape)).astype(np.float32)
    _, sizes, rows = cast(tuple[Any, Any, Any], svds(codes - mean, k=count, v0=start))
    deviations = sizes / np.sqrt(len(codes))
    kept = deviations > 1e-4 * deviations.max(initial=1e-12)
    return mean, (rows[kept] / deviations[kept, None]).T


def _clusters(keys: Sequence[str], points: Float[np.ndarray, "N K"]) -> list[tuple[str, float]]:
    """The sample nearest to each cluster's mean, and the cluster's share; largest first."""
    count = min(CLUSTERS, len(points) // 3)
    means, labels = kmeans2(points, count, minit="++", rng=np.random.default_rng(0))
    found = []
    for label in range(count):
        (members,) = np.nonzero(labels == label)
        if len(members):
            far = ((points[members] - means[label]) ** 2).sum(1)
            found.append((keys[int(members[far.argmin()])], len(members) / len(points)))
    return sorted(found, key=lambda pair: -pair[1])


def _outliers(keys: Sequence[str], points: Float[np.ndarray, "N K"]) -> list[tuple[str, float]]:
    off = points - np.median(points, 0)
    scale = 1.4826 * np.median(np.abs(off), 0)
    distance = np.sqrt(((off / np.where(scale > 0, scale, 1.0)) ** 2).mean(1))
    furthest = [int(at) for at in np.argsort(-distance, kind="stable")[:OUTLIERS]]
    return [(keys[at], float(distance[at])) for at in furthest]


def _code_shift(
    points: Float[np.ndarray, "N K"],
    mean: Float[np.ndarray, " S"],
    basis: Float[np.ndarray, "S K"],
    other: Other | None,
) -> float | None:
    if other is None:
        return None
    _, codes = sample_codes(other.run_uri, read_markers(other.run_uri))
    if not len(codes) or codes.shape[1] != len(mean):
        return None
    moved = ((codes - mean) @ basis).mean(0) - points.mean(0)
    return float(np.sqrt((moved**2).mean()))


# ------------------------------------------------------------------ metrics


def _floats(latents: pa.Schema) -> list[str]:
    return [f.name for f in latents if pa.types.is_floating(f.type)]


def _metric_outliers(ask: Ask, latents: pa.Schema) -> tuple[MetricOutliers, ...]:
    found = []
    for name in _floats(latents):
        column = f"{quoted(name)}::DOUBLE"
        row = ask(
            f"SELECT median(v) AS middle, mad(v) AS mad FROM (SELECT {column} AS v FROM latents "
            f"WHERE isfinite({column}))"
        ).to_pylist()[0]
        if row["middle"] is None or not row["mad"]:
            continue
        far = FAR * 1.4826 * row["mad"]
        low, high = row["middle"] - far, row["middle"] + far
        count = ask(
            f"SELECT count(*) AS n FROM latents WHERE {column} < {low!r} OR {column} > {high!r}"
        )
        rows = count.to_pylist()[0]["n"]
        found.append(MetricOutliers(name=name, low=low, high=high, rows=rows))
    return tuple(found)


def _drift(ask: Ask, latents: pa.Schema, other: Other) -> tuple[Shift, ...]:
    theirs = _floats(other.latents)
    found = []
    for name in (n for n in _floats(latents) if n in theirs):
        here, there = _quantiles(ask, name), _quantiles(other.ask, name)
        if here is not None and there is not None:
            distance = ks_distance(here, there)
            middle = QUANTILES // 2
            found.append(
                Shift(name=name, here=here[middle], there=there[middle], distance=distance)
            )
    return tuple(found)


def _quantiles(ask: Ask, name: str) -> list[float] | None:
    shares = ", ".join(f"{i / QUANTILES!r}" for i in range(QUANTILES + 1))
    column = f"{quoted(name)}::DOUBLE"
    found = ask(
        f"SELECT quantile_cont({column}, [{shares}]) AS q FROM latents WHERE isfinite({column})"
    )
    return found["q"].to_pylist()[0]


def ks_distance(here: Sequence[float], there: Sequence[float]) -> float:
    """Largest distance of two cumulative distributions, from equally spaced quantiles of each."""
    places = np.union1d(here, there)
    shares = np.linspace(0.0, 1.0, len(here))
    below = [_cumulative(places, np.asarray(q), shares) for q in (here, there)]
    return float(np.abs(below[0] - below[1]).max())


def _cumulative(
    places: Float[np.ndarray, " P"], quantiles: Float[np.ndarray, " Q"], shares: np.ndarray
) -> Float[np.ndarray, " P"]:
    """Share of values at or below each place; a value that stands often is a jump."""
    at = np.searchsorted(quantiles, places, side="right")
    upper = np.minimum(at, len(quantiles) - 1)
    lower = np.maximum(at - 1, 0)
    width = quantiles[upper] - quantiles[lower]
    part = np.divide(places - quantiles[lower], width, out=np.zeros_like(places), where=width > 0)
    inside = shares[lower] + part * (shares[upper] - shares[lower])
    return np.where(at == 0, 0.0, np.where(at == len(quantiles), 1.0, inside))
