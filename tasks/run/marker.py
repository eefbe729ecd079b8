"""The commit marker: one small JSON object that makes one attempt at a shard visible.

`commits/00042.json` names the parts of one complete attempt, their sha256, row counts, failures and
timings. Nothing else in a run directory says that a shard is done. Or it says that the place is
closed: then no attempt that wanted it can be committed any more (`tasks.run.ledger`).
"""

from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import AfterValidator, Field, TypeAdapter

from tasks.run.records import Count, DamagedError, Moment, PartPath, Sha256, ShardId, parse, to_json

VERSION = 1
_Version = Annotated[int, Field(ge=1, le=VERSION)]
_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One file of a shard.

    Attributes:
        path: relative to the run directory, e.g. "latents/00042-9f3c21d0aa57.parquet".
        rows: rows in the file.
        bytes: size of the file.
        sha256: of the whole file, hexadecimal.
    """

    path: PartPath
    rows: Count
    bytes: Count
    sha256: Sha256


@dataclass(frozen=True, kw_only=True)
class Covered:
    """A commit whose rows stand in the parts of another (`tasks.run.compact`).

    Attributes:
        generation, attempt: which commit of the shard.
        first_row: of the covering latents part; from here on are the shard's rows, in their order.
        rows: of the shard.
    """

    shard: ShardId
    generation: Count
    attempt: str
    first_row: Count
    rows: Count


def _check_kinds(parts: dict[str, Part]) -> dict[str, Part]:
    for kind, part in parts.items():
        if part.path.partition("/")[0] != kind:
            raise ValueError(f"{part.path} is not in {kind}/")
    return parts


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
        memory_bytes: the worker's peak until then, of all its shards: on a GPU its device's, else
            its process's; 0 where nobody looked.
        code_version: of this project.
        notes: what an operator should know, e.g. that a batch was halved for memory.
        started_at, finished_at: UTC, ISO 8601.
        covers: the commits that these parts stand for, this shard's earlier one among them; empty
            for the work of one shard.
        version: of this format.
    """

    shard: ShardId
    attempt: str
    run_id: str
    rows: Count
    failed: Count
    parts: Annotated[dict[str, Part], AfterValidator(_check_kinds)]
    seconds: dict[str, _Seconds]
    wall_s: _Seconds
    failures: dict[str, Count] = field(default_factory=dict)
    device: str = ""
    memory_bytes: Count = 0
    code_version: str = ""
    notes: tuple[str, ...] = ()
    started_at: Moment = ""
    finished_at: Moment = ""
    covers: tuple[Covered, ...] = ()
    version: _Version = VERSION

    def to_json(self) -> bytes:
        return to_json(self)

    @staticmethod
    def from_json(data: bytes, where: str) -> "Marker | Closed":
        """Read what stands in commits/.

        Args:
            where: its URI, for messages.

        Raises:
            LedgerError: it is neither a marker nor a closing, or newer than this code.
        """
        kind: TypeAdapter[Marker | Closed] = _CLOSED if b'"closed"' in data else _MARKER
        advice = "run the run's command again, which redoes its shard"
        found = parse(kind, data, where, newest=VERSION, advice=advice)
        if isinstance(found, Marker) and found.rows and "latents" not in found.parts:
            raise DamagedError(f"{where}: damaged, {found.rows} rows and no part of them; {advice}")
        return found


@dataclass(frozen=True, kw_only=True)
class Closed:
    """Stands where a marker could have come: whoever wanted to commit here comes too late.

    Attributes:
        closed: why.
        at: UTC, ISO 8601.
    """

    shard: ShardId
    run_id: str
    closed: str
    at: Moment
    version: _Version = VERSION

    def to_json(self) -> bytes:
        return to_json(self)


_MARKER: TypeAdapter[Any] = TypeAdapter(Marker)
_CLOSED: TypeAdapter[Any] = TypeAdapter(Closed)
