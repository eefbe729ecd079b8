"""One try at one shard: a name for its files, a clock, and the commit at its end.

What an attempt wrote stays invisible until the marker, its last write, names it.
"""

import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from tasks.job import ShardSpec
from tasks.run.ledger import shard_name, write_marker
from tasks.run.marker import Marker
from tasks.run.parts import Layout, write_parts
from tasks.run.rows import Row
from tasks.run.run_json import RunHandle, utc_now
from tasks.storage.crash import crash_point
from tasks.work.device import device_name, peak_memory
from tasks.work.stopwatch import Stopwatch


class Attempt:
    """The rows of one shard on their way to a commit.

    Args:
        stages: names of the work that `watch` times, "write" among them.
        generation: of the shard, in which to commit (`tasks.run.ledger.open_shard`).

    Attributes:
        rows: of the shard's samples, in the order they were read.
        notes: what an operator should know; repeated ones are stored once.
    """

    def __init__(
        self, spec: ShardSpec, run: RunHandle, stages: Sequence[str], generation: int = 0
    ) -> None:
        self.spec, self.run, self.generation = spec, run, generation
        self.name, self.started_at = uuid.uuid4().hex[:12], utc_now()
        self.watch = Stopwatch(stages)
        self.rows: list[Row] = []
        self.notes: list[str] = []

    def rows_until(self, last: Row) -> int:
        """Rows up to that one, those included that have failed in between."""
        return next(n for n in range(len(self.rows), 0, -1) if self.rows[n - 1] is last)

    def commit(self, layout: Layout, device: torch.device) -> Marker:
        """Write the parts, then the marker.

        Returns:
            The commit that readers see: an earlier one, where another attempt was faster.

        Raises:
            ShardError: two samples share a key, the store refuses, or this attempt was taken for
                dead.
        """
        spec, run, watch = self.spec, self.run, self.watch
        with watch("write"):
            parts = write_parts(self.rows, layout, run, spec.id, self.name, self.generation)
        failures = Counter(row.error_kind for row in self.rows if row.error_kind is not None)
        marker = Marker(
            shard=spec.id,
            attempt=self.name,
            run_id=run.run_id,
            rows=len(self.rows),
            failed=failures.total(),
            parts=parts,
            seconds=watch.seconds,
            wall_s=watch.wall_s,
            failures=dict(sorted(failures.items())),
            device=device_name(device),
            memory_bytes=peak_memory(device),
            code_version=run.code_version,
            notes=tuple(dict.fromkeys(self.notes)),
            started_at=self.started_at,
            finished_at=utc_now(),
        )
        crash_point("before_marker", spec.id)
        first = write_marker(run.uri, marker, self.generation)
        crash_point("after_marker", spec.id)
        return first


@contextmanager
def place_in_errors(spec: ShardSpec) -> Iterator[None]:
    """Inside, errors carry a note that says which shard it was."""
    try:
        yield
    except Exception as error:
        error.add_note(f"shard={shard_name(spec.id)} kind={spec.kind} uri={spec.uri}")
        raise
