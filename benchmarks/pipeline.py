"""What ledger, Ray and the pool cost: the pipeline beside bare loops over the same pictures.

Run: python -m benchmarks.pipeline [--data DIR] [--limit 512] [--rounds 5] [--engines inline ray]

The bare loops are as many processes of one thread as the pipeline has actors. They read the same
shards, decode, hash, invert with e4e, score and encode as it does, and keep nothing: no ledger, no
Parquet, no checksums of parts, no Ray. Rounds alternate. Start-up is outside both clocks and stated
beside. Both have as many cores as there are workers: on a further one the pipeline's threads would
gain time by the clock, and slow down the core beside them. The ratio of CPU time holds on a loaded
machine too, the one of wall time on an idle one.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from benchmarks.cpu_meter import CpuMeter
from pipeline.config import InvertConfig, load_config
from pipeline.run import plan, run
from pipeline.tally import TallySnapshot
from tasks.benchmark.machine import describe_machine
from tasks.input.plan import plan_shards
from tasks.input.read import RawSample, read_shard
from tasks.job import ShardSpec
from tasks.run.ledger import read_markers
from tasks.work.invert import Inverter
from tasks.work.station import Batch, fill_row

ENGINES = ("inline", "ray")
IMAGES = 512
POLL_S = 2.0
"""Of the processes of a run, which live as long as it does: a look takes time of their cores."""
STARTED = 40
"""Pictures of the run whose start-up is measured."""


def default_data() -> Path:
    """faces/train64 of the shared data."""
    shared = Path(os.environ.get("REFINERY_SHARED", Path(__file__).parents[2] / "shared"))
    return shared / "data" / "faces"


def prepare_input(folder: Path, target: Path) -> str:
    """A prefix with the train64 files alone (the folder holds other sizes too)."""
    for path in sorted(folder.glob("train64-*.parquet")):
        (target / path.name).symlink_to(path.resolve())
    return str(target)


def _batches(samples: Iterator[RawSample], size: int) -> Iterator[list[RawSample]]:
    while batch := list(islice(samples, size)):
        yield batch


def _bare_loop(shards: Sequence[ShardSpec], config: InvertConfig, start: Any, found: Any) -> None:
    """Puts pictures done, when it began and ended, and CPU seconds."""
    job = config.job
    inverter = Inverter(job, "cpu", threads=1)
    start.wait()
    done, started, spent = 0, time.monotonic(), time.process_time()
    for shard in shards:
        for samples in _batches(read_shard(shard, job.input), job.batch):
            pairs = chain.from_iterable(map(inverter.decode, samples))
            good = [(row, picture) for row, picture in pairs if picture is not None]
            batch = Batch(
                keys=[row.sample_key for row, _ in good],
                rows=[row for row, _ in good],
                inputs=np.stack([picture for _, picture in good]),
            )
            result = inverter.work(batch)
            for at in range(len(batch)):
                fill_row(batch, result, inverter, at)
            done += len(batch)
    found.put((done, started, time.monotonic(), time.process_time() - spent))


def bare_loops(source: str, config: InvertConfig, limit: int, count: int) -> dict[str, float]:
    """The same work in `count` processes without ledger, Ray and Prefect."""
    shards = list(plan_shards(source, config.engine.shard_size, limit, config.job.input))
    context = multiprocessing.get_context("spawn")
    start, found = context.Barrier(count), context.Queue()
    parts = [shards[number::count] for number in range(count)]
    workers = [
        context.Process(target=_bare_loop, args=(part, config, start, found)) for part in parts
    ]
    for worker in workers:
        worker.start()
    results = [found.get() for _ in workers]
    for worker in workers:
        worker.join()
    done, began, ended, spent = zip(*results, strict=True)
    return _rates(sum(done), max(ended) - min(began), sum(spent))


def _rates(images: int, wall_s: float, cpu_s: float) -> dict[str, float]:
    return {"images": images, "images_per_s": images / wall_s, "images_per_cpu_s": images / cpu_s}


def pipeline_run(source: str, config: InvertConfig, limit: int, out: str) -> dict[str, Any]:
    """One run of the engine; both its clocks start when the first worker is ready."""
    plan(source, out, config, limit=limit)
    begun: list[float] = []
    ended = 0.0
    with CpuMeter(os.getpid(), POLL_S) as meter:

        def listen(snapshot: TallySnapshot) -> None:
            nonlocal ended
            if snapshot.seconds > 0 and not begun:
                begun.append(meter.seconds())
            if snapshot.shards_done == snapshot.shards_total and not ended:
                ended = meter.seconds()

        outcome = run(out, config.engine, listen)
    stages = dict.fromkeys(Inverter.stages, 0.0)
    for marker in read_markers(out).values():
        for stage in Inverter.stages:
            stages[stage] += marker.seconds[stage]
    return {
        **_rates(outcome.rows_now, outcome.seconds, ended - begun[0]),
        "failed": outcome.failed,
        "startup_s": outcome.startup_s,
        "stage_seconds": {stage: round(value, 2) for stage, value in stages.items()},
    }


@contextmanager
def on_cores(count: int) -> Iterator[None]:
    """This process and its children have so many cores, where the system can say it (Linux)."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def start_up(data: Path, folder: Path, engine: str) -> dict[str, float]:
    """Wall and CPU seconds of `refinery invert` of 40 pictures, from nothing to the report."""
    source = folder / f"{engine}-few"
    source.mkdir()
    first = min(data.glob("train64-*.parquet"))
    pq.write_table(pq.read_table(first).slice(0, STARTED), source / first.name)  # type: ignore[reportUnknownMemberType]
    command = ["invert", str(source), f"{source}-run", "--method", "e4e"]
    command += ["--engine", engine, "--no-flow"]
    started = time.monotonic()
    done = subprocess.Popen(
        [sys.executable, "-m", "pipeline.cli", *command], stdout=subprocess.DEVNULL
    )
    with CpuMeter(done.pid) as meter:
        code = done.wait()
        spent = meter.seconds()
    if code:
        raise RuntimeError(f"refinery {' '.join(command)}: exit code {code}")
    return {"wall_s": time.monotonic() - started, "cpu_s": spent}


