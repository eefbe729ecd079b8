"""Speeds and sizes measured on the first pictures of an input, for `refinery plan`.

It runs `do_shard` itself into a temporary folder, so what it measures is what a run will do.
"""

import logging
import math
import tempfile
from collections import Counter
from dataclasses import dataclass

from models.errors import ConfigError, ShardError
from tasks.job import JobConfig, ShardSpec
from tasks.run.manifest import plan_shards
from tasks.run.marker import Marker
from tasks.run.run_json import RunHandle
from tasks.storage.files import join
from tasks.work.invert import Inverter
from tasks.work.shard import do_shard

logger = logging.getLogger(__name__)

_RUN_ID = "0" * 16  # as long as a real one
BATCHES = 4
LEAST_S, MOST_S = 15.0, 240.0
"""Where there are as many pictures: a shorter look meets the machine at an odd moment. At most, but
for one batch of warm-up and one that is measured."""


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """What `count` pictures cost.

    Attributes:
        batch: pictures worked on together.
        memory_bytes: of the worker at its peak (`tasks.work.device.peak_memory`).
        num_images: pictures measured, failed ones included; the warm-up is not among them.
        num_failed: of these.
        images_per_s: by stage ("read", "decode", "invert", "score", "write") as if it ran alone,
            and "total", from the start of a shard to its commit: one worker with one shard in
            flight. With several the device's stages, "invert" and "score", set a GPU's pace.
        bytes_per_image: of the stored parts.
        device: as in the commit markers.
    """

    batch: int
    memory_bytes: int
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
    inverter: Inverter | None = None,
) -> ProbeResult:
    """Run the first `count` pictures, after one batch of warm-up, and throw the result away.

    Args:
        count: None for four batches, for more where they are done in seconds, for fewer where
            they would take minutes.
        shard_size: of the run, so that batches are cut where a run cuts them.
        inverter: an inverter of this job that is built already.

    Raises:
        ConfigError: the input holds no picture, or a setting is wrong.
        ShardError: no shard of the sample can be read.
        AssetError: a weight file is missing.
    """
    if count is not None and count < 1:
        raise ConfigError(f"probe: expected at least one picture, found {count}")
    inverter = inverter or Inverter(job, device)
    with tempfile.TemporaryDirectory(prefix="refinery-probe-") as folder:
        batch = inverter.job.batch

        def measured(stage: str, limit: int) -> list[Marker]:
            specs = list(plan_shards(input_uri, shard_size, limit, job.input))
            return _run(specs, RunHandle(uri=join(folder, stage), run_id=_RUN_ID), inverter)

        first = measured("warm-up", min(count or batch, batch))
        first_s = max(sum(marker.wall_s for marker in first), 1e-3)
        batches = max(1, min(BATCHES, int(MOST_S / first_s)))
        markers = measured("measured", count or batch * batches)
        took_s = max(sum(marker.wall_s for marker in markers), 1e-3)
        if count is None and took_s < LEAST_S:
            markers = measured("longer", batch * math.ceil(batches * LEAST_S / took_s))
    return _result(markers, inverter)


def _run(specs: list[ShardSpec], run: RunHandle, inverter: Inverter) -> list[Marker]:
    markers: list[Marker] = []
    problem: ShardError | None = None
    for spec in specs:
        try:
            markers.append(do_shard(spec, run, inverter))
        except ShardError as error:
            logger.warning("probe: shard %05d is left out: %s", spec.id, error)
            problem = error
    if problem is not None and not any(marker.rows for marker in markers):
        raise problem
    return markers


def _result(markers: list[Marker], inverter: Inverter) -> ProbeResult:
    rows = sum(marker.rows for marker in markers)
    seconds: Counter[str] = Counter()
    for marker in markers:
        seconds.update(marker.seconds)
    speeds = {stage: rows / max(seconds[stage], 1e-9) for stage in Inverter.stages}
    return ProbeResult(
        batch=inverter.job.batch,
        memory_bytes=max(marker.memory_bytes for marker in markers),
        num_images=rows,
        num_failed=sum(marker.failed for marker in markers),
        images_per_s=speeds | {"total": rows / max(sum(m.wall_s for m in markers), 1e-9)},
        bytes_per_image=sum(part.bytes for m in markers for part in m.parts.values())
        / max(rows, 1),
        device=inverter.device_name,
    )
