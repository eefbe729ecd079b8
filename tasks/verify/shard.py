"""One committed shard under the magnifying glass; `tasks.verify.run` looks at them all.

Compares the marker with the files it names, the files with each other, and their keys with the
manifest.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import IO, cast

import numpy as np

from models.errors import LedgerError, RefineryError
from tasks.input.detect import finds_several
from tasks.input.face import photo_keys
from tasks.input.parquet import open_parquet, parquet_errors, parquet_keys
from tasks.input.read import read_shard
from tasks.job import InputConfig, ShardSpec
from tasks.run.ledger import shard_name
from tasks.run.marker import Marker, Part
from tasks.run.source import read_rows, source_marker
from tasks.run.vectors import open_vectors
from tasks.storage.errors import storage_errors
from tasks.storage.files import file_info, is_local, join, local_path, open_filesystem

_SHOWN = 3  # examples in a message
_AGAIN = "Run again, which redoes the shard"


@dataclass(kw_only=True)
class ShardCheck:
    """The findings about one committed shard."""

    marker: Marker
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    key_hashes: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))

    @property
    def shard(self) -> int:
        return self.marker.shard

    def complain(self, text: str) -> None:
        self.problems.append(f"shard {shard_name(self.shard)}: {text}")


def check_shard(
    run_uri: str,
    run_id: str,
    marker: Marker,
    specs: Sequence[ShardSpec],
    config: InputConfig,
    deep: bool,
) -> ShardCheck:
    """Check one commit.

    Args:
        specs: what its rows are of, more than one shard after a compaction; none where the
            manifest cannot be read.
        deep: also hash the parts and compare keys.
    """
    check = ShardCheck(marker=marker)
    if marker.run_id != run_id:
        check.complain(
            f"its marker is of run {marker.run_id}, expected run {run_id}. {_redo(marker)}"
        )
    intact = [
        kind
        for kind, part in sorted(marker.parts.items())
        if _is_intact(run_uri, part, check, deep)
    ]
    _check_counts(marker, check)
    if deep and len(intact) == len(marker.parts):
        try:
            _check_rows(run_uri, marker, specs, config, check)
        except RefineryError as error:
            check.complain(f"{error} {_redo(marker)}")
    return check


def _is_intact(run_uri: str, part: Part, check: ShardCheck, deep: bool) -> bool:
    uri = join(run_uri, part.path)
    info = file_info(uri)
    if info is None:
        check.complain(f"{part.path} is missing. {_AGAIN}")
        return False
    if info[0] != part.bytes:
        check.complain(f"{part.path} has {info[0]} bytes, the marker says {part.bytes}. {_AGAIN}")
        return False
    if deep and _sha256(uri) != part.sha256:
        check.complain(
            f"{part.path} was changed: its sha256 is not the marker's. To redo the shard, "
            "delete it and run again"
        )
        return False
    return True


def _check_counts(marker: Marker, check: ShardCheck) -> None:
    good = marker.rows - marker.failed
    for kind, part in sorted(marker.parts.items()):
        expected = marker.rows if kind == "latents" else good
        if part.rows != expected:
            check.complain(
                f"the marker counts {part.rows} rows in {kind}, expected {expected} of "
                f"{marker.rows} samples with {marker.failed} failures"
            )
    if marker.rows and "latents" not in marker.parts:
        check.complain(f"the marker counts {marker.rows} samples but names no latents part")


def _check_rows(
    run_uri: str,
    marker: Marker,
    specs: Sequence[ShardSpec],
    config: InputConfig,
    check: ShardCheck,
) -> None:
    keys, good = [], []
    if "latents" in marker.parts:
        columns = _read_columns(
            join(run_uri, marker.parts["latents"].path), ["sample_key", "status", "run_id"]
        )
        keys = columns["sample_key"]
        good = [key for key, status in zip(keys, columns["status"], strict=True) if status == "ok"]
        strangers = set(columns["run_id"]) - {marker.run_id}
        if strangers:
            check.complain(f"latents holds rows of another run: {examples(sorted(strangers))}")
    if len(keys) != marker.rows or len(keys) - len(good) != marker.failed:
        check.complain(
            f"latents holds {len(keys)} rows with {len(keys) - len(good)} failures, the marker "
            f"says {marker.rows} with {marker.failed}. {_redo(marker)}"
        )
    for kind in ("images", "residuals"):
        if kind in marker.parts:
            found = _read_columns(join(run_uri, marker.parts[kind].path), ["sample_key"])
            _compare(f"{kind} against the good rows of latents", found["sample_key"], good, check)
    if "vectors" in marker.parts:
        keys_found = open_vectors(run_uri, marker.parts["vectors"])["sample_key"].to_pylist()
        _compare("vectors against the good rows of latents", keys_found, good, check)
    _check_photos(run_uri, marker, check)
    check.key_hashes = np.fromiter((_key_hash(key) for key in keys), np.uint64, len(keys))
    if not specs:
        return
    try:
        expected = [key for spec in specs for key in EXPECTED_KEYS[spec.kind](spec, config)]
    except RefineryError as error:
        check.notes.append(
            f"shard {shard_name(check.shard)}: the input cannot be read, so its keys were not "
            f"compared: {error}"
        )
        return
    if finds_several(config):
        keys = photo_keys(keys, set(expected))
    _compare("latents against the manifest", keys, expected, check)


def _check_photos(run_uri: str, marker: Marker, check: ShardCheck) -> None:
    """The files that a run of `compose` has written."""
    if "latents" not in marker.parts:
        return
    uri = join(run_uri, marker.parts["latents"].path)
    with ExitStack() as stack, parquet_errors(uri):
        known = open_parquet(uri, stack).schema_arrow.names
    for column in (name for name in known if name.startswith("photo@")):
        digests = column.replace("photo@", "photo_sha256@")
        table = _read_columns(uri, [column, digests])
        named = {path: sha for path, sha in zip(*table.values(), strict=True) if path is not None}
        for path, digest in sorted(named.items()):
            if file_info(join(run_uri, path)) is None:
                check.complain(f"{path} is missing. {_redo(marker)}")
            elif _sha256(join(run_uri, path)) != digest:
                check.complain(f"{path} was changed: its sha256 is not the row's. {_redo(marker)}")


def _stored_keys(spec: ShardSpec, config: InputConfig) -> list[str]:
    keys = [row.sample_key for row in read_rows(spec.uri, source_marker(spec))]
    return keys[: spec.row_stop or None]


EXPECTED_KEYS: dict[str, Callable[[ShardSpec, InputConfig], list[str]]] = {
    "files": lambda spec, config: list(spec.members),
    "tar": lambda spec, config: [sample.key for sample in read_shard(spec, config)],
    "parquet": parquet_keys,
    "run": _stored_keys,
}
"""The sample keys that a shard must produce, from the manifest and, for containers, the input; by
`ShardSpec.kind`."""


def _compare(what: str, found: list[str], expected: Iterable[str], check: ShardCheck) -> None:
    counts, wanted = Counter(found), Counter(expected)
    twice = [key for key, count in counts.items() if count > 1]
    lacking = [key for key in wanted if key not in counts]
    foreign = [key for key in counts if key not in wanted]
    for complaint, keys in (("twice", twice), ("missing", lacking), ("not expected", foreign)):
        if keys:
            check.complain(
                f"{what}: {len(keys)} samples {complaint} ({examples(sorted(keys))}). "
                f"{_redo(check.marker)}"
            )


def _read_columns(uri: str, names: list[str]) -> dict[str, list[str]]:
    with ExitStack() as stack, parquet_errors(uri):
        file = open_parquet(uri, stack)
        missing = set(names) - set(file.schema_arrow.names)
        if missing:
            raise LedgerError(f"{uri} has no column {examples(sorted(missing))}.")
        return file.read(names).to_pydict()


def _sha256(uri: str) -> str:
    digest = hashlib.sha256()
    with storage_errors("read", uri, LedgerError), ExitStack() as stack:
        if is_local(uri):
            file = cast(IO[bytes], stack.enter_context(open(local_path(uri), "rb")))
        else:
            filesystem, path = open_filesystem(uri)
            opened = filesystem.open(path, "rb", cache_type="readahead")
            file = cast(IO[bytes], stack.enter_context(opened))
        while chunk := file.read(8 * 2**20):
            digest.update(chunk)
    return digest.hexdigest()


def _key_hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def _redo(marker: Marker) -> str:
    part = next(iter(marker.parts.values()), None)
    file = part.path if part else f"commits/{shard_name(marker.shard)}.json"
    return f"To redo the shard, delete {file} and run again"


def examples(names: Iterable[str]) -> str:
    """The first few, for a message."""
    shown = list(names)
    text = ", ".join(shown[:_SHOWN])
    return text if len(shown) <= _SHOWN else f"{text}, ..."
