"""Where a row comes from, and the proof: its batch is worked on again and compared byte by byte."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from models.errors import AssetError, ConfigError
from tasks.run.manifest import read_shard_spec
from tasks.run.metadata import Snapshot, read_snapshot
from tasks.run.query import ask, unknown_key
from tasks.run.rows import Row
from tasks.run.run_json import run_handle
from tasks.run.views import Session, open_session
from tasks.work.attempt import Attempt
from tasks.work.kinds import load_job, load_station
from tasks.work.shard import POOL_THREADS
from tasks.work.station import Station, fill_row

SAME = "same bytes"


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """A row that was made again.

    Attributes:
        provenance: what the row was made from, and by what.
        found: by value ("w_plus", a metric, a picture, a door): `SAME`, or how it differs.
    """

    provenance: dict[str, str]
    found: dict[str, str]

    @property
    def is_same(self) -> bool:
        return all(verdict == SAME for verdict in self.found.values())


def reproduce(run_uri: str, key: str, device: str = "cpu") -> Reproduction:
    """Make a row again from its input object, in the batch that it was made in.

    Bytes are equal on one kind of processor and by one version of the code.

    Raises:
        ConfigError: the run has no such row.
        AssetError: a weight file is another one than the run was made with.
        ShardError: the input cannot be read.
        LedgerError: there is no run, or it is damaged.
    """
    snapshot = read_snapshot(run_uri)
    with open_session({"run": snapshot}) as session:
        stored = _stored(session, snapshot, key)
    station = load_station(load_job(run_uri), device)
    _check_weights(snapshot, station)
    marker = snapshot.markers[int(stored["shard"])]
    again = _again(run_uri, station, (marker.shard, *(c.shard for c in marker.covers)), key)
    return Reproduction(
        provenance=_provenance(run_uri, snapshot, stored),
        found=_compared(stored, again, snapshot.codes.dtype if snapshot.codes else "float32"),
    )


def _stored(session: Session, snapshot: Snapshot, key: str) -> dict[str, Any]:
    """All that is stored of a row."""
    found: dict[str, Any] = {}
    for view in ("latents", "images", "residuals"):
        if view in session.names:
            sql = f"SELECT * FROM {view} WHERE sample_key = $key"
            rows = ask(session, sql, {"key": key}).to_pylist()
            found |= rows[0] if rows else {}
    if not found:
        raise unknown_key(session, snapshot.uri, key)
    return found


def _check_weights(snapshot: Snapshot, station: Station) -> None:
    for name, made_with in snapshot.record["weights"].items():
        if station.hashes.get(name) != made_with:
            raise AssetError(
                f"{snapshot.uri}: {name} was {made_with} when the run was made, is "
                f"{station.hashes.get(name, 'not there')} now; put back the file of run.json"
            )


def _again(run_uri: str, station: Station, shards: Iterable[int], key: str) -> Row:
    """The row anew, out of one of the shards whose rows lie together."""
    for shard in dict.fromkeys(shards):
        attempt = Attempt(read_shard_spec(run_uri, shard), run_handle(run_uri), station.stages)
        with ThreadPoolExecutor(POOL_THREADS) as pool:
            for batch in station.read(attempt, pool):
                if key in batch.keys:
                    at = list(batch.keys).index(key)
                    fill_row(batch, station.work(batch), station, at)
                    return batch.rows[at]
        for row in attempt.rows:  # it failed before any work
            if row.sample_key == key:
                return row
    raise ConfigError(f"the input of {run_uri} holds no sample {key!r} any more; it has changed")


def _compared(stored: dict[str, Any], row: Row, dtype: str) -> dict[str, str]:
    found = {
        "status": _verdict(stored["status"], "ok" if row.error_kind is None else "failed"),
        "image_sha256": _verdict(stored["image_sha256"], row.image_sha256),
    }
    if stored["status"] != "ok" or row.error_kind is not None:
        found["error"] = _verdict(stored["error"], row.error)
        return found
    assert row.w_plus is not None
    found["w_plus"] = _distance(stored["w_plus"], row.w_plus.astype(dtype))
    for name, value in row.metrics.items():
        found[name] = _distance([stored[name]], np.array([value], np.float32))
    for name, data in row.pictures.items():
        is_same = stored[name]["bytes"] == data
        found[name] = SAME if is_same else "other bytes"
    for name, value in row.doors.items():
        found[name] = _distance(stored[name], value)
    return found


def _verdict(before: Any, after: Any) -> str:
    return SAME if before == after else f"was {before}, is {after}"


def _distance(before: Any, after: np.ndarray) -> str:
    was = np.array(before, np.float32)
    now = after.reshape(-1).astype(np.float32)
    if was.tobytes() == now.tobytes():
        return SAME
    return f"differs by up to {np.abs(was - now).max():.3g}"


def _provenance(run_uri: str, snapshot: Snapshot, stored: dict[str, Any]) -> dict[str, str]:
    shard = int(stored["shard"])
    marker, record = snapshot.markers[shard], snapshot.record
    spec = read_shard_spec(run_uri, shard)
    weights = (f"{name} {digest[:16]}" for name, digest in record["weights"].items())
    return {
        "row": f"{stored['sample_key']} ({stored['status']})",
        "input": f"{stored['image_uri']}, sha256 {stored['image_sha256']}",
        "of": f"{spec.kind} {spec.uri}, etag {spec.etag}",
        "run": f"{record['run_id']} ({snapshot.declared.kind}, {snapshot.declared.method})",
        "generator": str(record["config"].get("generator")),
        "weights": ", ".join(weights),
        "seed": str(stored["seed"]),
        "shard": f"{shard}, attempt {marker.attempt}",
        "made": f"{marker.finished_at} on {marker.device} by code version {marker.code_version}",
    }
