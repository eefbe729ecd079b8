"""The small tables about runs: one row for each run, one for each shard."""

import io
import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from pyarrow.json import ParseOptions, read_json

from tasks.run.metadata import Snapshot

_TEXT, _COUNT, _SECONDS = pa.string(), pa.int64(), pa.float64()
_RUNS = pa.schema(
    {
        **dict.fromkeys(("run", "kind", "method", "generator", "state"), _TEXT),
        **dict.fromkeys(("rows", "failed", "shards", "committed", "quarantined", "bytes"), _COUNT),
        "worker_s": _SECONDS,
        **dict.fromkeys(("created_at", "started_at", "finished_at", "devices"), _TEXT),
        **dict.fromkeys(("code_version", "source", "run_id", "uri"), _TEXT),
    }
)
_SHARD = {
    "shard": pa.int32(),
    **dict.fromkeys(("state", "attempt"), _TEXT),
    **dict.fromkeys(("rows", "failed", "bytes"), _COUNT),
}
_SHARD_ENDS = {
    "wall_s": _SECONDS,
    **dict.fromkeys(("device", "code_version", "notes", "reason"), _TEXT),
    **dict.fromkeys(("started_at", "finished_at", "run_id", "run"), _TEXT),
}
"""Columns of a shard after those of its stages."""


def runs_table(names: Sequence[str], snapshots: Sequence[Snapshot]) -> pa.Table:
    """A row for each run: what it is, how far it is, what it cost (seconds of all its workers)."""
    rows = [_run(name, snapshot) for name, snapshot in zip(names, snapshots, strict=True)]
    return _table(rows, _RUNS)


def _run(name: str, snapshot: Snapshot) -> dict[str, Any]:
    record, markers = snapshot.record, snapshot.markers.values()
    return {
        "run": name,
        "kind": snapshot.declared.kind,
        "method": snapshot.declared.method,
        "generator": record["config"].get("generator"),
        "state": _state(snapshot),
        "rows": snapshot.num_rows,
        "failed": sum(marker.failed for marker in markers),
        "shards": record["num_shards"],
        "committed": len(snapshot.markers),
        "quarantined": len(snapshot.quarantined),
        "bytes": sum(part.bytes for marker in markers for part in marker.parts.values()),
        "worker_s": sum(marker.wall_s for marker in markers),
        "created_at": record.get("created_at"),
        "started_at": min((m.started_at for m in markers), default=None),
        "finished_at": max((m.finished_at for m in markers), default=None),
        "devices": ", ".join(sorted({m.device for m in markers if m.device})),
        "code_version": record["code_version"],
        "source": record["config"].get("source"),
        "run_id": record["run_id"],
        "uri": snapshot.uri,
    }


def _state(snapshot: Snapshot) -> str:
    """ "sealed"; "incomplete" where it is and shards were given up; else "open"."""
    if not snapshot.is_sealed:
        return "open"
    return "incomplete" if snapshot.quarantined else "sealed"


def shards_table(names: Sequence[str], snapshots: Sequence[Snapshot]) -> pa.Table:
    """A row for each shard that is committed or given up: its marker's fields, its seconds by
    stage, the bytes of its parts."""
    stages = list(dict.fromkeys(stage for s in snapshots for stage in s.declared.stages))
    fields = _SHARD | {f"{stage}_s": _SECONDS for stage in stages} | _SHARD_ENDS
    rows = [
        {**row, "run": name}
        for name, snapshot in zip(names, snapshots, strict=True)
        for row in _shards(snapshot, stages)
    ]
    return _table(rows, pa.schema(fields))


def _table(rows: Sequence[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    # Of a list pyarrow asks whether it is pandas', and loads pandas to know: 0.3 s of a command.
    if not rows:
        return schema.empty_table()
    lines = "\n".join(map(json.dumps, rows)).encode()
    options = ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    return read_json(io.BytesIO(lines), parse_options=options).select(schema.names)


def _shards(snapshot: Snapshot, stages: Sequence[str]) -> list[dict[str, Any]]:
    committed = [
        {
            **{name: getattr(marker, name, None) for name in (*_SHARD, *_SHARD_ENDS)},
            **{f"{stage}_s": float(marker.seconds.get(stage, 0.0)) for stage in stages},
            "state": "committed",
            "bytes": sum(part.bytes for part in marker.parts.values()),
            "notes": "; ".join(marker.notes),
        }
        for marker in snapshot.markers.values()
    ]
    given_up = [
        {
            "shard": shard,
            "state": "quarantined",
            "reason": lost.reason,
            "finished_at": lost.at,
            "run_id": lost.run_id,
        }
        for shard, lost in snapshot.quarantined.items()
    ]
    return [*committed, *given_up]
