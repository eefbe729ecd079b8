"""Proof that a run is whole: every sample of the manifest is in exactly one committed row.

Nothing that workers claim is trusted: parts are hashed again, their keys are compared with the
manifest and, where that only names a container, with the keys inside the tar or Parquet file.
"""

from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pydantic import TypeAdapter, ValidationError

from models.errors import LedgerError
from tasks.job import InputConfig, ShardSpec
from tasks.run.identity import identity_digest
from tasks.run.ledger import (
    PART_KINDS,
    Commits,
    read_commits,
    read_quarantine,
    read_seal,
    shard_name,
)
from tasks.run.manifest import describe_manifest, read_manifest
from tasks.run.marker import Marker
from tasks.run.records import DamagedError
from tasks.run.run_json import read_run
from tasks.storage.files import join, list_files
from tasks.verify.shard import ShardCheck, check_shard, examples

_AT_ONCE = 8  # shards checked together; also bounds the memory


@dataclass(kw_only=True)
class VerifyReport:
    """What was found.

    Attributes:
        problems: one plain sentence each, with the next step; empty for a clean run.
        notes: worth knowing, no fault (files of unfinished attempts, inputs that are gone).
        num_shards: in the manifest.
        num_committed: shards with a marker.
        rows, failed: in the committed shards.
        num_bytes: size of all committed parts.
        is_deep: parts were hashed and keys compared.
    """

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    num_shards: int = 0
    num_committed: int = 0
    rows: int = 0
    failed: int = 0
    num_bytes: int = 0
    is_deep: bool = True

    @property
    def is_clean(self) -> bool:
        return not self.problems


def verify(run_uri: str, deep: bool = True) -> VerifyReport:
    """Check a run, finished or not.

    Args:
        deep: read every part: hashes, row counts, keys. Otherwise only markers, names and sizes.

    Raises:
        LedgerError: there is no run here, or storage cannot be reached.
    """
    record = read_run(run_uri)
    report = VerifyReport(num_shards=record["num_shards"], is_deep=deep)
    _check_identity(run_uri, record, report)
    commits = read_commits(run_uri)
    markers = commits.markers
    _check_missing(run_uri, commits, report)
    hashes: dict[int, np.ndarray] = {}
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for check in _in_windows(pool, run_uri, record, commits, deep):
            report.problems += check.problems
            report.notes += check.notes
            hashes[check.shard] = check.key_hashes
    report.num_committed = len(markers) + len(commits.covered)
    for marker in markers.values():
        report.rows += marker.rows
        report.failed += marker.failed
        report.num_bytes += sum(part.bytes for part in marker.parts.values())
    _check_unique(hashes, report)
    _check_total(record, report)
    _check_seal(run_uri, record, commits, report)
    _note_orphans(run_uri, markers, report)
    return report


# ---------------------------------------------------------------------------- the run as a whole


def _check_identity(run_uri: str, record: dict[str, Any], report: VerifyReport) -> None:
    try:
        if identity_digest(record) != record["run_id"]:
            report.problems.append(
                "run.json was changed after the run began: its settings no longer hash to the run "
                f"id {record['run_id']}; restore it"
            )
    except DamagedError as error:
        report.problems.append(str(error))
    try:
        found = describe_manifest(run_uri)
    except LedgerError as error:
        report.problems.append(str(error))
        return
    digest = found.digest(record.get("version", 1))
    if (digest, found.num_shards) != (record["manifest"], record["num_shards"]):
        report.problems.append(
            f"manifest.parquet is not the one the run began with: {found.num_shards} shards with "
            f"hash {digest[:12]}, run.json says {record['num_shards']} with "
            f"{record['manifest'][:12]}; restore it"
        )


def _check_missing(run_uri: str, commits: Commits, report: VerifyReport) -> None:
    given_up = read_quarantine(run_uri, commits)
    done = {*commits.markers, *commits.covered, *commits.damaged}
    report.problems += [f"shard {shard_name(i)}: {error}" for i, error in commits.damaged.items()]
    for shard, entry in given_up.items():
        report.problems.append(
            f"shard {shard_name(shard)}: given up after {entry.attempts} attempts: {entry.reason} "
            "Run again to retry it"
        )
    missing = [i for i in range(report.num_shards) if i not in done and i not in given_up]
    if missing:
        report.problems.append(
            f"{len(missing)} of {report.num_shards} shards are not committed yet "
            f"({examples(map(shard_name, missing))}); run its command again"
        )
    for shard in sorted(done):
        if shard >= report.num_shards:
            report.problems.append(
                f"shard {shard_name(shard)}: committed, but the manifest has only shards 0 to "
                f"{report.num_shards - 1}; delete commits/{shard_name(shard)}.json"
            )


