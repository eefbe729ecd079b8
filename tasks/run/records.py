"""The small JSON files of a run: written one way, and read with types: what is damaged, edited or
newer is named."""

import json
from dataclasses import asdict
from datetime import datetime
from typing import Annotated, Any, NotRequired, TypeVar

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError
from pydantic_core import from_json
from typing_extensions import TypedDict

from models.errors import LedgerError

T = TypeVar("T")


class DamagedError(LedgerError):
    """A file of the run is not what it should be; storage itself has answered."""


class NewerError(DamagedError):
    """Written by a later version of this program, and not ours to do again."""


MAX_SHARDS = 10**7
Count = Annotated[int, Field(ge=0, le=2**53)]
ShardId = Annotated[int, Field(ge=0, lt=MAX_SHARDS)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
PartPath = Annotated[str, Field(pattern=r"^[a-z][a-z_]*/[A-Za-z0-9][A-Za-z0-9._-]*$")]
"""A name in a folder of the run: nothing outside can be meant."""


def _check_moment(text: str) -> str:
    if text and datetime.fromisoformat(text).tzinfo is None:
        raise ValueError("a time without a time zone")
    return text


Moment = Annotated[str, AfterValidator(_check_moment)]
"""UTC, ISO 8601, or empty."""


class RunRecord(TypedDict):
    """run.json."""

    version: NotRequired[Annotated[int, Field(ge=1, le=3)]]
    run_id: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    config: dict[str, Any]
    manifest: str
    weights: dict[str, str]
    places: NotRequired[list[str]]
    rounding: NotRequired[list[str]]
    declared: NotRequired[dict[str, Any] | None]
    num_shards: Annotated[int, Field(ge=0, le=MAX_SHARDS)]
    num_samples: NotRequired[Count | None]
    num_bytes: NotRequired[Count]
    code_version: str
    created_at: NotRequired[Moment]


class SealedPart(TypedDict):
    """A file that counts, listed once."""

    shard: ShardId
    kind: str
    path: PartPath
    rows: Count
    bytes: Count
    sha256: Sha256


class Seal(TypedDict):
    """_SEALED.json."""

    version: NotRequired[Annotated[int, Field(ge=1, le=1)]]
    run_id: str
    num_shards: NotRequired[Count]
    rows: NotRequired[Count]
    failed: NotRequired[Count]
    quarantined: list[ShardId]
    parts: list[SealedPart]
    sealed_at: NotRequired[Moment]
    forecast: NotRequired[dict[str, dict[str, float]]]


RUN_RECORD, SEAL = TypeAdapter(RunRecord), TypeAdapter(Seal)


def to_json(record: Any) -> bytes:
    """The text of a record, dataclasses as dicts."""
    return json.dumps(record, indent=1, sort_keys=True, default=asdict).encode() + b"\n"


def parse(kind: TypeAdapter[T], data: bytes, uri: str, *, newest: int, advice: str) -> T:
    """A typed value from its JSON text; unknown keys are left out.

    Args:
        newest: the last version of this kind of file that this code knows.
        advice: what to do about a damaged one.

    Raises:
        DamagedError: it is something else; the message names the first wrong value.
        NewerError: a later version wrote it.
    """
    try:
        return kind.validate_json(data, strict=True)
    except ValidationError as error:
        version = _version(data)
        if version > newest:
            raise NewerError(
                f"{uri}: of format {version}, which is newer than this program, that knows formats "
                f"up to {newest}; use the version of style-refinery that wrote it, or a later one"
            ) from error
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"]))
        what = f"{place}: {first['msg']}" if place else first["msg"]
        raise DamagedError(f"{uri}: damaged ({what}); {advice}") from error


def _version(data: bytes) -> int:
    try:
        version = from_json(data)["version"]
    except (ValueError, KeyError, TypeError, IndexError):
        return 0
    return version if isinstance(version, int) else 0
