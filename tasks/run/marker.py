"""The commit marker: one small JSON object that makes one attempt at a shard visible.

`commits/00042.json` names the parts of one complete attempt, their sha256, row counts, failures and
timings. Nothing else in a run directory says that a shard is done.
"""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from models.errors import LedgerError


@dataclass(frozen=True, kw_only=True)
class Part:
    """One file of a shard.

    Attributes:
        path: relative to the run directory, e.g. "latents/00042-9f3c21d0aa57.parquet".
        rows: rows in the file.
        bytes: size of the file.
        sha256: of the whole file, hexadecimal.
    """

    path: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Marker:
    """What one committed attempt at one shard produced.

    Attributes:
        shard: id of the shard in the manifest.
        attempt: random name of the attempt, part of every file name it wrote.
        run_id: hash of config, manifest and weights (`tasks.run.ledger`).
        rows: samples in the shard, failed ones included.
        failed: samples with `status = "failed"`.
        parts: by kind (`tasks.run.ledger.PART_KINDS`); a kind without rows has no part.
        seconds: busy time by stage (`Declared.stages`); waiting for the accelerator is in
            none of them.
        wall_s: from the start of the attempt to its commit.
        failures: number of failed samples by `error_kind`.
        device: what computed it, e.g. "cpu" or "cuda NVIDIA H200".
        code_version: of this project.
        notes: what an operator should know, e.g. that a batch was halved for memory.
        started_at, finished_at: UTC, ISO 8601.
    """

    shard: int
    attempt: str
    run_id: str
    rows: int
    failed: int
    parts: dict[str, Part]
    seconds: dict[str, float]
    wall_s: float
    failures: dict[str, int] = field(default_factory=dict)
    device: str = ""
    code_version: str = ""
    notes: tuple[str, ...] = ()
    started_at: str = ""
    finished_at: str = ""

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1, sort_keys=True).encode() + b"\n"

    @staticmethod
    def from_json(data: bytes, where: str) -> "Marker":
        """Read a marker back.

        Args:
            where: its URI, for messages.

        Raises:
            LedgerError: it is not a marker.
        """
        try:
            values: dict[str, Any] = json.loads(data)
            values["parts"] = {kind: Part(**part) for kind, part in values["parts"].items()}
            values["notes"] = tuple(values["notes"])
            return Marker(**values)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise LedgerError(
                f"{where}: not a commit marker ({type(error).__name__}: {error}); expected the "
                "JSON object of a worker. Delete this file and run again, which redoes its shard"
            ) from error
