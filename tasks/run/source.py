"""Cutting a finished run into shards of edits: one for each of its committed shards."""

import hashlib
from collections.abc import Iterator

from models.errors import ConfigError, LedgerError, ShardError
from tasks.edit_job import EditJobConfig
from tasks.job import ShardSpec
from tasks.run.ledger import load_job, read_marker, read_markers, read_seal, shard_name
from tasks.run.marker import Marker


def plan_edits(source_uri: str, limit: int | None = None) -> Iterator[ShardSpec]:
    """Shards of an edit run, in the order of the source's.

    Args:
        source_uri: a sealed run of inversions.
        limit: stop after so many samples.

    Raises:
        LedgerError: no run, one that is not finished, or one without a committed sample.
        ConfigError: the run holds edits itself, or the limit is below 1.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}; expected at least 1, or none")
    job = load_job(source_uri)
    if isinstance(job, EditJobConfig):
        raise ConfigError(
            f"{source_uri} holds edited pictures, not codes to edit; edit the run they were made "
            f"from, {job.source}, with all the edits together"
        )
    if read_seal(source_uri) is None:
        raise LedgerError(
            f"{source_uri}: the run is not finished, so its samples may still change; run "
            "`refinery invert` on it again, which finishes it"
        )
    markers = [marker for marker in read_markers(source_uri).values() if marker.rows]
    if not markers:
        raise LedgerError(f"{source_uri}: no sample is committed in this run; nothing to edit")
    return _shards(source_uri, markers, limit)


def _shards(source_uri: str, markers: list[Marker], limit: int | None) -> Iterator[ShardSpec]:
    room = 2**62 if limit is None else limit
    for number, marker in enumerate(markers):
        taken = min(marker.rows, room)
        if not taken:
            return
        room -= taken
        yield ShardSpec(
            id=number,
            kind="run",
            uri=source_uri,
            members=(shard_name(marker.shard),),
            row_stop=taken if taken < marker.rows else 0,
            num_samples=taken,
            num_bytes=sum(part.bytes for part in marker.parts.values()),
            etag=_etag(marker),
        )


def source_marker(spec: ShardSpec) -> Marker:
    """The commit that a shard of edits reads.

    Raises:
        ShardError: it is gone, or is not the one that was planned with.
    """
    shard = int(spec.members[0])
    marker = read_marker(spec.uri, shard)
    if marker is None or _etag(marker) != spec.etag:
        found = "gone" if marker is None else "not the same"
        raise ShardError(
            f"{spec.uri}: shard {shard_name(shard)} is {found} since these edits were planned; "
            "restore the run, or edit it into a new output"
        )
    return marker


def _etag(marker: Marker) -> str:
    digests = [part.sha256 for _, part in sorted(marker.parts.items())]
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()
