"""The shard ledger: which work a run is, which shards are done, which gave up.

    run.json            resolved config, manifest hash, weight hashes, and the run id
                        (`tasks.run.identity`)
    commits/00042.json  the commit of shard 42 (`tasks.run.marker`): readers see only parts it names
    failed/00042.json   shard 42 was given up, with the reason; a later commit supersedes it
    _SEALED.json        every shard is committed or given up; lists all parts

No file is ever locked or appended to: each is one atomic write, the last complete one wins.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from models.errors import LedgerError
from tasks.job import Job
from tasks.run.identity import VERSION, contents, identity_digest, make_identity
from tasks.run.marker import Marker
from tasks.storage.files import exists, join, list_files, read_bytes, remove, write_bytes

if TYPE_CHECKING:
    from tasks.run.manifest import ManifestInfo

logger = logging.getLogger(__name__)

TABLE_KINDS = ("latents", "images", "residuals")
"""Parts in Parquet, which SQL sees."""
PART_KINDS = (*TABLE_KINDS, "vectors", "exact")
_READERS = 16  # markers are fetched by so many threads: a GET is mostly waiting


@dataclass(frozen=True, kw_only=True)
class RunHandle:
    """All that a worker needs to know of a run; small enough to travel with every call."""

    uri: str
    run_id: str
    code_version: str = ""


@dataclass(frozen=True, kw_only=True)
class Declared:
    """What the kind of work says of its run, for those who read the run.

    Attributes:
        kind: line of `tasks.work.kinds.KINDS`.
        stages: of an attempt, in order: the keys of `Marker.seconds`.
        stores_doors: the run is the home of its codes, and other kinds of job can start from it.
        method: chain of methods that made the codes, e.g. "e4e+wplus".
        metrics, pictures: columns of latents/ and of images/.
        variants: those pictures that are edits of "inversion".
        faces: whether latents/ says where in their photographs the samples are.
    """

    kind: str
    stages: tuple[str, ...]
    stores_doors: bool
    method: str
    metrics: tuple[str, ...]
    pictures: tuple[str, ...]
    variants: tuple[str, ...] = ()
    faces: bool = False


@dataclass(frozen=True, kw_only=True)
class Quarantined:
    """A shard that was given up.

    Attributes:
        attempts: how often it was tried.
        at: UTC, ISO 8601.
    """

    shard: int
    reason: str
    attempts: int
    run_id: str
    at: str


def utc_now() -> str:
    """The present, UTC, ISO 8601 with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def shard_name(shard: int) -> str:
    """How a shard is written in file names: 42 -> "00042"."""
    return f"{shard:05d}"


# ---------------------------------------------------------------------------- identity of a run


def create_run(
    run_uri: str,
    job: Job,
    manifest_info: "ManifestInfo",
    hashes: Mapping[str, str],
    code_version: str,
    declared: Declared,
) -> RunHandle:
    """Write run.json, or recognise the run that is already there and go on with it, from the places
    that are given now.

    Args:
        hashes: sha256 of all weights by name (`Station.hashes`).
        declared: kept for readers, not hashed: job and weights decide it.

    Raises:
        LedgerError: the directory holds another run; the message lists every difference.
    """
    uri = join(run_uri, "run.json")
    found = read_run(run_uri) if exists(uri) else None
    version = VERSION if found is None else found.get("version", 1)
    identity = make_identity(job, manifest_info, hashes, version)
    run_id = identity_digest(identity)
    handle = RunHandle(uri=run_uri, run_id=run_id, code_version=code_version)
    record: dict[str, Any] = {
        "run_id": run_id,
        "declared": asdict(declared),
        "num_shards": manifest_info.num_shards,
        "num_samples": manifest_info.num_samples,
        "num_bytes": manifest_info.num_bytes,
        "code_version": code_version,
        "created_at": utc_now(),
    }
    if found is not None:
        if found["run_id"] != run_id:
            raise LedgerError(_refusal(run_uri, found, identity))
        if found["code_version"] != code_version:
            logger.warning(
                "%s was started by code version %s, goes on with %s: rows may differ by rounding",
                run_uri,
                found["code_version"],
                code_version,
            )
        if all(found[key] == value for key, value in identity.items()):
            return handle
        record = found  # something has moved
    text = json.dumps({**record, **identity}, indent=1, sort_keys=True)
    write_bytes(uri, text.encode() + b"\n")
    return handle


def open_run(run_uri: str) -> RunHandle:
    """The handle of an existing run.

    Raises:
        LedgerError: there is no run at this place.
    """
    record = read_run(run_uri)
    return RunHandle(uri=run_uri, run_id=record["run_id"], code_version=record["code_version"])


