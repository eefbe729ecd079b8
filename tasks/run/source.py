"""A finished run as the input of another: each of its committed shards becomes a shard."""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from models.errors import ConfigError, LedgerError, ShardError
from tasks.input.face import Face
from tasks.job import ShardSpec
from tasks.run.ledger import is_whole, read_finished, read_generations, shard_name
from tasks.run.marker import Marker
from tasks.run.rows import Row
from tasks.run.run_json import read_declared, read_run
from tasks.storage.files import join
from tasks.storage.part_files import read_part


def check_has_codes(source_uri: str) -> None:
    """Refuse a run whose codes are those of another.

    Raises:
        LedgerError: there is no such run.
        ConfigError: it was made from another run.
    """
    if not read_declared(source_uri).stores_doors:
        raise ConfigError(
            f"{source_uri} holds pictures made from the codes of another run; start from that one, "
            f"{read_run(source_uri)['config']['source']}"
        )


def plan_source(source_uri: str, limit: int | None = None) -> Iterator[ShardSpec]:
    """Shards of a run over another's samples, in the order of the source's.

    Args:
        source_uri: a sealed run.
        limit: stop after so many samples.

    Raises:
        LedgerError: no run, one that is not finished, or one without a committed sample.
        ConfigError: the limit is below 1.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}; expected at least 1, or none")
    read_run(source_uri)
    commits = read_finished(source_uri)
    markers = [marker for marker in commits.markers.values() if marker.rows]
    if not markers:
        raise LedgerError(f"{source_uri}: no sample is committed in this run; nothing to work on")
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
    """The commit that a shard reads.

    Raises:
        ShardError: it is gone, or is not the one that was planned with.
    """
    shard, found = int(spec.members[0]), "gone"
    for marker in read_generations(spec.uri, shard):
        if _etag(marker) == spec.etag:
            if is_whole(spec.uri, marker):
                return marker
            found = "compacted"
            break
        found = "not the same"
    raise ShardError(
        f"{spec.uri}: shard {shard_name(shard)} is {found} since this work was planned; "
        "restore the run, or start again with a new output"
    )


def shards_read(spec: ShardSpec) -> list[int]:
    """Numbers of the shards whose rows a shard of a run reads: several of a compacted run."""
    shard = int(spec.members[0])
    commits = read_generations(spec.uri, shard)
    covered = next((m.covers for m in commits if _etag(m) == spec.etag), ())
    return list(dict.fromkeys([shard, *(each.shard for each in covered)]))


def read_rows(run_uri: str, marker: Marker) -> list[Row]:
    """What one shard knows of its samples besides codes and pictures, failed ones included, in
    order of their keys.

    Raises:
        LedgerError: the part is missing or damaged.
    """
    names = ["sample_key", "image_uri", "image_sha256", "seed", "error_kind", "error"]
    faces = ["face_points", "face_transform", "face_box", "face_score"]
    part = marker.parts["latents"]
    # Parquet leaves out the names that the part does not have.
    table = read_part(join(run_uri, part.path), part.bytes, [*names, *faces])
    has_faces = "face_points" in table.column_names
    return [_row(values) if has_faces else Row(**values) for values in table.to_pylist()]


def _row(values: dict[str, Any]) -> Row:
    points, transform, box, score = (
        values.pop(f"face_{name}", None) for name in ("points", "transform", "box", "score")
    )
    if points is None:
        return Row(**values)
    face = Face(
        points=np.array(points, dtype=np.float64).reshape(5, 2),
        transform=(complex(*transform[:2]), complex(*transform[2:])),
        box=box and tuple(box),
        score=score,
    )
    return Row(**values, face=face)


def _etag(marker: Marker) -> str:
    digests = [part.sha256 for _, part in sorted(marker.parts.items())]
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()
