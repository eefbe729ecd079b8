"""The heart: one shard of samples becomes committed rows, whichever kind of job it is of.

    read -> compute and score -> write -> commit

A sample that cannot be read or computed is a row with a reason. Any other error ends the attempt;
what it wrote stays invisible: only the marker, written last, makes parts visible.
"""

from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial

from tasks.job import ShardSpec
from tasks.run.ledger import RunHandle
from tasks.run.marker import Marker
from tasks.storage.crash import crash_point
from tasks.work.attempt import Attempt, place_in_errors
from tasks.work.station import Station, fill_row

POOL_THREADS = 4  # decode and encode: Pillow releases the interpreter lock


def do_shard(
    spec: ShardSpec,
    run: RunHandle,
    station: Station,
    lock: AbstractContextManager[object] | None = None,
) -> Marker:
    """Do one shard and commit it. It may run any number of times, anywhere: equal bytes every time.

    Args:
        lock: held around the device's work only: an actor's other shards read and write meanwhile.

    Raises:
        ShardError: the shard cannot be read, or two samples share a key; retried, then quarantined.
        RefineryError: the store or an asset fails.
    """
    crash_point("before_read", spec.id)
    attempt = Attempt(spec, run, station.stages)
    with place_in_errors(spec), ThreadPoolExecutor(POOL_THREADS) as pool:
        # Threads are for encoding pictures; without any they only cost.
        each = pool.map if station.layout.pictures else map
        for batch in station.read(attempt, pool):
            with lock or nullcontext():
                crash_point("in_work", spec.id)
                result = station.work(batch)
            attempt.watch.add(result.seconds)
            attempt.notes += result.notes
            with attempt.watch("write"):
                list(each(partial(fill_row, batch, result, station), range(len(batch))))
        return attempt.commit(station.layout, station.device_name)
