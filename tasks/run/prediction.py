"""What a run will take, as it was said before it was over: prediction.json in its folder.

`refinery plan IN OUT` measures and writes it; where it did not, the driver does after the first
shards. Summary and report set it beside what the run took.
"""

import json
from dataclasses import asdict, dataclass
from typing import Annotated

from pydantic import Field, TypeAdapter

from models.errors import LedgerError
from tasks.run.records import Count, Moment, parse
from tasks.storage.files import find_bytes, join, write_bytes

PREDICTION = "prediction.json"


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Of all of a run.

    Attributes:
        made_by: "refinery plan", or "the first shards".
        seconds: of work, from the first shard's start to the last commit.
        bytes: of all parts.
        memory_bytes: of one worker at its peak, on a GPU of its device.
        workers: side by side.
        made_at: UTC, ISO 8601.
    """

    made_by: str
    rows: Count
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    bytes: Count
    memory_bytes: Count
    workers: Count
    made_at: Moment
    version: Annotated[int, Field(ge=1, le=1)] = 1


_PREDICTION = TypeAdapter(Prediction)


def write_prediction(run_uri: str, made: Prediction) -> None:
    """Put it into the run's folder, in the place of an earlier one."""
    text = json.dumps(asdict(made), indent=1, sort_keys=True).encode() + b"\n"
    write_bytes(join(run_uri, PREDICTION), text)


def read_prediction(run_uri: str) -> Prediction | None:
    """None where nothing was predicted, or the file is damaged: nothing depends on it."""
    uri = join(run_uri, PREDICTION)
    data = find_bytes(uri)
    try:
        return None if data is None else parse(_PREDICTION, data, uri, newest=1, advice="delete it")
    except LedgerError:
        return None
