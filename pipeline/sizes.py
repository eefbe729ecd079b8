"""Pictures at once, pictures of a shard, workers side by side: what fits a machine's memory and a
worker's time, as a probe has measured them."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import EngineConfig, InvertConfig
from pipeline.worker import MEMORY_SHARE, that_fit
from tasks.report.words import size as in_words
from tasks.work.probe import ProbeResult

SHARD_S, LEAST_S = 120.0, 10.0
"""Of a worker's time in a shard: at most, so that little is lost with it; at least, so that files
and commits are few."""
LARGEST_SHARD = 4096
TURNS = 4
"""Shards for each place at a worker, so that few wait at the end."""
CONTAINER = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a run should have: the settings, and where they are "auto" what was chosen.

    Attributes:
        why: the batch is smaller than what was tried; empty where it is not.
    """

    batch: int
    shard_size: int
    workers: int
    why: str = ""


def choose(
    measured: ProbeResult, seconds: float, config: InvertConfig, *, images: int, places: int
) -> Sizes:
    """Sizes for this machine, from what one of its workers has measured.

    As many workers as there can be. Of batches, the one that was tried or the largest half of it
    with which they fit into memory, and report twice within `engine.shard_timeout_s`.

    Args:
        seconds: of a worker for a picture.
        places: workers that there are devices for.
    """
    engine, room = config.engine, room_for_workers(measured.device, config.engine)
    tried, why = measured.batch, ""
    halves = [tried >> n for n in range(tried.bit_length())] if config.job.batch == "auto" else []
    need = {size: memory_with(measured, size) for size in halves or [tried]}
    workers = places
    if engine.actors == "auto":
        workers = that_fit(places, room, min(need.values()))
    fit = [size for size in need if workers * need[size] <= MEMORY_SHARE * room]
    batch = max(fit, default=min(need))
    if batch < tried:
        why = f"{tried} would need {in_words(need[tried])} a worker"
    while batch > 1 and halves and 2 * batch_s(batch, seconds, engine) > engine.shard_timeout_s:
        batch, why = batch // 2, f"{batch} would not be done twice within engine.shard_timeout_s"
    shard_size = engine.shard_size
    if shard_size == "auto":
        in_flight = shards_in_flight(engine)
        fair = images / (workers * in_flight * TURNS)
        most = min(SHARD_S / seconds, max(fair, LEAST_S / seconds), LARGEST_SHARD)
        shard_size = max(batch, 2 ** math.floor(math.log2(max(most, 1))))
        spare, least = MEMORY_SHARE * room / workers, max(batch, measured.rows_held // in_flight)
        while shard_size > least and memory_with(measured, batch, shard_size * in_flight) > spare:
            shard_size //= 2
    return Sizes(batch=batch, shard_size=shard_size, workers=workers, why=why)


def memory_with(measured: ProbeResult, batch: int, rows: int = 0) -> int:
    """Bytes of a worker with another batch: what is loaded, and a share for each picture of it;
    with more rows at work at once than were tried also these, until they are committed."""
    grown = measured.memory_bytes - measured.loaded_bytes
    more = max(rows - measured.rows_held, 0) * measured.row_bytes
    return round(measured.loaded_bytes + grown * batch / measured.batch + more)


def batch_s(batch: int, seconds: float, engine: EngineConfig) -> float:
    """Between two signs of progress of a shard, whose worker has others in flight."""
    return batch * seconds * shards_in_flight(engine)


def shards_in_flight(engine: EngineConfig) -> int:
    """Of one worker."""
    return 1 if engine.kind == "inline" else engine.shards_in_flight


def room_for_workers(device: str, engine: EngineConfig) -> int:
    """Bytes for all of this machine's workers together: on GPUs theirs, else `engine.memory_gb`, or
    what the machine has and its container may use."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info()[1] * torch.cuda.device_count()
    if engine.memory_gb != "auto":
        return round(engine.memory_gb * 1e9)
    limits = [Path(name).read_text().strip() for name in CONTAINER if Path(name).exists()]
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([machine, *(int(limit) for limit in limits if limit.isdigit())])
