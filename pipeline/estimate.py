"""What a run will take, before it starts: counts from a listing, time and size from a probe."""

import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from rich.table import Table

from models.errors import ShardError
from pipeline.config import EngineConfig, InvertConfig
from pipeline.progress import duration
from pipeline.run import local_device
from pipeline.screen import pairs, size
from tasks.input.plan import in_words
from tasks.input.read import read_shard
from tasks.job import InputConfig, ShardSpec
from tasks.run.manifest import plan_shards

logger = logging.getLogger(__name__)

SAMPLED, TRIED = 64, 8
"""Pictures of the first tar that can be read, of so many, whose mean size stands for all, where
only reading would count them."""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What an input holds.

    Attributes:
        num_images: counted, or estimated from sizes where `is_counted` is False (tars).
        largest: images of the largest shard, estimated likewise.
        num_bytes: encoded.
        skipped: files that are in no shard, by reason.
    """

    kinds: dict[str, int]
    num_shards: int
    num_images: int
    largest: int
    num_bytes: int
    is_counted: bool
    skipped: dict[str, int]


def list_input(source: str, shard_size: int, limit: int | None, settings: InputConfig) -> Listing:
    """Plan the shards without keeping or writing them.

    Raises:
        ConfigError, ShardError: the input is missing, empty or cannot be listed.
    """
    kinds: Counter[str] = Counter()
    num_images = num_bytes = uncounted_bytes = largest = largest_bytes = 0
    uncounted: list[ShardSpec] = []
    shards = plan_shards(source, shard_size, limit, settings)
    for spec in shards:
        kinds[spec.kind] += 1
        num_bytes += spec.num_bytes
        num_images += max(spec.num_samples, 0)
        largest = max(largest, spec.num_samples)
        if spec.num_samples < 0:
            uncounted += [spec] if len(uncounted) < TRIED else []
            uncounted_bytes += spec.num_bytes
            largest_bytes = max(largest_bytes, spec.num_bytes)
    if uncounted:
        mean_bytes = max(_mean_bytes(uncounted, settings), 1)
        num_images += round(uncounted_bytes / mean_bytes)
        largest = max(largest, math.ceil(largest_bytes / mean_bytes))
    return Listing(
        kinds=dict(kinds),
        num_shards=kinds.total(),
        num_images=num_images,
        largest=largest,
        num_bytes=num_bytes,
        is_counted=not uncounted,
        skipped=dict(shards.skipped),
    )


def _mean_bytes(specs: Sequence[ShardSpec], settings: InputConfig) -> float:
    for spec in specs:
        try:
            sizes = [len(s.data or b"") for s in islice(read_shard(spec, settings), SAMPLED)]
        except ShardError as problem:  # quarantined when it is its turn
            logger.warning("not looked at for its pictures' size: %s", problem)
            continue
        if sum(sizes):
            return sum(sizes) / len(sizes)
    return float(sum(spec.num_bytes for spec in specs))


def estimate(source: str, config: InvertConfig, *, limit: int | None, count: int) -> Table:
    """The table of `refinery plan`.

    Args:
        limit: only the first samples.
        count: pictures to invert for the estimate of time and size; 0 for none.

    Raises:
        RefineryError: the input cannot be listed, or the probe fails.
    """
    found = list_input(source, config.engine.shard_size, limit, config.job.input)
    about = "" if found.is_counted else "about "
    kinds = ", ".join(f"{kind} {number}" for kind, number in found.kinds.items())
    values = {
        "input": source,
        "shards": f"{found.num_shards} ({kinds})",
        "images": f"{about}{found.num_images}",
        "bytes": size(found.num_bytes),
        "skipped": in_words(found.skipped) or "nothing",
        "methods": " then ".join(link.name for link in config.job.methods),
    }
    if count:
        values |= _probed(source, config, found, count)
    return pairs("", values)


def _probed(source: str, config: InvertConfig, found: Listing, count: int) -> dict[str, str]:
    from tasks.work.probe import probe

    device = local_device()
    result = probe(config.job, source, count, device)
    speeds = ", ".join(f"{stage} {pace:.1f}" for stage, pace in result.images_per_s.items())
    device_s = sum(found.num_images / result.images_per_s[stage] for stage in ("invert", "score"))
    total_s = found.num_images / result.images_per_s["total"]
    # With shards in flight reading, decoding and writing hide behind the device, on a GPU.
    worker_s = total_s if device == "cpu" else device_s
    unit = "CPU-core hours" if device == "cpu" else "GPU hours"
    actors = config.engine.actors
    shared = 1 if actors == "auto" else min(actors, found.num_shards)
    warning = _timeout_warning(found.largest / result.images_per_s["total"], found, config.engine)
    return {
        "probe": f"{result.num_images} images on {result.device}, {result.num_failed} failed",
        "images/s": f"{speeds} (one worker)",
        "work": f"{_hours(worker_s)} {unit}",
        "time": f"{duration(math.ceil(worker_s / shared))} on {shared} "
        f"{'worker' if shared == 1 else 'workers'}, start-up not included",
        "output": f"{size(result.bytes_per_image * found.num_images)} "
        f"({size(result.bytes_per_image)} an image)",
        **({"warning": warning} if warning else {}),
    }


def _timeout_warning(alone_s: float, found: Listing, engine: EngineConfig) -> str | None:
    """What to change where the largest shard would not be done in time, beside others in flight."""
    needed_s = math.ceil(alone_s * engine.shards_in_flight)
    if needed_s <= engine.shard_timeout_s:
        return None
    return (
        f"a shard of {found.largest} images takes about {duration(needed_s)} with "
        f"{engine.shards_in_flight} in flight, and its worker would be restarted after "
        f"{duration(math.ceil(engine.shard_timeout_s))}. Set engine.shard_timeout_s to at least "
        f"{2 * needed_s}, or make shards smaller (engine.shard_size; tars are shards as they are)"
    )


def _hours(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours:.4f}" if hours < 0.1 else f"{hours:.1f}"
