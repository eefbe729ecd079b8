"""The heart: one shard of samples becomes committed rows, whichever kind of job it is of.

    read -> compute and score -> write -> commit

While the device has a batch, the next one is read and decoded and the results of the one before are
encoded, each in a thread: three batches are in memory.

A sample that cannot be read or computed is a row with a reason. Any other error ends the attempt;
what it wrote stays invisible: only the marker, written last, makes parts visible.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TypeVar

from tasks.input.sample import CorruptFileError
from tasks.job import ShardSpec
from tasks.run.ledger import open_shard
from tasks.run.marker import Marker
from tasks.run.run_json import RunHandle
from tasks.storage.crash import crash_point
from tasks.work.attempt import Attempt, place_in_errors
from tasks.work.station import Batch, Result, Station, fill_row

R = TypeVar("R")

MOST_BYTES = 4 * 2**30
"""Of a shard's results, which are in memory until they are committed."""
POOL_THREADS = 4  # decode and encode: Pillow releases the interpreter lock


def do_shard(
    spec: ShardSpec,
    run: RunHandle,
    station: Station,
    lock: AbstractContextManager[object] | None = None,
    on_rows: Callable[[int], None] | None = None,
) -> Marker:
    """Do one shard and commit it. It may run any number of times, anywhere: equal bytes every time.
    A shard that is committed already is not done again, but for the generation in `run.redo`.

    Args:
        lock: held around the device's work only: an actor's other shards read and write meanwhile.
        on_rows: called after each batch with the number of rows so far.

    Raises:
        ShardError: the shard cannot be read, is too large, or two samples share a key; retried
            where that may help, then quarantined.
        RefineryError: the store or an asset fails.
    """
    crash_point("before_read", spec.id)
    generation, earlier = open_shard(run.uri, spec.id)
    if earlier is not None and generation != run.redo.get(spec.id):
        return earlier
    attempt, held = Attempt(spec, run, station.stages, generation), 0
    with place_in_errors(spec), ThreadPoolExecutor(POOL_THREADS) as pool:
        # Threads are for encoding pictures; without any they only cost.
        each = pool.map if station.layout.pictures else map

        def worked() -> Iterator[Callable[[], tuple[int, int]]]:
            read = (
                (batch, attempt.rows_until(batch.rows[-1])) for batch in station.read(attempt, pool)
            )
            for batch, rows in ahead(read):
                with lock or nullcontext():
                    crash_point("in_work", spec.id)
                    result = station.work(batch)
                attempt.watch.add(result.seconds)
                attempt.notes += result.notes
                yield partial(fill, batch, result, rows)

        def fill(batch: Batch, result: Result, rows: int) -> tuple[int, int]:
            with attempt.watch("write"):
                list(each(partial(fill_row, batch, result, station), range(len(batch))))
            return rows, sum(row.num_bytes for row in batch.rows)

        for rows, size in behind(worked()):
            if on_rows:
                on_rows(rows)
            held += size
            if held > MOST_BYTES:
                raise CorruptFileError(
                    f"{spec.uri}: the first {rows} samples have {held} bytes of results, and a "
                    f"shard may have {MOST_BYTES}. Make smaller shards (a tar is one as it is), or "
                    "store less (output.pictures)"
                )
        return attempt.commit(station.layout, station.device)


def ahead(items: Iterator[R]) -> Iterator[R]:
    """The same items; the next one is made in a thread while the caller has one."""
    end = object()
    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = thread.submit(next, items, end)
            yield item  # type: ignore[misc]


def behind(calls: Iterator[Callable[[], R]]) -> Iterator[R]:
    """What calls return, in order; each is carried out in a thread while the next one is made."""
    running: Future[R] | None = None
    with ThreadPoolExecutor(1) as thread:
        for call in calls:
            done, running = running, thread.submit(call)
            if done:
                yield done.result()
        if running:
            yield running.result()
