"""The photographs behind a run's samples, read once more from where its inversion had them."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

from models.errors import SampleError
from tasks.input.read import RawSample, read_shard
from tasks.job import InputConfig, ShardSpec
from tasks.run.manifest import read_shard_spec
from tasks.run.run_json import read_run
from tasks.run.source import shards_read
from tasks.work.attempt import Attempt
from tasks.work.kinds import load_job
from tasks.work.station import Batch


class Original(NamedTuple):
    """A photograph, how it was read for its inversion, and its samples: batches of one."""

    photo: RawSample
    input: InputConfig
    samples: list[Batch]

    @property
    def data(self) -> bytes | None:
        """The photograph as its file has it."""
        return self.photo.data


def originals(attempt: Attempt, batches: Iterable[Batch]) -> Iterator[Original]:
    """The photographs of stored samples, in the input's order. A sample whose photograph is gone,
    cannot be read or is not the one that was inverted becomes a failed row of kind "read".

    Raises:
        LedgerError: a run of the chain is gone.
        ShardError: the input cannot be read.
    """
    waiting: dict[str, list[Batch]] = defaultdict(list)
    for batch in batches:
        for at, row in enumerate(batch.rows):
            waiting[row.image_uri].append(batch[at : at + 1])
    photos = _photos(attempt.spec)
    while waiting:
        with attempt.watch("read"):
            photo, input = next(photos, (None, None))
        if photo is None or input is None:
            break
        samples = waiting.pop(photo.uri, [])
        error = photo.error
        if error is None and samples:
            found = hashlib.sha256(photo.data or b"").hexdigest()
            if found != samples[0].rows[0].image_sha256:
                error = SampleError("read", "the photograph is not the one that was inverted")
        if error is not None:
            _fail(samples, error.kind, str(error))
        elif samples:
            yield Original(photo, input, samples)
    for samples in waiting.values():
        _fail(samples, "read", "the photograph is no longer in the input")


def _photos(spec: ShardSpec) -> Iterator[tuple[RawSample, InputConfig]]:
    for shard, input in origins(spec):
        for photo in read_shard(shard, input):
            yield photo, input


def _fail(samples: Iterable[Batch], kind: str, reason: str) -> None:
    for sample in samples:
        sample.rows[0].fail(kind, reason)


def origins(spec: ShardSpec) -> Iterator[tuple[ShardSpec, InputConfig]]:
    """The shards of photographs that a shard of a run goes back to, and how they were read:
    several where a run of the chain was compacted before another was made from it.

    Raises:
        LedgerError: a run of the chain is gone.
    """
    run = spec.uri
    for shard in shards_read(spec):
        before = read_shard_spec(run, shard)
        if before.kind == "run":
            yield from origins(replace(before, uri=read_run(run)["config"]["source"]))
        else:
            yield before, load_job(run).input  # type: ignore[attr-defined]  # an inversion's
