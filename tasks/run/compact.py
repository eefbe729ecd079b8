"""Many parts to few: shards whose parts are small get a common one, in a sealed run.

A compaction is an attempt like any other (`tasks.run.ledger`): it writes parts for a further
generation of the first of some shards, and commits them by a marker that says which commits it
covers. That one file makes the change for all of them at once. Readers that have read the markers
before go on with the old parts, which stay until `remove_orphans` finds them covered for long
enough. Rows keep their order: shard by shard, by key within one; the marker says where each begins.

Killed anywhere, it is run again: what is committed is kept, the rest is an attempt that died.
"""

import hashlib
import logging
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa

from models.errors import LedgerError
from tasks.run.ledger import (
    TABLE_KINDS,
    Commits,
    read_commits,
    read_finished,
    shard_name,
    write_marker,
)
from tasks.run.marker import Covered, Marker, Part
from tasks.run.parts import to_parquet
from tasks.storage.crash import crash_point
from tasks.storage.files import join, write_bytes
from tasks.storage.part_files import read_part

logger = logging.getLogger(__name__)

TARGET_BYTES = 128 * 2**20
"""Of the parts of a shard together, as stored; what is larger already stays as it is."""


@dataclass(frozen=True, kw_only=True)
class Compacted:
    """What a compaction did.

    Attributes:
        parts_before, parts_after: files that readers open.
    """

    parts_before: int
    parts_after: int


def compact(run_uri: str, target_bytes: int = TARGET_BYTES) -> Compacted:
    """Give small shards of a sealed run common parts; it is to be sealed anew then. To be run again
    after a kill; on a run that is compact already it does nothing.

    Args:
        target_bytes: of the parts that shards share, at most; they are held in memory.

    Raises:
        LedgerError: the run is not sealed or an index, or a part is missing or damaged.
    """
    commits = read_finished(run_uri)
    kinds = {kind for marker in commits.markers.values() for kind in marker.parts}
    if not kinds <= set(TABLE_KINDS):
        raise LedgerError(
            f"{run_uri}: an index, whose parts are not tables; make it again of the compacted run "
            "for fewer and larger ones"
        )
    for group in _groups(list(commits.markers.values()), target_bytes):
        _commit(run_uri, group, commits)
    crash_point("compact_before_seal", 0)
    return Compacted(parts_before=_count(commits), parts_after=_count(read_commits(run_uri)))


def _count(commits: Commits) -> int:
    return sum(len(marker.parts) for marker in commits.markers.values())


def _groups(markers: Sequence[Marker], target_bytes: int) -> Iterator[list[Marker]]:
    """Neighbours that fit together, two or more."""
    group: list[Marker] = []
    room = target_bytes
    for marker in markers:
        size = sum(part.bytes for part in marker.parts.values())
        if size > room:
            if len(group) > 1:
                yield group
            group, room = [], target_bytes
        group.append(marker)
        room -= size
    if len(group) > 1:
        yield group


def _commit(run_uri: str, group: Sequence[Marker], commits: Commits) -> None:
    shard, attempt = group[0].shard, uuid.uuid4().hex[:12]
    generation = commits.last[shard] + 1
    parts: dict[str, Part] = {}
    for kind in TABLE_KINDS:
        having = [marker for marker in group if kind in marker.parts]
        if not having:
            continue
        data, rows = _joined(run_uri, having, kind)
        path = f"{kind}/{shard_name(shard, generation)}-{attempt}.parquet"
        write_bytes(join(run_uri, path), data)
        digest = hashlib.sha256(data).hexdigest()
        parts[kind] = Part(path=path, rows=rows, bytes=len(data), sha256=digest)
        crash_point("compact_between_parts", shard)
    crash_point("compact_before_marker", shard)
    marker = _marker(group, parts, attempt, tuple(_covers(group, commits)))
    if write_marker(run_uri, marker, generation) != marker:
        logger.warning("%s: shard %s was done again meanwhile", run_uri, shard_name(shard))


def _covers(group: Sequence[Marker], commits: Commits) -> Iterator[Covered]:
    """All commits that a group stands for, earlier compactions resolved."""
    first_row = 0
    for marker in group:
        own = Covered(
            shard=marker.shard,
            generation=commits.counted[marker.shard],
            attempt=marker.attempt,
            first_row=first_row,
            rows=marker.rows,
        )
        if not marker.covers:
            yield own
        for covered in marker.covers:
            is_own = covered.shard == marker.shard
            yield Covered(
                shard=covered.shard,
                generation=own.generation if is_own else covered.generation,
                attempt=marker.attempt if is_own else covered.attempt,
                first_row=first_row + covered.first_row,
                rows=covered.rows,
            )
        first_row += marker.rows


def _marker(
    group: Sequence[Marker], parts: dict[str, Part], attempt: str, covers: tuple[Covered, ...]
) -> Marker:
    """One marker that says of all shards together what theirs said."""
    seconds: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    for marker in group:
        seconds.update(marker.seconds)
        failures.update(marker.failures)
    first = group[0]
    return Marker(
        shard=first.shard,
        attempt=attempt,
        run_id=first.run_id,
        rows=sum(marker.rows for marker in group),
        failed=sum(marker.failed for marker in group),
        parts=parts,
        seconds=dict(seconds),
        wall_s=sum(marker.wall_s for marker in group),
        failures=dict(sorted(failures.items())),
        device=first.device,
        memory_bytes=max(marker.memory_bytes for marker in group),
        code_version=first.code_version,
        notes=tuple(dict.fromkeys(note for marker in group for note in marker.notes)),
        started_at=min(marker.started_at for marker in group),
        finished_at=max(marker.finished_at for marker in group),
        covers=covers,
    )


def _joined(run_uri: str, group: Sequence[Marker], kind: str) -> tuple[bytes, int]:
    """The rows of a kind of part, one shard after the other, as a file."""
    tables: list[pa.Table] = []
    for marker in group:
        part = marker.parts[kind]
        uri = join(run_uri, part.path)
        tables.append(read_part(uri, part.bytes))
        if tables[0].schema != tables[-1].schema:
            raise LedgerError(f"{uri}: its columns are not those of {group[0].parts[kind].path}")
    table = pa.concat_tables(tables)
    return to_parquet(table, kind), table.num_rows