def read_run(run_uri: str) -> dict[str, Any]:
    """The content of run.json: run_id, config, manifest, weights, declared, num_shards,
    num_samples, num_bytes, code_version, created_at.

    Raises:
        LedgerError: there is no run at this place, or its run.json is damaged.
    """
    uri = join(run_uri, "run.json")
    keys = ("run_id", "config", "manifest", "weights", "num_shards", "code_version")
    advice = "restore it from a copy, or start again in another output folder"
    try:
        record = _read_record(uri, keys, advice)
    except LedgerError as error:
        if not isinstance(error.__cause__, FileNotFoundError | NotADirectoryError):
            raise
        raise LedgerError(
            f"{run_uri}: no run here (run.json is missing); give the folder that "
            "`refinery invert IN OUT` wrote as OUT"
        ) from error
    record.setdefault("declared", None)
    return record


def read_declared(run_uri: str) -> Declared:
    """What the run's kind of work has declared.

    Raises:
        LedgerError: there is no run at this place, or its run.json is damaged.
    """
    return declared_by(read_run(run_uri))


def declared_by(record: Mapping[str, Any]) -> Declared:
    """The same of a run.json that was read."""
    found: dict[str, Any] | None = record["declared"]
    if found is None:
        return _declared_before(record["config"])
    listed = {name: tuple(value) for name, value in found.items() if isinstance(value, list)}
    return Declared(**{**found, **listed})


def _declared_before(config: Mapping[str, Any]) -> Declared:
    """Runs of version 0.1 did not say it, and were of two kinds."""
    pictures = tuple(config["output"]["pictures"])
    if config.get("kind") != "edit":
        return Declared(
            kind="invert",
            stages=("read", "decode", "invert", "score", "write"),
            stores_doors=True,
            method="+".join(method["name"] for method in config["methods"]),
            metrics=(),
            pictures=pictures,
        )
    variants = tuple(variant["name"] for variant in config["variants"])
    return Declared(
        kind="edit",
        stages=("read", "edit", "score", "write"),
        stores_doors=False,
        method=config["method"],
        metrics=(),
        pictures=(*pictures, *variants),
        variants=variants,
    )


