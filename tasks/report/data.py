"""Everything a report says of a run, in plain values; a million rows cost the same as a hundred."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tasks.report.aggregates import (
    Metric,
    PairGroup,
    failed_rows,
    metrics,
    pair_groups,
    ranking_metric,
)
from tasks.report.alignment import alignment_line
from tasks.report.asking import asking
from tasks.report.edits import EditData, gather_edits
from tasks.report.forecast import Forecast, forecast
from tasks.report.statistics import RunStatistics, gather_statistics, other_run
from tasks.report.timeline import Timeline, timeline
from tasks.run import ledger, run_json
from tasks.run.manifest import read_skipped
from tasks.run.marker import Marker

NOTES_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class ReportData:
    """The content of the page.

    Attributes:
        weights: sha256 by name of all weight files, the generator's under "generator".
        notes: what workers noted (a halved batch), with the number of shards that did.
        shards_planned, shards_done: of the manifest; with a commit marker.
        ranked_by: metric that chose best, median and worst pictures; None without one.
        failed_by_kind: (error_kind, rows), most frequent first.
        failed_rows: (sample key, kind, reason) of the first few.
        skipped: files of the input that are in no shard, by reason.
        quarantined: (shard, attempts, reason).
        stages: (name, busy seconds summed over all shards).
        columns: by view, what `refinery query` can ask for.
        edits: of a run of edits; None for inversions.
        statistics: of codes and metrics; None without a row.
        warning: pictures do not look aligned; None where there is nothing to say.
        forecast: what was predicted, beside what it took; of a finished run.
        bytes: of all parts.
    """

    run_uri: str
    run_id: str
    methods: tuple[str, ...]
    generator: str
    weights: dict[str, str]
    devices: tuple[str, ...]
    code_versions: tuple[str, ...]
    notes: tuple[tuple[str, int], ...]
    is_sealed: bool
    shards_planned: int
    shards_done: int
    rows: int
    failed: int
    metrics: tuple[Metric, ...]
    ranked_by: str | None
    groups: tuple[PairGroup, ...]
    failed_by_kind: tuple[tuple[str, int], ...]
    failed_rows: tuple[tuple[str, str, str], ...]
    skipped: dict[str, int]
    quarantined: tuple[tuple[int, int, str], ...]
    timeline: Timeline
    stages: tuple[tuple[str, float], ...]
    columns: dict[str, tuple[str, ...]]
    edits: EditData | None
    statistics: RunStatistics | None
    warning: str | None = None
    forecast: tuple[Forecast, ...] = ()
    bytes: int = 0


def gather(run_uri: str, against: str | None = None) -> ReportData:
    """Read a run, finished or not, through its committed parts.

    Args:
        against: a run to compare distributions with.

    Raises:
        LedgerError: no run at this place, or a damaged one.
    """
    run, declared = run_json.read_run(run_uri), run_json.read_declared(run_uri)
    config = run["config"]
    markers = list(ledger.read_markers(run_uri).values())
    by_kind: Counter[str] = Counter()
    for marker in markers:
        by_kind.update(marker.failures)
    return ReportData(
        run_uri=run_uri,
        run_id=run["run_id"],
        methods=tuple(declared.method.split("+")),
        generator=config["generator"],
        weights=dict(run["weights"]),
        devices=tuple(sorted({marker.device for marker in markers if marker.device})),
        code_versions=tuple(sorted({m.code_version for m in markers} or {run["code_version"]})),
        notes=tuple(Counter(n for m in markers for n in m.notes).most_common(NOTES_SHOWN)),
        is_sealed=ledger.is_sealed(run_uri),
        shards_planned=run["num_shards"],
        shards_done=len(markers),
        rows=sum(marker.rows for marker in markers),
        failed=sum(marker.failed for marker in markers),
        failed_by_kind=tuple(by_kind.most_common()),
        skipped=read_skipped(run_uri),
        quarantined=tuple(
            (shard, lost.attempts, lost.reason)
            for shard, lost in ledger.read_quarantine(run_uri).items()
        ),
        timeline=timeline(markers),
        warning=alignment_line(run_uri),
        forecast=forecast(run_uri, markers) if ledger.is_sealed(run_uri) else (),
        bytes=sum(part.bytes for marker in markers for part in marker.parts.values()),
        stages=_stages(markers, declared.stages),
        **_from_rows(run_uri, config, declared, markers, against),
    )


def _from_rows(
    run_uri: str,
    config: Mapping[str, Any],
    declared: run_json.Declared,
    markers: Sequence[Marker],
    against: str | None,
) -> dict[str, Any]:
    """The fields of ReportData that need the parts themselves; one set of views serves them all."""
    is_edit = bool(declared.variants)
    if not any(marker.parts for marker in markers):
        return {
            "metrics": (),
            "ranked_by": None,
            "groups": (),
            "failed_rows": (),
            "columns": {},
            "edits": gather_edits(None, config, {}) if is_edit else None,
            "statistics": None,
        }
    with asking(run_uri) as (ask, schemas), other_run(against) as other:
        found = metrics(ask, schemas["latents"], sum(marker.rows for marker in markers))
        ranked = ranking_metric(found)
        return {
            "metrics": found,
            "ranked_by": ranked.name if ranked else None,
            "groups": () if is_edit else pair_groups(ask, schemas, ranked),
            "failed_rows": failed_rows(ask),
            "columns": {view: tuple(schema.names) for view, schema in sorted(schemas.items())},
            "edits": gather_edits(ask, config, schemas) if is_edit else None,
            "statistics": gather_statistics(run_uri, ask, schemas, other),
        }


def _stages(markers: Sequence[Marker], order: Sequence[str]) -> tuple[tuple[str, float], ...]:
    total: Counter[str] = Counter()
    for marker in markers:
        total.update(marker.seconds)
    return tuple((name, float(total[name])) for name in order if name in total)
