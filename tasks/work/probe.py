"""Speeds and sizes measured on the first pictures of an input, for `refinery plan`.

It runs `do_shard` itself into a temporary folder, so what it measures is what a run will do.
"""

import logging
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock

from models.errors import ConfigError, ShardError
from tasks.job import JobConfig, ShardSpec
from tasks.run.manifest import plan_shards
from tasks.run.marker import Marker
from tasks.run.run_json import RunHandle
from tasks.storage.files import join
from tasks.work.device import peak_memory
from tasks.work.invert import Inverter
from tasks.work.shard import do_shard

logger = logging.getLogger(__name__)

_RUN_ID = "0" * 16  # as long as a real one
BATCHES = 4
COPIES = 4
"""Of a stored row in memory: its values, their table, its columns as they are encoded, the file."""
LEAST_S, MOST_S = 15.0, 240.0
"""Where there are as many pictures: a shorter look meets the machine at an odd moment. At most, but
for one batch of warm-up and one that is measured."""


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """What `count` pictures cost.

    Attributes:
        batch: pictures worked on together.
        memory_bytes: of the worker at its peak (`tasks.work.device.peak_memory`).
        loaded_bytes: the same before its first batch.
        rows_held: of the shards that were at work together, until their commits.
        row_bytes: of `memory_bytes` for each of them, where more were tried after fewer; at least
            those of a row as it is held, put into a table, and written.
        warm_up_s: that the first batch took longer than another.
        num_images: pictures measured, failed ones included; the warm-up is not among them.
        num_failed: of these.
        images_per_s: by stage ("read", "decode", "invert", "score", "write") as if it ran alone,
            and "total", from the first shard's start to the last commit of one worker.
        bytes_per_image: of the stored parts.
        device: as in the commit markers.
    """

    batch: int
    memory_bytes: int
    loaded_bytes: int
    rows_held: int
    row_bytes: float
    warm_up_s: float
    num_images: int
    num_failed: int
    images_per_s: dict[str, float]
    bytes_per_image: float
    device: str


def probe(
    job: JobConfig,
    input_uri: str,
    count: int | None,
    device: str,
    shard_size: int,
    *,
    in_flight: int = 1,
    inverter: Inverter | None = None,
    on_warm: Callable[[], object] = lambda: None,
) -> ProbeResult:
    """Run the first `count` pictures, after one batch of warm-up, and throw the result away.

    Args:
        count: None for four batches, for more where they are done in seconds, for fewer where
            they would take minutes.
        shard_size: of the run; smaller here where one shard would be all.
        in_flight: shards at once, as in the run's workers.
        inverter: an inverter of this job that is built already.
        on_warm: called after the warm-up, e.g. to wait for other workers.

    Raises:
        ConfigError: the input holds no picture, or a setting is wrong.
        ShardError: no shard of the sample can be read.
        AssetError: a weight file is missing.
    """
    if count is not None and count < 1:
        raise ConfigError(f"probe: expected at least one picture, found {count}")
    inverter = inverter or Inverter(job, device)
    loaded = peak_memory(inverter.device)
    with tempfile.TemporaryDirectory(prefix="refinery-probe-") as folder:
        batch = inverter.job.batch

        def measured(stage: str, limit: int) -> tuple[list[Marker], float]:
            share = batch * math.ceil(limit / (in_flight * batch))
            specs = plan_shards(input_uri, min(shard_size, share), limit, job.input)
            run = RunHandle(uri=join(folder, stage), run_id=_RUN_ID)
            return _run(list(specs), run, inverter, in_flight)

        first, first_s = measured("warm-up", min(count or batch, batch))
        on_warm()
        batches = max(1, min(BATCHES, int(MOST_S / first_s)))
        markers, took_s = measured("measured", count or batch * batches)
        held, row_bytes = _held(markers, in_flight), 0.0
        if count is None and took_s < LEAST_S:
            before = _peak(markers)
            markers, took_s = measured("longer", batch * math.ceil(batches * LEAST_S / took_s))
            more = _held(markers, in_flight) - held
            row_bytes = (_peak(markers) - before) / more if more > 0 else 0.0
    rows = max(sum(marker.rows for marker in markers), 1)
    stored = sum(part.bytes for marker in markers for part in marker.parts.values()) / rows
    seconds: Counter[str] = Counter()
    for marker in markers:
        seconds.update(marker.seconds)
    speeds = {stage: rows / max(seconds[stage], 1e-9) for stage in Inverter.stages}
    return ProbeResult(
        batch=batch,
        memory_bytes=_peak(markers),
        loaded_bytes=loaded,
        rows_held=_held(markers, in_flight),
        row_bytes=max(row_bytes, COPIES * stored),
        warm_up_s=max(first_s - took_s / rows * sum(marker.rows for marker in first), 0.0),
        num_images=sum(marker.rows for marker in markers),
        num_failed=sum(marker.failed for marker in markers),
        images_per_s=speeds | {"total": rows / took_s},
        bytes_per_image=stored,
        device=inverter.device_name,
    )


def _peak(markers: Sequence[Marker]) -> int:
    return max(marker.memory_bytes for marker in markers)


def _held(markers: Sequence[Marker], in_flight: int) -> int:
    return sum(sorted((marker.rows for marker in markers), reverse=True)[:in_flight])


def _run(
    specs: Sequence[ShardSpec], run: RunHandle, inverter: Inverter, in_flight: int
) -> tuple[list[Marker], float]:
    """The commits of a worker's shards, and the seconds that they took together."""
    markers: list[Marker] = []
    problem: ShardError | None = None
    began, lock = time.perf_counter(), Lock()
    with ThreadPoolExecutor(in_flight) as pool:
        each = [(spec, pool.submit(do_shard, spec, run, inverter, lock)) for spec in specs]
        for spec, made in each:
            try:
                markers.append(made.result())
            except ShardError as error:
                logger.warning("probe: shard %05d is left out: %s", spec.id, error)
                problem = error
    if problem is not None and not any(marker.rows for marker in markers):
        raise problem
    return markers, max(time.perf_counter() - began, 1e-3)
