"""Says of a run, after its first shards, what all of it will take."""

from dataclasses import dataclass, field

from pipeline.tally import TallySnapshot
from pipeline.worker import ShardResult
from tasks.run.prediction import Prediction, write_prediction
from tasks.run.run_json import utc_now

ROUNDS = 3


@dataclass
class Forecaster:
    """Writes the run's prediction when the workers have committed a shard each, and better ones
    after two and three each, as memory still grows; but none when half of the run is done.

    What was done before all of them had done a batch is not of their pace: it is warm-up.
    """

    run_uri: str
    committed: list[ShardResult] = field(default_factory=list)
    warm: tuple[float, int] | None = None
    """Seconds, and rows until then."""
    rounds: int = 0
    """Shards of each worker that the last prediction knew of."""

    def on_result(self, result: ShardResult, outcome: str) -> None:
        if outcome == "committed" and self.rounds < ROUNDS:
            self.committed.append(result)

    def on_progress(self, snapshot: TallySnapshot) -> None:
        if self.rounds == ROUNDS or not snapshot.workers:
            return
        begun = [shard.rows for shard in snapshot.at_work if shard.rows]
        done = snapshot.rows_now + sum(begun)
        if self.warm is None and len(begun) + len(self.committed) >= snapshot.workers:
            self.warm = snapshot.seconds, done
        warm_s, warm_rows = self.warm or (0.0, done)
        rounds = min(ROUNDS, len(self.committed) // snapshot.workers)
        if done == warm_rows or rounds <= self.rounds:
            return
        self.rounds = rounds
        rows = snapshot.rows_total or round(
            snapshot.rows_done / snapshot.shards_done * snapshot.shards_total
        )
        pace = (done - warm_rows) / max(snapshot.seconds - warm_s, 1e-9)
        seen = sum(result.rows for result in self.committed)
        if not seen or 2 * snapshot.rows_done > rows:
            return
        write_prediction(
            self.run_uri,
            Prediction(
                made_by="the first shards",
                rows=rows,
                seconds=warm_s + (rows - warm_rows) / pace,
                bytes=round(sum(result.bytes for result in self.committed) / seen * rows),
                memory_bytes=max(result.memory_bytes for result in self.committed),
                workers=snapshot.workers,
                made_at=utc_now(),
            ),
        )
