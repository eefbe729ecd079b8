"""The manifest of a run: its shards, written once, in <run>/manifest.parquet.

Written and read a row group at a time, so memory does not grow with the number of pictures.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from models.errors import LedgerError, ShardError
from tasks.input.parquet import open_parquet, parquet_errors
from tasks.input.plan import plan_shards as plan_shards
from tasks.job import ShardSpec
from tasks.storage.files import exists, join, open_write, read_bytes

MANIFEST = "manifest.parquet"
SKIPPED, SHARD_SIZE = "skipped", "shard_size"
"""Keys of the file's metadata."""
SMALL_SHARD_SIZE = 256
"""Of runs that do not say it."""
GROUP_SHARDS = 256
GROUP_MEMBERS = 32_768
"""A row group ends at whichever comes first, so that one shard is cheap to look up."""
SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("uri", pa.string(), nullable=False),
        pa.field("members", pa.list_(pa.string()), nullable=False),
        pa.field("row_start", pa.int64(), nullable=False),
        pa.field("row_stop", pa.int64(), nullable=False),
        pa.field("num_samples", pa.int64(), nullable=False),
        pa.field("num_bytes", pa.int64(), nullable=False),
        pa.field("etag", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True)
class ManifestInfo:
    """The size and identity of a manifest.

    Attributes:
        num_samples: None where only reading tells (tars).
        num_bytes: encoded pictures, for planning.
        sha256: over what the shards hold, without the places where it lies; the same plan has the
            same hash whenever it is written.
        placed_sha256: with the places; runs of version 1 have it in their ids.
        skipped: files of the input that are in no shard, by reason.
    """

    num_shards: int
    num_samples: int | None
    num_bytes: int
    sha256: str
    placed_sha256: str = ""
    skipped: Mapping[str, int] = field(default_factory=dict)

    def digest(self, version: int) -> str:
        """The one that counts for runs of a version."""
        return self.placed_sha256 if version == 1 else self.sha256


class _Sum:
    """Adds up a ManifestInfo shard by shard."""

    def __init__(self) -> None:
        self.num_shards = self.num_samples = self.num_bytes = 0
        self.is_counted = True
        self.digest, self.placed_digest = hashlib.sha256(), hashlib.sha256()

    def add(self, spec: ShardSpec) -> None:
        if spec.id != self.num_shards:
            raise LedgerError(
                f"manifest: shard {spec.id} stands at place {self.num_shards}; ids must be dense"
            )
        self.num_shards += 1
        self.is_counted = self.is_counted and spec.num_samples >= 0
        self.num_samples += max(0, spec.num_samples)
        self.num_bytes += spec.num_bytes
        values = {name: getattr(spec, name) for name in SCHEMA.names}
        self.placed_digest.update(json.dumps([*values.values()]).encode() + b"\n")
        del values["uri"]
        self.digest.update(json.dumps([*values.values()]).encode() + b"\n")

    def info(self, skipped: Mapping[str, int]) -> ManifestInfo:
        num_samples = self.num_samples if self.is_counted else None
        return ManifestInfo(
            self.num_shards,
            num_samples,
            self.num_bytes,
            self.digest.hexdigest(),
            self.placed_digest.hexdigest(),
            dict(skipped),
        )


def write_manifest(
    run_uri: str, shards: Iterable[ShardSpec], shard_size: int = SMALL_SHARD_SIZE
) -> ManifestInfo:
    """Write <run>/manifest.parquet, visible only when it is complete.

    The manifest of a run that has begun (run.json is there) is refused another plan; the same plan
    leaves it untouched, and the same input in another place gives it the new one.

    Raises:
        LedgerError: the run has begun with another input, or the folder cannot be written.
        ConfigError, ShardError: whatever planning raises; nothing is written then.
    """
    uri, run_json = join(run_uri, MANIFEST), join(run_uri, "run.json")
    if not (exists(run_json) and exists(uri)):
        with open_write(uri) as file:
            return _write(file, shards, shard_size)
    old, version = describe_manifest(run_uri), json.loads(read_bytes(run_json)).get("version", 1)
    try:
        with open_write(uri) as file:
            new = _write(file, shards, shard_size)
            if old == new:
                raise _Unchanged
            if old.digest(version) != new.digest(version):
                raise LedgerError(
                    f"{run_uri} was begun with another input or shard size: its manifest has "
                    f"{_in_words(old)}, the plan now has {_in_words(new)}. Finish the old run with "
                    "the input as it was, or choose a new output folder"
                )
    except _Unchanged:
        return old
    return new


