"""One shard of stored samples becomes committed rows of edited pictures.

    read -> edit -> score -> write -> commit

A sample that was not inverted stays a failed row with its old reason; one whose picture is not
finite becomes one. Any other error ends the attempt, as in `tasks.work.shard`.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial

from tasks.edit_job import EditJobConfig
from tasks.job import ShardSpec
from tasks.run.ledger import RunHandle
from tasks.run.marker import EDIT_STAGES, Marker
from tasks.run.parts import Layout
from tasks.run.rows import Row, encode_picture
from tasks.run.source import source_marker
from tasks.run.stored import StoredBatch, read_rows, read_shard_inversions
from tasks.storage.crash import crash_point
from tasks.work.attempt import Attempt, place_in_errors
from tasks.work.edit import INVERSION, Edited, Editor
from tasks.work.stopwatch import Stopwatch

POOL_THREADS = 4


def edit_shard(
    spec: ShardSpec,
    job: EditJobConfig,
    run: RunHandle,
    editor: Editor,
    lock: AbstractContextManager[object] | None = None,
) -> Marker:
    """Do one shard and commit it. It may run any number of times, anywhere: equal bytes every time.

    Args:
        lock: held around the device's work only.

    Raises:
        ShardError: the source's shard is gone or was made again since the plan.
        RefineryError: the store or an asset fails.
    """
    crash_point("before_read", spec.id)
    attempt = Attempt(spec, run, EDIT_STAGES)
    watch = attempt.watch
    with place_in_errors(spec), ThreadPoolExecutor(POOL_THREADS) as pool:
        with watch("read"):
            source = source_marker(spec)
            attempt.rows = read_rows(spec.uri, source)[: spec.row_stop or None]
        by_key = {row.sample_key: row for row in attempt.rows}
        with_inputs = "input" in job.output.pictures
        stored = read_shard_inversions(spec.uri, source, job.batch, with_inputs)
        for batch in _batches(stored, by_key, watch):
            with lock or nullcontext():
                crash_point("in_invert", spec.id)
                edited = editor.edit(batch.inversion, batch.sample_keys)  # and score
            watch.add(edited.seconds)
            attempt.notes += edited.notes
            with watch("write"):
                rows = [by_key[key] for key in batch.sample_keys]
                list(pool.map(partial(_fill_row, edited, job, batch), range(len(rows)), rows))
        return attempt.commit(_layout(job, editor), editor.device_name)


def _batches(
    stored: Iterator[StoredBatch], by_key: dict[str, Row], watch: Stopwatch
) -> Iterator[StoredBatch]:
    """The stored batches, cut where the plan's last sample is."""
    while True:
        with watch("read"):
            batch = next(stored, None)
        if batch is None:
            return
        count = sum(key in by_key for key in batch.sample_keys)  # sorted: the wanted ones lead
        if count:
            yield batch[:count]
        if count < len(batch.sample_keys):
            return


def _fill_row(edited: Edited, job: EditJobConfig, batch: StoredBatch, at: int, row: Row) -> None:
    if at in edited.failures:
        row.fail(*edited.failures[at])
        return
    row.w_plus = batch.inversion.w_plus[at].numpy()
    row.metrics = {name: float(values[at]) for name, values in edited.metrics.items()}
    wanted = [INVERSION] if INVERSION in job.output.pictures else []
    for name in (*wanted, *(variant.name for variant in job.variants)):
        row.pictures[name] = encode_picture(edited.pictures[name][at], job.output.picture_format)
    if batch.inputs is not None:
        row.pictures["input"] = batch.inputs[at]


def _layout(job: EditJobConfig, editor: Editor) -> Layout:
    return Layout(
        method=job.method,
        metrics=editor.metric_names,
        shape=(editor.generator.num_ws, editor.generator.w_dim),
        output=job.output,
        variants=tuple(variant.name for variant in job.variants),
    )
