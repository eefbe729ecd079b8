"""What of an input earlier runs have not done yet: new files, and files that have changed.

A file is left alone where an earlier run has committed it with the same size and etag, which its
shard's etag tells of all its members together; where that differs, each whose content has the
sha256 that stands in that run's row. A tar or a Parquet file is one thing: when its size or etag
differs, all of it is done again.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from models.errors import ConfigError
from tasks.input.files import read_files
from tasks.input.plan import Entry, PlannedShards, entries_etag, plan_shards
from tasks.job import JobConfig, ShardSpec
from tasks.run.identity import make_identity
from tasks.run.ledger import read_commits
from tasks.run.manifest import ManifestInfo, read_manifest
from tasks.run.marker import Marker
from tasks.run.run_json import differences, read_run
from tasks.run.source import read_rows
from tasks.storage.files import list_files

SAME, SAME_CONTENT = "unchanged since {}", "with the same content as in {}"
"""Reasons why files are in no shard, with the earlier run."""


def plan_update(
    job: JobConfig, source: str, shard_size: int, limit: int | None, earlier: Sequence[str]
) -> PlannedShards:
    """The shards of a folder or prefix without what earlier runs have done.

    Args:
        earlier: runs, made with the same settings.

    Raises:
        LedgerError: one of them is no run. Others as `tasks.input.plan.plan_shards`.
    """
    skipped: Counter[str] = Counter()
    entries = list_files(source, ConfigError, include_partial=True, include_broken=True)
    for run_uri in earlier:
        entries = _without(entries, source, run_uri, job, skipped)
    return plan_shards(source, shard_size, limit, job.input, listing=entries, skipped=skipped)


def check_settings(job: JobConfig, hashes: Mapping[str, str], earlier: Sequence[str]) -> None:
    """
    Raises:
        ConfigError: an earlier run was made with other settings or weights.
    """
    for run_uri in earlier:
        found = read_run(run_uri)
        info = ManifestInfo(0, 0, 0, found["manifest"], found["manifest"])
        wanted = make_identity(job, info, hashes, found.get("version", 1))
        lines = differences(found, wanted)
        if lines:
            raise ConfigError(
                f"--update {run_uri}: it was made with other settings, so its results do not stand "
                "for those of now:\n" + "\n".join(lines) + "\nRestore them, or leave --update out"
            )


def _without(
    entries: Iterable[Entry], root: str, run_uri: str, job: JobConfig, skipped: Counter[str]
) -> Iterator[Entry]:
    """Entries that a run has not done, in order. Both it and the listing are walked side by side:
    one shard is in memory."""
    commits = read_commits(run_uri)
    markers = commits.markers | {
        shard: commits.markers[other] for shard, other in commits.covered.items()
    }
    archives = _archives(run_uri, markers)
    shards = (spec for spec in read_manifest(run_uri) if spec.kind == "files")
    current, inside = next(shards, None), list[Entry]()

    def close(spec: ShardSpec) -> Iterator[Entry]:
        kept = _changed(inside, spec, root, run_uri, markers, job, skipped)
        inside.clear()
        yield from kept

    for entry in entries:
        while current is not None and _order(entry[0]) > _order(current.members[-1]):
            yield from close(current)
            current = next(shards, None)
        if entry[0] in archives:
            is_done = entries_etag([entry], *archives[entry[0]][1]) == archives[entry[0]][0]
            skipped[SAME.format(run_uri)] += is_done
            if is_done:
                continue
        if current is None:
            yield entry
        else:
            inside.append(entry)
    if current is not None:
        yield from close(current)


def _order(name: str) -> bytes:
    return os.fsencode(name)


def _archives(
    run_uri: str, markers: Mapping[int, Marker]
) -> dict[str, tuple[str, tuple[int, int]]]:
    """(etag, rows) of the first shard of each tar and Parquet file that is committed whole."""
    found: dict[str, tuple[str, tuple[int, int]]] = {}
    broken: set[str] = set()
    for spec in read_manifest(run_uri):
        if spec.kind not in ("tar", "parquet"):
            continue
        (name,) = spec.members
        found.setdefault(name, (spec.etag, (spec.row_start, spec.row_stop)))
        if spec.id not in markers or (spec.kind == "tar" and spec.row_stop):
            broken.add(name)
    return {name: value for name, value in found.items() if name not in broken}


def _changed(
    inside: Sequence[Entry],
    spec: ShardSpec,
    root: str,
    run_uri: str,
    markers: Mapping[int, Marker],
    job: JobConfig,
    skipped: Counter[str],
) -> list[Entry]:
    """Of the entries up to the last member of a shard, those that its run has not done."""
    members = set(spec.members)
    known = [entry for entry in inside if entry[0] in members]
    if not known or spec.id not in markers:
        return list(inside)
    if entries_etag(known) == spec.etag:
        skipped[SAME.format(run_uri)] += len(known)
        return [entry for entry in inside if entry[0] not in members]
    rows = {row.sample_key: row.image_sha256 for row in read_rows(run_uri, markers[spec.id])}
    names = tuple(entry[0] for entry in known)
    same = {
        sample.key
        for sample in read_files(ShardSpec(id=0, kind="files", uri=root, members=names), job.input)
        if sample.data is not None and _sha256(sample.data) == rows.get(sample.key)
    }
    skipped[SAME_CONTENT.format(run_uri)] += len(same)
    return [entry for entry in inside if entry[0] not in same]


def _sha256(data: Any) -> str:
    return hashlib.sha256(data).hexdigest()
