"""What a run will take, before it starts: counts from a listing, time and size from a probe."""

import importlib
import logging
import math
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import islice
from multiprocessing import get_context
from statistics import fmean
from threading import BrokenBarrierError
from typing import TYPE_CHECKING

from rich.table import Table

from models.checkpoints.load import load_generator
from models.errors import RefineryError, ShardError
from pipeline.config import EngineConfig, InvertConfig
from pipeline.progress import duration
from pipeline.run import auto_shard_size, local_device, places, settled
from pipeline.screen import pairs
from pipeline.sizes import Sizes, batch_s, choose, memory_with, room_for_workers, shards_in_flight
from pipeline.worker import that_fit
from tasks.input.plan import in_words
from tasks.input.read import read_shard
from tasks.job import InputConfig, JobConfig, ShardSpec
from tasks.report.words import size
from tasks.run.manifest import plan_shards
from tasks.run.prediction import Prediction, settings_of, write_prediction
from tasks.run.run_json import utc_now
from tasks.work.device import local_copy
from tasks.work.invert import Inverter
from tasks.work.probe import ProbeResult, probe

if TYPE_CHECKING:
    from threading import Barrier

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
        output: the run that is planned; it gets the prediction, and the sizes that were chosen.
        price: of a worker's hour.

    Raises:
        RefineryError: the input cannot be listed, or the probe fails.
    """
    if output is not None:
        config = settled(config, output, with_chosen=count == 0)
    station = None if count == 0 else Inverter(config.job, local_device())
    shard_size = config.engine.shard_size
    if shard_size == "auto":
        name = local_copy(config.job.generator)
        generator = station.generator if station else load_generator(name)
        shard_size = auto_shard_size(generator.resolution)
    found = list_input(source, shard_size, limit, config.job.input)
    measured: dict[str, str] = {}
    if station is not None:
        results, sizes = _measure(source, config, station, found, count, shard_size)
        if sizes.shard_size != shard_size:
            shard_size = sizes.shard_size
            found = list_input(source, shard_size, limit, config.job.input)
        sizes = replace(sizes, workers=min(sizes.workers, found.num_shards))
        made = _prediction(results, sizes, found, config)
        measured = _in_words(results, made, found, config.engine, sizes.why)
        if price is not None:
            hours = made.seconds / 3600 * made.workers
            measured["cost"] = f"{hours * price:.2f} at {price:g} an hour"
        if output is not None:
            write_prediction(output, made)
    about = "" if found.is_counted else "about "
    kinds = ", ".join(f"{kind} {number}" for kind, number in found.kinds.items())
    values = {
        "input": source,
        "shards": f"{found.num_shards} ({kinds}), {shard_size} images each at most",
        "images": f"{about}{found.num_images}",
        "bytes": size(found.num_bytes),
        "skipped": in_words(found.skipped) or "nothing",
        "methods": " then ".join(link.name for link in config.job.methods),
    }
    return pairs("", values | measured)


def _measure(
    source: str,
    config: InvertConfig,
    loaded: Inverter,
    found: Listing,
    count: int | None,
    shard_size: int,
) -> tuple[list[ProbeResult], Sizes]:
    """What workers measure side by side, and the sizes that follow. Where those are others than
    were tried, they are tried too: what is said is what was measured."""
    job, device, engine = config.job, local_device(), config.engine
    station: Inverter | None = loaded
    most = places(device, engine)
    if engine.shard_size != "auto" or found.kinds.keys() == {"tar"}:
        most = min(most, found.num_shards)
    workers = most
    if device == "cpu" and engine.actors == "auto":
        workers = that_fit(most, room_for_workers(device, engine), loaded.worker_bytes)
    batch, why = loaded.job.batch, ""
    while True:
        tried = _Tried(source, replace(job, batch=batch), count, device, shard_size, engine)
        try:
            results = _side_by_side(tried, workers, station)
        except BrokenProcessPool as error:
            if batch == 1 or job.batch != "auto":
                raise RefineryError(
                    f"a worker died while it measured batches of {batch} (out of memory?); set "
                    "batch or engine.actors to less"
                ) from error
            batch, station, why = batch // 2, None, f"a worker died with {batch}"
            continue
        largest = max(results, key=lambda result: result.memory_bytes)
        mean_s = fmean(_seconds_an_image(result) for result in results)
        sizes = choose(largest, mean_s, config, images=found.num_images, places=most)
        why = sizes.why or why
        if sizes.batch == batch and sizes.workers <= workers:
            return results, replace(sizes, why=why)
        batch, workers, station = sizes.batch, sizes.workers, None


@dataclass(frozen=True)
class _Tried:
    """What a probe is asked for."""

    source: str
    job: JobConfig
    count: int | None
    device: str
    shard_size: int
    engine: EngineConfig


_together: "Barrier | None" = None
"""Of this process and the others that measure beside it."""


def _meet(barrier: "Barrier") -> None:
    global _together
    _together = barrier


def _probe(tried: _Tried, station: Inverter | None = None) -> ProbeResult:
    if tried.engine.kind == "ray":
        importlib.import_module("pipeline.actor")  # what a worker has in memory, too
    return probe(
        tried.job,
        tried.source,
        tried.count,
        tried.device,
        tried.shard_size,
        in_flight=shards_in_flight(tried.engine),
        inverter=station,
        on_warm=_together.wait if _together else lambda: None,
    )


def _side_by_side(tried: _Tried, workers: int, station: Inverter | None) -> list[ProbeResult]:
    """One worker in this process, where its models are loaded; several, or one with other batches
    than were tried here, in processes of their own, which begin together when all are warm. Workers
    with a GPU each do not meet: one stands for all."""
    workers = workers if tried.device == "cpu" else 1
    if station is not None and workers == 1:
        return [_probe(tried, station)]
    context = get_context("spawn")
    barrier = context.Barrier(workers)
    with ProcessPoolExecutor(workers, context, _meet, (barrier,)) as pool:
        asked = [pool.submit(_probe, tried) for _ in range(workers)]
        for each in asked:  # the others would wait for one that fails
            each.add_done_callback(lambda done: done.exception() and barrier.abort())
        wait(asked)
        asked.sort(key=lambda each: isinstance(each.exception(), BrokenBarrierError))
        return [each.result() for each in asked]


def _prediction(
    results: Sequence[ProbeResult], sizes: Sizes, found: Listing, config: InvertConfig
) -> Prediction:
    mean_s = fmean(_seconds_an_image(result) for result in results)
    in_flight = shards_in_flight(config.engine)
    busy = busiest(found.sizes, sizes.workers, in_flight)
    held = round(max(found.sizes, default=0)) * in_flight
    return Prediction(
        made_by="refinery plan",
        rows=found.num_images,
        seconds=mean_s * busy + max(result.warm_up_s for result in results),
        bytes=round(fmean(result.bytes_per_image for result in results) * found.num_images),
        memory_bytes=max(memory_with(result, result.batch, held) for result in results),
        workers=sizes.workers,
        made_at=utc_now(),
        batch=sizes.batch,
        shard_size=sizes.shard_size,
        settings=settings_of(config.job),
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


def _in_words(
    results: Sequence[ProbeResult],
    made: Prediction,
    found: Listing,
    engine: EngineConfig,
    why: str,
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
        "batch": f"{made.batch}" + (f" ({why})" if why else ""),
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
    needed_s = batch_s(result.batch, _seconds_an_image(result), engine)
    if needed_s <= engine.shard_timeout_s:
        return None
    return (
        f"a batch of {result.batch} images takes about {duration(math.ceil(needed_s))} with "
        f"{shards_in_flight(engine)} shards in flight, and its worker would be restarted after "
        f"{duration(math.ceil(engine.shard_timeout_s))}. Set engine.shard_timeout_s to at least "
        f"{math.ceil(2 * needed_s)}, or make batches smaller (batch)"
    )


def _hours(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours:.4f}" if hours < 0.1 else f"{hours:.1f}"
