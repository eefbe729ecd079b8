"""What a run will take, before it starts: counts from a listing, time and size from a probe."""

import math
from collections import Counter
from dataclasses import dataclass
from itertools import islice

from rich.table import Table

from pipeline.config import InvertConfig
from pipeline.progress import duration
from pipeline.run import local_device
from pipeline.screen import pairs, size
from tasks.input.read import read_shard
from tasks.job import InputConfig, ShardSpec
from tasks.run.manifest import plan_shards

SAMPLED = 64
"""Pictures of the first tar whose mean size stands for all, where only reading would count them."""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What an input holds.

    Attributes:
        num_images: counted, or estimated from sizes where `is_counted` is False (tars).
        num_bytes: encoded.
    """

    kinds: dict[str, int]
    num_shards: int
    num_images: int
    num_bytes: int
    is_counted: bool


def list_input(source: str, shard_size: int, limit: int | None, settings: InputConfig) -> Listing:
    """Plan the shards without keeping or writing them.

    Raises:
        ConfigError, ShardError: the input is missing, empty or cannot be listed.
    """
    kinds: Counter[str] = Counter()
    num_images = num_bytes = uncounted_bytes = 0
    first_uncounted: ShardSpec | None = None
    for spec in plan_shards(source, shard_size, limit, settings):
        kinds[spec.kind] += 1
        num_bytes += spec.num_bytes
        num_images += max(spec.num_samples, 0)
        if spec.num_samples < 0:
            first_uncounted = first_uncounted or spec
            uncounted_bytes += spec.num_bytes
    if first_uncounted is not None:
        sizes = [len(s.data or b"") for s in islice(read_shard(first_uncounted, settings), SAMPLED)]
        num_images += round(uncounted_bytes / max(sum(sizes) / max(len(sizes), 1), 1))
    return Listing(
        kinds=dict(kinds),
        num_shards=kinds.total(),
        num_images=num_images,
        num_bytes=num_bytes,
        is_counted=first_uncounted is None,
    )


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
    return {
        "probe": f"{result.num_images} images on {result.device}, {result.num_failed} failed",
        "images/s": f"{speeds} (one worker)",
        "work": f"{_hours(worker_s)} {unit}",
        "time": f"{duration(math.ceil(worker_s / shared))} on {shared} "
        f"{'worker' if shared == 1 else 'workers'}, start-up not included",
        "output": f"{size(result.bytes_per_image * found.num_images)} "
        f"({size(result.bytes_per_image)} an image)",
    }


def _hours(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours:.4f}" if hours < 0.1 else f"{hours:.1f}"
