"""What a run will take, before it starts: counts from a listing, time and size from a probe."""

import logging
import math
import os
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from statistics import fmean

from rich.table import Table

from models.checkpoints.load import load_generator
from models.errors import ShardError
from pipeline.config import EngineConfig, InvertConfig
from pipeline.progress import duration
from pipeline.run import auto_shard_size, local_device
from pipeline.screen import pairs
from pipeline.worker import that_fit
from tasks.input.plan import in_words
from tasks.input.read import read_shard
from tasks.job import InputConfig, ShardSpec
from tasks.report.words import size
from tasks.run.manifest import plan_shards, read_shard_size
from tasks.run.prediction import Prediction, write_prediction
from tasks.run.run_json import find_run, utc_now
from tasks.work.device import local_copy
from tasks.work.invert import Inverter
from tasks.work.probe import ProbeResult, probe

logger = logging.getLogger(__name__)

MANY = 1000
"""Shards for each place, of which the last ones do not count."""
SAMPLED, TRIED = 64, 8
"""Pictures of the first tar that can be read, of so many, whose mean size stands for all, where
only reading would count them."""


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What an input holds.

    Attributes:
        num_images: counted, or estimated from sizes where `is_counted` is False (tars).
        num_bytes: encoded.
        skipped: files that are in no shard, by reason.
        sizes: images of each shard; estimated likewise.
    """

    kinds: dict[str, int]
    num_shards: int
    num_images: int
    num_bytes: int
    is_counted: bool
    skipped: dict[str, int]
    sizes: tuple[float, ...]


def list_input(source: str, shard_size: int, limit: int | None, settings: InputConfig) -> Listing:
    """Plan the shards without keeping or writing them.

    Raises:
        ConfigError, ShardError: the input is missing, empty or cannot be listed.
    """
    kinds: Counter[str] = Counter()
    num_bytes = 0
    sizes: list[float] = []
    uncounted: list[ShardSpec] = []
    shards = plan_shards(source, shard_size, limit, settings)
    for spec in shards:
        kinds[spec.kind] += 1
        num_bytes += spec.num_bytes
        sizes.append(spec.num_samples if spec.num_samples >= 0 else -spec.num_bytes)
        if spec.num_samples < 0:
            uncounted += [spec] if len(uncounted) < TRIED else []
    if uncounted:
        mean_bytes = max(_mean_bytes(uncounted, settings), 1)
        sizes = [rows if rows >= 0 else -rows / mean_bytes for rows in sizes]
    return Listing(
        kinds=dict(kinds),
        num_shards=kinds.total(),
        num_images=round(sum(sizes)),
        num_bytes=num_bytes,
        is_counted=not uncounted,
        skipped=dict(shards.skipped),
        sizes=tuple(sizes),
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


def estimate(
    source: str,
    config: InvertConfig,
    *,
    limit: int | None,
    count: int | None,
    output: str | None = None,
    price: float | None = None,
) -> Table:
    """The table of `refinery plan`.

    Args:
        limit: only the first samples.
        count: pictures to invert for the estimate of time and size, 0 for none; None leaves it to
            `probe`.
        output: the run that is planned; it gets the prediction.
        price: of a worker's hour.

    Raises:
        RefineryError: the input cannot be listed, or the probe fails.
    """
    job, shard_size = config.job, config.engine.shard_size
    station = None if count == 0 else Inverter(job, local_device())
    if shard_size == "auto" and output is not None and find_run(output):
        shard_size = read_shard_size(output)
    elif shard_size == "auto":
        generator = station.generator if station else load_generator(local_copy(job.generator))
        shard_size = auto_shard_size(generator.resolution)
    found = list_input(source, shard_size, limit, job.input)
    about = "" if found.is_counted else "about "
    kinds = ", ".join(f"{kind} {number}" for kind, number in found.kinds.items())
    values = {
        "input": source,
        "shards": f"{found.num_shards} ({kinds}), {shard_size} images each at most",
        "images": f"{about}{found.num_images}",
        "bytes": size(found.num_bytes),
        "skipped": in_words(found.skipped) or "nothing",
        "methods": " then ".join(link.name for link in job.methods),
    }
    if station is not None:
        results, workers = _probed(source, station, config.engine, found, count, shard_size)
        made = _prediction(results, workers, found, config.engine)
        values |= _measured(results, made, found, config.engine)
        if price is not None:
            values["cost"] = f"{made.seconds / 3600 * workers * price:.2f} at {price:g} an hour"
        if output is not None:
            write_prediction(output, made)
    return pairs("", values)


def _probed(
    source: str,
    station: Inverter,
    engine: EngineConfig,
    found: Listing,
    count: int | None,
    shard_size: int,
) -> tuple[list[ProbeResult], int]:
    """What workers measure side by side, as many as a run would have here, and their number."""
    job, device = station.asked, local_device()
    wanted = _places(device, engine)
    room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if device == "cpu" and engine.actors == "auto":
        wanted = that_fit(wanted, room, station.worker_bytes)
    wanted = min(wanted, found.num_shards)
    if wanted == 1 or device != "cpu":
        return [probe(job, source, count, device, shard_size, inverter=station)], wanted
    with ProcessPoolExecutor(wanted, get_context("spawn")) as pool:
        each = (probe, job, source, count, device, shard_size)
        asked = [pool.submit(*each) for _ in range(wanted)]
        return [each.result() for each in asked], wanted


def _places(device: str, engine: EngineConfig) -> int:
    """Workers that a run would have on this machine."""
    if engine.kind == "inline":
        return 1
    if engine.actors != "auto":
        return engine.actors
    if engine.address:  # the size of a cluster is not known here
        return 1
    if device == "cpu":
        return max(len(os.sched_getaffinity(0)) // engine.threads, 1)
    import torch

    return torch.cuda.device_count()


def _prediction(
    results: Sequence[ProbeResult], workers: int, found: Listing, engine: EngineConfig
) -> Prediction:
    mean_s = fmean(_seconds_an_image(result) for result in results)
    in_flight = 1 if engine.kind == "inline" else engine.shards_in_flight
    return Prediction(
        made_by="refinery plan",
        rows=found.num_images,
        seconds=mean_s * busiest(found.sizes, workers, in_flight),
        bytes=round(fmean(result.bytes_per_image for result in results) * found.num_images),
        memory_bytes=max(result.memory_bytes for result in results),
        workers=workers,
        made_at=utc_now(),
    )


def busiest(sizes: Sequence[float], workers: int, in_flight: int) -> float:
    """Images in whose time all are done: a share of them, and at the end some workers wait. A
    worker's shards in flight share its pace, and a worker takes as many as it may at once."""
    if len(sizes) > MANY * workers * in_flight:
        return sum(sizes) / workers
    queue, passed = deque(size for size in sizes if size > 0), 0.0
    held: list[list[float]] = [[] for _ in range(workers)]
    while True:
        for mine in held:
            while queue and len(mine) < in_flight:
                mine.append(queue.popleft())
        at_work = [mine for mine in held if mine]
        if not at_work:
            return passed
        step = min(min(mine) * len(mine) for mine in at_work)
        passed += step
        for mine in at_work:
            done = step / len(mine)
            mine[:] = [left - done for left in mine if left - done > 1e-6]


