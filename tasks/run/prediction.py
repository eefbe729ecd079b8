"""What a run will take, as it was said before it was over: prediction.json in its folder.

`refinery plan IN OUT` measures and writes it; where it did not, the driver does after the first
shards. Summary and report set it beside what the run took.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field, TypeAdapter

from models.errors import LedgerError
from tasks.job import Job
from tasks.run.records import Count, Moment, parse, to_json
from tasks.storage.files import find_bytes, join, remove, write_bytes

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
        batch, shard_size: that were chosen for a run that has not begun and leaves them open.
        settings: of the job that was measured (`settings_of`); empty of a run at work.
    """

    made_by: str
    rows: Count
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    bytes: Count
    memory_bytes: Count
    workers: Count
    made_at: Moment
    batch: Annotated[int, Field(ge=1)] | None = None
    shard_size: Annotated[int, Field(ge=1)] | None = None
    settings: str = ""
    version: Annotated[int, Field(ge=1, le=1)] = 1


_PREDICTION = TypeAdapter(Prediction)


def settings_of(job: Job) -> str:
    """A hash of all that a job says but its batch."""
    values = {name: value for name, value in job.to_dict().items() if name != "batch"}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def write_prediction(run_uri: str, made: Prediction) -> None:
    """Put it into the run's folder, in the place of an earlier one."""
    write_bytes(join(run_uri, PREDICTION), to_json(made))


def prediction_for(run_uri: str, job: Job) -> Prediction | None:
    """What was predicted of a run of these settings that has not begun."""
    said = read_prediction(run_uri)
    return said if said and said.settings == settings_of(job) else None


def drop_prediction_of_other(run_uri: str, job: Job) -> None:
    """Forget what was predicted of other settings than those of the run that begins."""
    if read_prediction(run_uri) and not prediction_for(run_uri, job):
        remove([join(run_uri, PREDICTION)])


def read_prediction(run_uri: str) -> Prediction | None:
    """None where nothing was predicted, or the file is damaged: nothing depends on it."""
    uri = join(run_uri, PREDICTION)
    data = find_bytes(uri)
    try:
        return None if data is None else parse(_PREDICTION, data, uri, newest=1, advice="delete it")
    except LedgerError:
        return None
