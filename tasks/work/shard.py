"""The heart: one shard of pictures becomes committed rows.

    read -> decode -> invert -> score -> write -> commit

A picture that cannot be read, decoded or inverted is a row with a reason. Any other error ends the
attempt; what it wrote stays invisible: only the marker, written last, makes parts visible.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import islice

import numpy as np

from tasks.input.read import read_shard
from tasks.job import JobConfig, ShardSpec
from tasks.run.ledger import RunHandle
from tasks.run.marker import STAGES, Marker
from tasks.run.parts import Layout
from tasks.run.rows import Row, decode_row, fill_row
from tasks.storage.crash import crash_point
from tasks.work.attempt import Attempt, place_in_errors
from tasks.work.invert import Inverter
from tasks.work.stopwatch import Stopwatch

POOL_THREADS = 4  # decode and encode: Pillow releases the interpreter lock
Sample = tuple[Row, np.ndarray]  # a row and its decoded picture, uint8 [H W 3]


def run_shard(
    spec: ShardSpec,
    job: JobConfig,
    run: RunHandle,
    inverter: Inverter,
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
    attempt = Attempt(spec, run, STAGES)
    watch = attempt.watch
    with place_in_errors(spec), ThreadPoolExecutor(POOL_THREADS) as pool:
        for batch in _decoded_batches(spec, job, inverter, pool, attempt.rows, watch):
            pictures = np.stack([picture for _, picture in batch])
            keys = [row.sample_key for row, _ in batch]
            with lock or nullcontext():
                crash_point("in_invert", spec.id)
                inverted = inverter.invert(pictures, keys)  # and score
            watch.add(inverted.seconds)
            attempt.notes += inverted.notes
            with watch("write"):
                list(pool.map(partial(fill_row, inverted, job), range(len(batch)), batch))
        return attempt.commit(Layout.of(job, inverter), inverter.device_name)


def _decoded_batches(
    spec: ShardSpec,
    job: JobConfig,
    inverter: Inverter,
    pool: ThreadPoolExecutor,
    rows: list[Row],
    watch: Stopwatch,
) -> Iterator[list[Sample]]:
    """Every sample becomes a row; each `job.batch` good ones, in order, make a batch."""
    samples = read_shard(spec, job.input)
    decode = partial(decode_row, job=job, resolution=inverter.generator.resolution)
    good: list[Sample] = []
    while True:
        with watch("read"):
            chunk = list(islice(samples, job.batch))
        if not chunk:
            break
        crash_point("in_decode", spec.id)
        with watch("decode"):
            for row, picture in pool.map(decode, chunk):
                rows.append(row)
                if picture is not None:
                    good.append((row, picture))
        if len(good) >= job.batch:
            yield good[: job.batch]
            good = good[job.batch :]
    if good:
        yield good