def _seconds_an_image(result: ProbeResult) -> float:
    """Of one worker. With shards in flight reading, decoding and writing hide behind a GPU."""
    paces = result.images_per_s
    if result.device == "cpu":
        return 1 / paces["total"]
    return 1 / paces["invert"] + 1 / paces["score"]


def _measured(
    results: Sequence[ProbeResult], made: Prediction, found: Listing, engine: EngineConfig
) -> dict[str, str]:
    first, workers = results[0], made.workers
    mean_s = fmean(_seconds_an_image(result) for result in results)
    speeds = ", ".join(f"{stage} {pace:.3g}" for stage, pace in first.images_per_s.items())
    unit = "CPU-core hours" if first.device == "cpu" else "GPU hours"
    together = "" if len(results) == 1 else f", {len(results)} workers at once"
    warning = _timeout_warning(first, engine)
    return {
        "probe": f"{first.num_images} images on {first.device}, {first.num_failed} failed"
        + together,
        "batch": f"{first.batch}",
        "images/s": f"{speeds} (one worker)",
        "work": f"{_hours(mean_s * found.num_images)} {unit}",
        "time": f"{duration(math.ceil(made.seconds))} on {workers} "
        f"{'worker' if workers == 1 else 'workers'}, start-up not included",
        "memory": f"{size(made.memory_bytes)} a worker, {size(made.memory_bytes * workers)} "
        "together",
        "output": f"{size(made.bytes)} ({size(made.bytes / max(found.num_images, 1))} an image)",
        **({"warning": warning} if warning else {}),
    }


def _timeout_warning(result: ProbeResult, engine: EngineConfig) -> str | None:
    """What to change where a batch would not be done in time, beside other shards' in flight."""
    needed_s = result.batch * _seconds_an_image(result) * engine.shards_in_flight
    if needed_s <= engine.shard_timeout_s:
        return None
    return (
        f"a batch of {result.batch} images takes about {duration(math.ceil(needed_s))} with "
        f"{engine.shards_in_flight} shards in flight, and its worker would be restarted after "
        f"{duration(math.ceil(engine.shard_timeout_s))}. Set engine.shard_timeout_s to at least "
        f"{math.ceil(2 * needed_s)}, or make batches smaller (batch)"
    )


def _hours(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours:.4f}" if hours < 0.1 else f"{hours:.1f}"
