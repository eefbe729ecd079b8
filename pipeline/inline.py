"""The engine for debugging: the same worker, called in a loop in this process."""

import gc
import time
from typing import TYPE_CHECKING

from pipeline.tally import Tally
from pipeline.worker import ShardWorker, WorkOrder

if TYPE_CHECKING:
    from tasks.work.station import Station


def run_inline(order: WorkOrder, tally: Tally, station: "Station | None" = None) -> None:
    """Run every scheduled shard here, one after another.

    Args:
        station: loaded already; used if it is what the order asks for.

    Raises:
        RefineryError: the run cannot go on. What is committed stays; run again to resume.
    """
    worker = ShardWorker(order, station)
    tally.at_work, worker.on_rows = lambda: (1, worker.progress()), tally.tell
    worker.start()
    tally.begin()
    schedule = tally.schedule
    try:
        while not schedule.is_empty():
            taken = schedule.take(time.monotonic(), is_idle=True)
            if taken is None:
                time.sleep(min(schedule.wait_s(time.monotonic()), 1.0))
                continue
            tally.book(worker.run(taken.shard))
    finally:
        gc.unfreeze()  # this process goes on without the worker
    tally.end()