def compare(
    data: Path, limit: int, rounds: int, engines: Sequence[str] = ENGINES
) -> dict[str, Any]:
    """Interleaved rounds of both, by engine; medians, and the medians of each round's ratios."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "in").mkdir()
        source = prepare_input(data, folder / "in")
        for engine in engines:
            sets = [f"engine.kind={engine}", "engine.shard_size=64", "batch=16"]
            config = load_config(None, sets, ["e4e"])
            cores = max((os.cpu_count() or 1) // config.engine.threads, 1)
            count = 1 if engine == "inline" else cores
            bare: list[dict[str, float]] = []
            pipeline: list[dict[str, Any]] = []
            for index in range(rounds):
                out = str(folder / f"{engine}-{index}")
                with on_cores(count):
                    bare.append(bare_loops(source, config, limit, count))
                    pipeline.append(pipeline_run(source, config, limit, out))
            found[engine] = _compared(pipeline, bare) | {
                "workers": count,
                "start_up": start_up(data, folder, engine),
            }
    return {"machine": describe_machine(), "images": limit, "rounds": rounds, "engines": found}


def _compared(
    pipeline: Sequence[dict[str, Any]], bare: Sequence[dict[str, float]]
) -> dict[str, Any]:
    def ratio(key: str) -> float:
        pairs = zip(pipeline, bare, strict=True)
        return statistics.median(run[key] / loop[key] for run, loop in pairs)

    return {
        "bare_images_per_s": statistics.median(loop["images_per_s"] for loop in bare),
        "pipeline_images_per_s": statistics.median(run["images_per_s"] for run in pipeline),
        "pipeline / bare": ratio("images_per_s"),
        "pipeline / bare, CPU": ratio("images_per_cpu_s"),
        "last_round": pipeline[-1],
    }


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=default_data())
    parser.add_argument("--limit", type=int, default=IMAGES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    args = parser.parse_args()
    found = compare(args.data, args.limit, args.rounds, args.engines)
    sys.stdout.write(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
