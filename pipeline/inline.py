"""The engine for debugging: the same worker, called in a loop in this process."""

import time

from pipeline.tally import Tally
from pipeline.worker import ShardWorker, WorkOrder


def run_inline(order: WorkOrder, tally: Tally) -> None:
    """Run every scheduled shard here, one after another.

    Raises:
        RefineryError: the run cannot go on. What is committed stays; run again to resume.
    """
    worker = ShardWorker(order)
    tally.at_work, worker.on_rows = lambda: (1, worker.progress()), tally.tell
    worker.start()
    tally.begin()
    schedule = tally.schedule
    while not schedule.is_empty():
        taken = schedule.take(time.monotonic(), is_idle=True)
        if taken is None:
            time.sleep(min(schedule.wait_s(time.monotonic()), 1.0))
            continue
        tally.book(worker.run(taken.shard))
    tally.end()
