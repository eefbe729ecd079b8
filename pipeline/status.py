"""Where a run stands, read from its markers: while it runs, after a crash, from any machine."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime

from pipeline.run_log import read_progress
from tasks.run import ledger, run_json
from tasks.run.lease import Driver, read_driver
from tasks.run.manifest import read_skipped
from tasks.run.marker import Marker
from tasks.run.records import DamagedError


@dataclass(frozen=True, kw_only=True)
class Status:
    """Counts over all commits.

    Attributes:
        rows_total: samples of the manifest, None where only reading tells (tars).
        failures: failed rows by error_kind.
        skipped: files of the input that are in no shard, by reason.
        quarantined: reason by shard.
        driver: the last that worked on it, and whether it still does; "" where none is known.
        at_work: shard, rows computed, seconds since its begin: what the driver said last.
        problems: files of the run that are damaged or missing.
        images_per_s: rows by the time from the first start to the last commit; None without one.
        seconds: busy time by stage, summed over workers.
    """

    run_uri: str
    run_id: str
    is_sealed: bool
    num_shards: int
    num_committed: int
    rows_total: int | None
    rows: int
    failed: int
    failures: dict[str, int]
    skipped: dict[str, int]
    quarantined: dict[int, str]
    driver: str
    at_work: tuple[tuple[int, int, float], ...]
    problems: tuple[str, ...]
    images_per_s: float | None
    seconds: dict[str, float]
    last_commit_at: str

    @property
    def num_pending(self) -> int:
        return max(self.num_shards - self.num_committed - len(self.quarantined), 0)


def read_status(run_uri: str) -> Status:
    """Count the markers of a run.

    Raises:
        LedgerError: there is no run at this place, or its run.json is damaged.
    """
    record = run_json.read_run(run_uri)
    commits = ledger.read_commits(run_uri, with_parts=True)
    markers, problems = list(commits.markers.values()), [*map(str, commits.damaged.values())]
    quarantined = ledger.read_quarantine(run_uri, commits)
    driver = None
    for read in (ledger.read_seal, read_driver):
        try:
            found = read(run_uri)
        except DamagedError as error:
            problems.append(str(error))
        else:
            driver = found if isinstance(found, Driver) else None
    failures: Counter[str] = Counter()
    seconds: Counter[str] = Counter()
    for marker in markers:
        failures.update(marker.failures)
        seconds.update(marker.seconds)
    rows = sum(marker.rows for marker in markers)
    return Status(
        run_uri=run_uri,
        run_id=record["run_id"],
        is_sealed=ledger.is_sealed(run_uri),
        num_shards=record["num_shards"],
        num_committed=len(markers) + len(commits.covered),
        rows_total=record["num_samples"],
        rows=rows,
        failed=sum(marker.failed for marker in markers),
        failures=dict(sorted(failures.items())),
        skipped=read_skipped(run_uri),
        quarantined={shard: entry.reason for shard, entry in quarantined.items()},
        driver=f"{driver}, {driver.state}" if driver else "",
        at_work=_at_work(run_uri) if driver and driver.state == "at work" else (),
        problems=tuple(problems),
        images_per_s=_pace(markers),
        seconds=dict(seconds),
        last_commit_at=max((m.finished_at for m in markers), default=""),
    )


def _at_work(run_uri: str) -> tuple[tuple[int, int, float], ...]:
    told = read_progress(run_uri) or {}
    return tuple((s["shard"], s["rows"], s["seconds"]) for s in told.get("at_work", ()))


def _pace(markers: Collection[Marker]) -> float | None:
    timed = [marker for marker in markers if marker.started_at and marker.finished_at]
    if not timed:
        return None
    stop, start = max(m.finished_at for m in timed), min(m.started_at for m in timed)
    span_s = (datetime.fromisoformat(stop) - datetime.fromisoformat(start)).total_seconds()
    rows = sum(marker.rows for marker in timed)
    return rows / span_s if rows and span_s > 0 else None