def _check_unique(hashes: dict[int, np.ndarray], report: VerifyReport) -> None:
    """No key in two shards. 8 bytes a sample are held; a chance meeting of two among a million
    different keys has probability 3e-8."""
    if not report.is_deep or not hashes:
        return
    everything = np.concatenate(list(hashes.values()))
    owners = np.repeat(list(hashes), [len(part) for part in hashes.values()])
    order = np.argsort(everything, kind="stable")
    everything, owners = everything[order], owners[order]
    twice = np.flatnonzero(everything[1:] == everything[:-1])
    pairs = Counter(
        (int(owners[at]), int(owners[at + 1])) for at in twice if owners[at] != owners[at + 1]
    )
    for (first, second), count in sorted(pairs.items()):
        report.problems.append(
            f"shards {shard_name(first)} and {shard_name(second)} share {count} "
            "sample keys; keys must be unique in a run: set input.key_column to another column and "
            "run into a new output"
        )


def _check_total(record: dict[str, Any], report: VerifyReport) -> None:
    expected = record.get("num_samples")
    if expected is None or report.num_committed < record["num_shards"]:
        return
    if report.rows != expected:
        report.problems.append(f"the manifest has {expected} samples, the markers {report.rows}")


def _check_seal(
    run_uri: str, record: dict[str, Any], commits: Commits, report: VerifyReport
) -> None:
    try:
        seal = read_seal(run_uri)
    except LedgerError as error:
        report.problems.append(str(error))
        return
    if seal is None:
        report.notes.append("the run is not sealed yet")
        return
    if seal["run_id"] != record["run_id"]:
        report.problems.append(f"_SEALED.json belongs to another run, {seal['run_id']}")
    named = {
        part.path: (shard, part.sha256)
        for shard, marker in commits.markers.items()
        for part in marker.parts.values()
    }
    listed = {part["path"]: (part["shard"], part["sha256"]) for part in seal["parts"]}
    differing = named.items() ^ listed.items()
    if differing and {shard for _, (shard, _) in differing} <= commits.compacted:
        report.notes.append(
            "the run was compacted and not sealed since; run `refinery compact` again"
        )
    elif differing:
        paths = sorted({path for path, _ in differing})
        report.problems.append(
            f"_SEALED.json and the markers disagree about {len(paths)} parts "
            f"({examples(paths)}); run its command again, which seals the run anew"
        )


def _note_orphans(run_uri: str, markers: dict[int, Marker], report: VerifyReport) -> None:
    named = {part.path for marker in markers.values() for part in marker.parts.values()}
    count = sum(
        f"{kind}/{name}" not in named
        for kind in PART_KINDS
        for name, _, _ in list_files(join(run_uri, kind), LedgerError, include_partial=True)
    )
    if count:
        report.notes.append(
            f"{count} files belong to no commit (unfinished attempts); readers do not see them, "
            "and `refinery gc` removes them"
        )


# ---------------------------------------------------------------------------- one shard


def _input_settings(record: dict[str, Any]) -> InputConfig:
    """The defaults where there are none, as for shards that are read from a run, or where they were
    edited, which `_check_identity` reports."""
    try:
        return TypeAdapter(InputConfig).validate_python(record["config"].get("input", {}))
    except ValidationError:
        return InputConfig()


def _in_windows(
    pool: ThreadPoolExecutor,
    run_uri: str,
    record: dict[str, Any],
    commits: Commits,
    deep: bool,
) -> Iterator[ShardCheck]:
    """Checks in shard order, a few at a time: a large manifest is never held at once."""
    settings = _input_settings(record)
    window: list[tuple[Marker, list[ShardSpec]]] = []
    gathered: dict[int, list[ShardSpec]] = {}

    def flush() -> Iterator[ShardCheck]:
        yield from pool.map(
            lambda entry: check_shard(
                run_uri, record["run_id"], entry[0], entry[1], settings, deep
            ),
            window,
        )
        window.clear()

    try:
        for spec in read_manifest(run_uri):
            owner = commits.covered.get(spec.id, spec.id)
            marker = commits.markers.get(owner)
            if marker is None:
                continue
            specs = gathered.setdefault(owner, [])
            specs.append(spec)
            if len(specs) == max(len(marker.covers), 1):
                window.append((marker, gathered.pop(owner)))
            if len(window) >= _AT_ONCE:
                yield from flush()
    except LedgerError:  # reported by _check_identity
        window = [(marker, []) for marker in commits.markers.values()]
    yield from flush()