def _refusal(run_uri: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    old, new = (_flat(contents(record)) for record in (found, wanted))
    missing = "(not set)"
    lines = [
        f"  {key}: {old.get(key, missing)} in the run, {new.get(key, missing)} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, missing) != new.get(key, missing)
    ]
    if any(line.startswith("  manifest:") for line in lines):
        lines.append("  (manifest: the input files, their contents or the shard size changed)")
    return (
        f"{run_uri} holds run {found['run_id']}, which was made with other settings:\n"
        + "\n".join(lines)
        + "\nResults of two settings are never mixed: choose another output folder, restore these "
        "settings to go on with the run, or delete the folder to start anew"
    )


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested values as {"config.methods.0.name": '"e4e"'}."""
    items: Iterator[tuple[Any, Any]] | None = None
    if isinstance(value, dict) and value:
        items = iter(value.items())
    elif isinstance(value, list) and value:
        items = iter(enumerate(value))
    if items is None:
        return {prefix: json.dumps(value)}
    flat: dict[str, str] = {}
    for key, child in items:
        flat |= _flat(child, f"{prefix}.{key}" if prefix else str(key))
    return flat


# ---------------------------------------------------------------------------- commits


def write_marker(run_uri: str, marker: Marker) -> None:
    """Commit: from here on readers see the parts that the marker names."""
    uri = join(run_uri, "commits", f"{shard_name(marker.shard)}.json")
    write_bytes(uri, marker.to_json())


def read_marker(run_uri: str, shard: int) -> Marker | None:
    """The commit of one shard, or None."""
    uri = join(run_uri, "commits", f"{shard_name(shard)}.json")
    return Marker.from_json(read_bytes(uri, LedgerError), uri) if exists(uri) else None


def committed(run_uri: str) -> set[int]:
    """Ids of the shards that have a marker: one listing call, nothing is opened."""
    return _shards_in(join(run_uri, "commits"))


def read_markers(run_uri: str) -> dict[int, Marker]:
    """All markers by shard, in order of shards. About 1 KB a shard: a run of a million samples
    has a thousand.

    Raises:
        LedgerError: a marker is damaged.
    """
    folder = join(run_uri, "commits")

    def read(shard: int) -> Marker:
        uri = join(folder, f"{shard_name(shard)}.json")
        return Marker.from_json(read_bytes(uri, LedgerError), uri)

    shards = sorted(committed(run_uri))
    with ThreadPoolExecutor(_READERS) as pool:
        return dict(zip(shards, pool.map(read, shards), strict=True))


def pending(run_uri: str) -> list[int]:
    """Shards of the manifest without a marker, in order; those given up before are among them,
    so that running again retries them."""
    done = committed(run_uri)
    return [shard for shard in range(read_run(run_uri)["num_shards"]) if shard not in done]


# ---------------------------------------------------------------------------- giving up


def quarantine(run_uri: str, shard_id: int, reason: str, *, attempts: int = 1) -> None:
    """Record that a shard was given up; the run goes on without it."""
    record = Quarantined(
        shard=shard_id,
        reason=reason,
        attempts=attempts,
        run_id=read_run(run_uri)["run_id"],
        at=utc_now(),
    )
    uri = join(run_uri, "failed", f"{shard_name(shard_id)}.json")
    write_bytes(uri, json.dumps(asdict(record), indent=1, sort_keys=True).encode() + b"\n")


def read_quarantine(run_uri: str) -> dict[int, Quarantined]:
    """Shards that were given up and not committed since, in order.

    Raises:
        LedgerError: a file in failed/ is damaged.
    """
    found: dict[int, Quarantined] = {}
    given_up = _shards_in(join(run_uri, "failed"))
    for shard in sorted(given_up - committed(run_uri)) if given_up else ():
        uri = join(run_uri, "failed", f"{shard_name(shard)}.json")
        try:
            found[shard] = Quarantined(**json.loads(read_bytes(uri, LedgerError)))
        except (ValueError, TypeError) as error:
            raise LedgerError(
                f"{uri}: damaged ({error}); delete this file and run again, which retries its shard"
            ) from error
    return found


# ---------------------------------------------------------------------------- the end of a run


def seal(run_uri: str) -> str:
    """Write _SEALED.json: the run is over, these are all its parts. Sealing again replaces it.

    Returns:
        The URI of _SEALED.json.

    Raises:
        LedgerError: a shard is neither committed nor given up.
    """
    record = read_run(run_uri)
    markers, given_up = read_markers(run_uri), read_quarantine(run_uri)
    waiting = [i for i in range(record["num_shards"]) if i not in markers and i not in given_up]
    if waiting:
        raise LedgerError(
            f"{run_uri}: cannot seal, {len(waiting)} of {record['num_shards']} shards are neither "
            f"committed nor given up (first: {shard_name(waiting[0])}); run its command again"
        )
    sealed = {
        "run_id": record["run_id"],
        "num_shards": record["num_shards"],
        "rows": sum(marker.rows for marker in markers.values()),
        "failed": sum(marker.failed for marker in markers.values()),
        "quarantined": sorted(given_up),
        "parts": [
            {"shard": shard, "kind": kind, **asdict(part)}
            for shard, marker in markers.items()
            for kind, part in sorted(marker.parts.items())
        ],
        "sealed_at": utc_now(),
    }
    uri = join(run_uri, "_SEALED.json")
    write_bytes(uri, json.dumps(sealed, indent=1, sort_keys=True).encode() + b"\n")
    return uri


def read_seal(run_uri: str) -> dict[str, Any] | None:
    """_SEALED.json, or None while the run is open.

    Raises:
        LedgerError: it is damaged.
    """
    uri = join(run_uri, "_SEALED.json")
    if not exists(uri):
        return None
    advice = "delete it and run the run's command again, which seals it anew"
    return _read_record(uri, ("run_id", "parts", "quarantined"), advice)


def remove_orphans(run_uri: str) -> list[str]:
    """Delete files in the part folders that no marker names: what killed attempts left behind.

    Only after sealing: until then a file without a marker may belong to an attempt at work.

    Returns:
        The removed paths, relative to the run.

    Raises:
        LedgerError: the run is not sealed.
    """
    if read_seal(run_uri) is None:
        raise LedgerError(
            f"{run_uri}: not sealed, so an unnamed file may belong to a worker that is still "
            "writing; finish the run first"
        )
    named = {
        part.path for marker in read_markers(run_uri).values() for part in marker.parts.values()
    }
    removed = [
        f"{kind}/{name}"
        for kind in PART_KINDS
        for name, _, _ in list_files(join(run_uri, kind), LedgerError, include_partial=True)
        if f"{kind}/{name}" not in named
    ]
    remove([join(run_uri, path) for path in removed])
    if removed:
        logger.info("removed %d files of unfinished attempts from %s", len(removed), run_uri)
    return removed


def _shards_in(folder_uri: str) -> set[int]:
    """The shard ids among the files of commits/ or failed/; other names are skipped."""
    names = [name for name, _, _ in list_files(folder_uri, LedgerError)]
    stems = (name.removesuffix(".json") for name in names if name.endswith(".json"))
    return {int(stem) for stem in stems if stem.isdigit()}


def _read_record(uri: str, keys: Sequence[str], advice: str) -> dict[str, Any]:
    """A JSON object that has the keys."""
    try:
        record = json.loads(read_bytes(uri, LedgerError))
        for key in keys:
            record[key]
    except (ValueError, KeyError, TypeError) as error:
        raise LedgerError(f"{uri}: damaged ({type(error).__name__}: {error}); {advice}") from error
    return record