class _Unchanged(Exception):
    """Ends the writing of a manifest that is there already."""


def _in_words(info: ManifestInfo) -> str:
    samples = "an uncounted number of" if info.num_samples is None else info.num_samples
    return f"{info.num_shards} shards with {samples} samples (sha256 {info.sha256[:12]}...)"


def _write(file: BinaryIO, shards: Iterable[ShardSpec], shard_size: int) -> ManifestInfo:
    tally = _Sum()
    rows: list[ShardSpec] = []
    num_members = 0
    with pq.ParquetWriter(file, SCHEMA, compression="zstd") as writer:
        for spec in shards:
            tally.add(spec)
            rows.append(spec)
            num_members += len(spec.members)
            if len(rows) >= GROUP_SHARDS or num_members >= GROUP_MEMBERS:
                writer.write_table(_table(rows))
                rows, num_members = [], 0
        if rows:
            writer.write_table(_table(rows))
        skipped: Mapping[str, int] = getattr(shards, "skipped", {})
        if skipped:
            writer.add_key_value_metadata({SKIPPED: json.dumps(skipped, sort_keys=True)})
        if shard_size != SMALL_SHARD_SIZE:
            writer.add_key_value_metadata({SHARD_SIZE: str(shard_size)})
    return tally.info(skipped)


def _table(rows: list[ShardSpec]) -> pa.Table:
    columns = {name: [getattr(spec, name) for spec in rows] for name in SCHEMA.names}
    return pa.table(columns, schema=SCHEMA)


def read_manifest(run_uri: str) -> Iterator[ShardSpec]:
    """The shards in order, a row group in memory at a time.

    Raises:
        LedgerError: the manifest is missing or corrupt.
    """
    with ExitStack() as stack:
        file = _open(run_uri, stack)
        for group in range(file.metadata.num_row_groups):
            yield from _read_group(file, group, run_uri)


def read_shard_spec(run_uri: str, shard_id: int) -> ShardSpec:
    """One shard, reading one row group.

    Raises:
        LedgerError: there is no such shard, or the manifest is missing or corrupt.
    """
    with ExitStack() as stack:
        file = _open(run_uri, stack)
        first = 0
        for group in range(file.metadata.num_row_groups):
            after = first + file.metadata.row_group(group).num_rows
            if first <= shard_id < after:
                return _read_group(file, group, run_uri)[shard_id - first]
            first = after
    raise LedgerError(f"{join(run_uri, MANIFEST)} has shards 0 to {first - 1}, no {shard_id}")


def describe_manifest(run_uri: str) -> ManifestInfo:
    """Size and identity, computed anew from the rows.

    Raises:
        LedgerError: the manifest is missing or corrupt.
    """
    tally = _Sum()
    for spec in read_manifest(run_uri):
        tally.add(spec)
    return tally.info(read_skipped(run_uri))


def read_skipped(run_uri: str) -> dict[str, int]:
    """Files of the input that are in no shard, by reason (`tasks.input.plan.PlannedShards`); none
    where the manifest cannot be read, which `verify` says."""
    found = _noted(run_uri, SKIPPED, {})
    return {str(reason): int(count) for reason, count in found.items()}


def read_shard_size(run_uri: str) -> int:
    """Samples per shard, as the plan was made."""
    return int(_noted(run_uri, SHARD_SIZE, SMALL_SHARD_SIZE))


def _noted(run_uri: str, key: str, default: Any) -> Any:
    """A note in the file's metadata."""
    try:
        with ExitStack() as stack:
            noted = (_open(run_uri, stack).metadata.metadata or {}).get(key.encode())
        found = default if noted is None else json.loads(noted)
        return found if isinstance(found, type(default)) else default
    except (LedgerError, ValueError):
        return default


def _open(run_uri: str, stack: ExitStack) -> pq.ParquetFile:
    uri = join(run_uri, MANIFEST)
    try:
        return open_parquet(uri, stack)
    except ShardError as problem:
        raise LedgerError(f"the run's manifest cannot be opened: {problem}") from problem


def _read_group(file: pq.ParquetFile, group: int, run_uri: str) -> list[ShardSpec]:
    uri = join(run_uri, MANIFEST)
    try:
        with parquet_errors(uri):
            rows: list[dict[str, Any]] = file.read_row_group(group).to_pylist()
            return [ShardSpec(**{**row, "members": tuple(row["members"])}) for row in rows]
    except (ShardError, TypeError) as problem:
        raise LedgerError(f"the run's manifest cannot be read: {problem}") from problem
