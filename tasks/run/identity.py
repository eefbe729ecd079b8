"""What a run is: its settings, its input and its weights, wherever they lie.

The run id is a hash of contents. Places (paths, URLs, names of files) stand in run.json beside it:
what lies at them is hashed instead. So a run goes on after its input, its weights or its source
have moved. Settings that move results by rounding only (`batch`) are not hashed either, so a run
goes on in smaller batches. Runs of earlier versions keep their ids: version 1 hashed the places
too, versions 1 and 2 the batch.
"""

import copy
import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from tasks.job import FILE, PLACE, ROUNDING, Job
from tasks.run.records import DamagedError

if TYPE_CHECKING:
    from tasks.run.manifest import ManifestInfo

VERSION = 3
SUFFIXES = (".safetensors", ".pt", ".pth", ".pkl", ".json", ".npy", ".csv", ".parquet")


def make_identity(
    job: Job, manifest: "ManifestInfo", hashes: Mapping[str, str], version: int = VERSION
) -> dict[str, Any]:
    """The part of run.json that says which run it is: config, manifest, weights, from version 2 on
    the version and the keys of the config that are places, from 3 on those that only round."""
    identity: dict[str, Any] = {
        "config": _known_to(version, job, job.to_dict()),
        "manifest": manifest.digest(version),
        "weights": dict(sorted(hashes.items())),
    }
    if version > 1:
        identity |= {"version": version, "places": sorted(places(job))}
    if version > 2:
        fields = dataclasses.fields(job)
        rounding = ROUNDING.items()
        identity["rounding"] = [each.name for each in fields if each.metadata.items() >= rounding]
    return json.loads(json.dumps(identity))  # tuples become lists, as they will be read back


def identity_digest(record: Mapping[str, Any]) -> str:
    """The run id that a record (run.json) hashes to."""
    canonical = json.dumps(contents(record), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _known_to(version: int, job: Any, table: dict[str, Any]) -> dict[str, Any]:
    """The table of a job without defaults of settings that came after a version."""
    for each in dataclasses.fields(job):
        value = getattr(job, each.name)
        if each.metadata.get("since", 0) > version and value == each.default:
            if "before" in each.metadata:
                table[each.name] = each.metadata["before"]
            else:
                del table[each.name]
        elif dataclasses.is_dataclass(value):
            _known_to(version, value, table[each.name])
    return table


def contents(record: Mapping[str, Any]) -> dict[str, Any]:
    """What is hashed: config, manifest and weights, without places and what only rounds; in a
    weight's name the keys of the config that hold its place stand for it.

    Raises:
        DamagedError: a place is not in the config.
    """
    found = {key: copy.deepcopy(record[key]) for key in ("config", "manifest", "weights")}
    values = {}
    for place in record.get("places", ()):
        try:
            values[place] = _taken(found["config"], place.split("."))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise DamagedError(
                f"run.json was changed after the run began: it says that {place!r} is a place, and "
                "its config has no such key; restore it"
            ) from error
    for name in record.get("rounding", ()):
        found["config"].pop(name, None)
    weights: dict[str, str] = {}
    for name, digest in found["weights"].items():
        kind, _, where = name.partition(".")
        owners = [place for place, value in values.items() if value == where]
        weights |= {f"{kind}@{place}": digest for place in owners} or {name: digest}
    return {**found, "weights": weights}


def places(value: Any, at: str = "", may_be: bool = False) -> Iterator[str]:
    """Keys of a job that hold places, nested ones dotted: "variants.0.edits.1.name"."""
    if dataclasses.is_dataclass(value):
        for each in dataclasses.fields(value):
            where = f"{at}.{each.name}" if at else each.name
            if dict(each.metadata) == PLACE:
                yield where
            else:
                yield from places(
                    getattr(value, each.name), where, FILE.items() <= each.metadata.items()
                )
    elif isinstance(value, tuple | list | dict):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, child in items:
            yield from places(child, f"{at}.{key}", may_be)
    elif may_be and isinstance(value, str) and _names_a_file(value):
        yield at


def _names_a_file(value: str) -> bool:
    return "/" in value or PurePosixPath(value).suffix in SUFFIXES


def _taken(config: Any, path: Sequence[str]) -> Any:
    """Take a value out of nested tables and lists."""
    *parents, last = path
    for name in parents:
        config = config[int(name)] if isinstance(config, list) else config[name]
    if isinstance(config, list):
        value, config[int(last)] = config[int(last)], None
        return value
    return config.pop(last)
