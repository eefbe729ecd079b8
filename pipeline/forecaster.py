"""Says of a run, after its first shards, what all of it will take."""

from dataclasses import dataclass, field

from pipeline.tally import TallySnapshot
from pipeline.worker import ShardResult
from tasks.run.prediction import Prediction, write_prediction
from tasks.run.run_json import utc_now


@dataclass
class Forecaster:
    """Writes the run's prediction when every worker has committed a shard and most are left."""

    run_uri: str
    committed: list[ShardResult] = field(default_factory=list)
    is_over: bool = False

    def on_result(self, result: ShardResult, outcome: str) -> None:
        if outcome == "committed" and not self.is_over:
            self.committed.append(result)

    def on_progress(self, snapshot: TallySnapshot) -> None:
        if self.is_over or not self.committed or len(self.committed) < snapshot.workers:
            return
        self.is_over = True
        rows = snapshot.rows_total or round(
            snapshot.rows_done / snapshot.shards_done * snapshot.shards_total
        )
        at_work = sum(shard.rows for shard in snapshot.at_work)
        pace = (snapshot.rows_now + at_work) / max(snapshot.seconds, 1e-9)
        seen = sum(result.rows for result in self.committed)
        if not seen or 2 * snapshot.rows_done > rows:
            return
        write_prediction(
            self.run_uri,
            Prediction(
                made_by="the first shards",
                rows=rows,
                seconds=rows / pace,
                bytes=round(sum(result.bytes for result in self.committed) / seen * rows),
                memory_bytes=max(result.memory_bytes for result in self.committed),
                workers=snapshot.workers,
                made_at=utc_now(),
            ),
        )
