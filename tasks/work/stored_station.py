"""Stations whose samples come from a finished run instead of from pictures."""

from abc import abstractmethod
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import Any

import pyarrow as pa

from models.errors import LedgerError
from tasks.input.sample import CorruptFileError
from tasks.job import ShardSpec
from tasks.run.run_json import read_declared
from tasks.run.source import plan_source, read_rows, source_marker
from tasks.run.stored import check_run_generator, read_shard_inversions
from tasks.work.attempt import Attempt
from tasks.work.station import Batch, Station


class StoredStation(Station):
    """Reads the samples of `job.source`. A sample that failed there stays a failed row with its old
    reason."""

    reads_doors = True
    """Whether the work needs noise, features and residuals beside the codes."""

    @classmethod
    def plan(cls, job: Any, source: str, shard_size: int, limit: int | None) -> Iterator[ShardSpec]:
        return plan_source(source, limit)

    def load(self) -> None:
        check_run_generator(self.job.source, self.generator)
        self.hashes["source"] = self.job.source_run
        self.has_faces = read_declared(self.job.source).faces

    @property
    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """The stored pictures that the work needs."""

    def read(self, attempt: Attempt, pool: Executor) -> Iterator[Batch]:
        """The source's batches, cut where the plan's last sample is.

        Raises:
            CorruptFileError: a part of the source is damaged.
        """
        spec, watch = attempt.spec, attempt.watch
        with watch("read"), _damage():
            source = source_marker(spec)
            attempt.rows = read_rows(spec.uri, source)[: spec.row_stop or None]
        by_key = {row.sample_key: row for row in attempt.rows}
        stored = read_shard_inversions(
            spec.uri, source, self.job.batch, self.columns, with_doors=self.reads_doors
        )
        while True:
            with watch("read"), _damage():
                batch = next(stored, None)
            if batch is None:
                return
            count = sum(key in by_key for key in batch.sample_keys)  # sorted: the wanted ones lead
            if count:
                keys = batch.sample_keys[:count]
                yield Batch(
                    keys=keys,
                    rows=[by_key[key] for key in keys],
                    encoded={name: data[:count] for name, data in batch.pictures.items()},
                    inversion=batch.inversion[:count],
                )
            if count < len(batch.sample_keys):
                return


@contextmanager
def _damage() -> Iterator[None]:
    """Inside, damage of the source counts against the shard; an outage of the store does not."""
    try:
        yield
    except LedgerError as error:
        if error.__cause__ is None or isinstance(error.__cause__, pa.ArrowException):
            raise CorruptFileError(str(error)) from error
        raise
