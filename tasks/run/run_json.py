"""run.json: which work a run is.

It has the resolved config, the manifest's hash, the weights' hashes and the run's id
(`tasks.run.identity`), and what the kind of work declares for those who read the run.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from models.errors import LedgerError
from tasks.job import Job
from tasks.run.find import meant
from tasks.run.identity import VERSION, contents, identity_digest, make_identity
from tasks.run.records import RUN_RECORD, Count, parse, to_json
from tasks.storage.files import find_bytes, join, write_bytes
from tasks.storage.once import create_bytes

if TYPE_CHECKING:
    from tasks.run.manifest import ManifestInfo

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RunHandle:
    """All that a worker needs to know of a run; small enough to travel with every call.

    Attributes:
        redo: generations in which shards are to be done again although they are committed.
    """

    uri: str
    run_id: str
    code_version: str = ""
    redo: Mapping[int, int] = field(default_factory=dict)


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
        shape: (L, D) of the codes; None in runs of before it was said.
        worker_bytes: memory of a worker on a CPU, estimated; 0 in runs of before it was said.
    """

    kind: str
    stages: tuple[str, ...]
    stores_doors: bool
    method: str
    metrics: tuple[str, ...]
    pictures: tuple[str, ...]
    variants: tuple[str, ...] = ()
    faces: bool = False
    shape: tuple[int, int] | None = None
    worker_bytes: Count = 0


_DECLARED = TypeAdapter(Declared)


def utc_now() -> str:
    """The present, UTC, ISO 8601 with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


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
    found = find_run(run_uri)
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
        if all(found.get(key) == value for key, value in identity.items()):
            return handle
        record = found  # something has moved
    text = to_json({**record, **identity})
    if found is not None:
        write_bytes(uri, text)
    elif not create_bytes(uri, text):  # another driver was faster: is it the same run?
        return create_run(run_uri, job, manifest_info, hashes, code_version, declared)
    return handle


def run_handle(run_uri: str) -> RunHandle:
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
    found = find_run(run_uri)
    if found is None:
        raise LedgerError(
            f"{run_uri}: no run here (run.json is missing){meant(run_uri)}; give the folder that "
            "`refinery invert IN OUT` wrote as OUT"
        )
    return found


def find_run(run_uri: str) -> dict[str, Any] | None:
    """The same, or None where there is no run.

    Raises:
        LedgerError: its run.json is damaged.
    """
    uri = join(run_uri, "run.json")
    data = find_bytes(uri)
    if data is None:
        return None
    advice = "restore it from a copy, or start again in another output folder"
    record = parse(RUN_RECORD, data, uri, newest=VERSION, advice=advice)
    return {"declared": None, "num_samples": None, **record}


def read_declared(run_uri: str) -> Declared:
    """What the run's kind of work has declared.

    Raises:
        LedgerError: there is no run at this place, or its run.json is damaged.
    """
    return declared_by(read_run(run_uri), run_uri)


def declared_by(record: Mapping[str, Any], run_uri: str) -> Declared:
    """The same of a run.json that was read."""
    found: dict[str, Any] | None = record["declared"]
    try:
        if found is None:
            return _declared_before(record["config"])
        return _DECLARED.validate_python(found)
    except (ValidationError, KeyError, TypeError) as error:
        raise LedgerError(
            f"{join(run_uri, 'run.json')}: damaged, it does not say what the run stores ({error}); "
            "restore it from a copy, or start again in another output folder"
        ) from error


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


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What decides a run and is not the same in two records, a line for each key."""
    old, new = (_flat(contents(record)) for record in (found, wanted))
    missing = "(not set)"
    return [
        f"  {key}: {old.get(key, missing)} in the run, {new.get(key, missing)} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, missing) != new.get(key, missing)
    ]


def _refusal(run_uri: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    lines = differences(found, wanted)
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
