"""The heart: one shard of pictures becomes committed rows.

    read -> decode -> invert -> score -> write -> commit

A picture that cannot be read, decoded or inverted is a row with a reason. Any other error ends the
attempt; what it wrote stays invisible: only the marker, written last, makes parts visible.
"""

import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import islice

import numpy as np

from tasks.crash import crash_point
from tasks.inverter import Inverter
from tasks.job import JobConfig, ShardSpec
from tasks.ledger import RunHandle, read_marker, shard_name, utc_now, write_marker
from tasks.marker import STAGES, Marker
from tasks.parts import Layout, write_parts
from tasks.read import read_shard
from tasks.rows import Row, decode_row, fill_row
from tasks.stopwatch import Stopwatch

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
    attempt, started_at, watch = uuid.uuid4().hex[:12], utc_now(), Stopwatch(STAGES)
    rows: list[Row] = []
    notes: list[str] = []
    with _place_in_errors(spec), ThreadPoolExecutor(POOL_THREADS) as pool:
        for batch in _decoded_batches(spec, job, inverter, pool, rows, watch):
            pictures = np.stack([picture for _, picture in batch])
            keys = [row.sample_key for row, _ in batch]
            with lock or nullcontext():
                crash_point("in_invert", spec.id)
                inverted = inverter.invert(pictures, keys)  # and score
            watch.add(inverted.seconds)
            notes += inverted.notes
            with watch("write"):
                list(pool.map(partial(fill_row, inverted, job), range(len(batch)), batch))
        with watch("write"):
            parts = write_parts(rows, Layout.of(job, inverter), run, spec.id, attempt)
    failures = Counter(row.error_kind for row in rows if row.error_kind is not None)
    marker = Marker(
        shard=spec.id,
        attempt=attempt,
        run_id=run.run_id,
        rows=len(rows),
        failed=failures.total(),
        parts=parts,
        seconds=watch.seconds,
        wall_s=watch.wall_s,
        failures=dict(sorted(failures.items())),
        device=inverter.device_name,
        code_version=run.code_version,
        notes=tuple(dict.fromkeys(notes)),
        started_at=started_at,
        finished_at=utc_now(),
    )
    crash_point("before_marker", spec.id)
    # A worker given up for dead may come back late: the commit that readers know already stays.
    earlier = read_marker(run.uri, spec.id)
    if earlier is not None:
        return earlier
    write_marker(run.uri, marker)
    crash_point("after_marker", spec.id)
    return marker


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


@contextmanager
def _place_in_errors(spec: ShardSpec) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        error.add_note(f"shard={shard_name(spec.id)} kind={spec.kind} uri={spec.uri}")
        raise
