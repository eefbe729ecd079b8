"""Says of a run, after its first shards, what all of it will take."""

from dataclasses import dataclass, field

from pipeline.tally import TallySnapshot
from pipeline.worker import ShardResult
from tasks.run.prediction import Prediction, write_prediction
from tasks.run.run_json import utc_now


@dataclass
class Forecaster:
    """Writes the run's prediction when the workers have committed a shard each, and of a long run
    three, as memory still grows with the second; but not of a run that is nearly done.

    What was done before all of them had done a batch is not of their pace: it is warm-up.
    """

    run_uri: str
    committed: list[ShardResult] = field(default_factory=list)
    warm: tuple[float, int] | None = None
    """Seconds, and rows until then."""
    is_over: bool = False

    def on_result(self, result: ShardResult, outcome: str) -> None:
        if outcome == "committed" and not self.is_over:
            self.committed.append(result)

    def on_progress(self, snapshot: TallySnapshot) -> None:
        if self.is_over or not snapshot.workers:
            return
        begun = [shard.rows for shard in snapshot.at_work if shard.rows]
        done = snapshot.rows_now + sum(begun)
        if self.warm is None and len(begun) + len(self.committed) >= snapshot.workers:
            self.warm = snapshot.seconds, done
        warm_s, warm_rows = self.warm or (0.0, done)
        needed = max(1, min(3, snapshot.shards_total // (4 * snapshot.workers)))
        if done == warm_rows or len(self.committed) < needed * snapshot.workers:
            return
        self.is_over = True
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
