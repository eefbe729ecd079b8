"""What ledger, Ray and the pool cost: the pipeline beside a bare loop over the same pictures.

Run: python -m benchmarks.pipeline [--data DIR] [--limit 4990] [--rounds 3]

The bare loop is one process with every core: it reads the Parquet file, decodes, inverts with e4e
and scores, and keeps nothing. The pipeline does the same through `pipeline.run` on a local Ray,
with pictures, codes, checksums and commit markers written. Rounds alternate. Start-up (loading
torch, Ray and the models) is outside both clocks and stated.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch

from models.errors import SampleError
from pipeline.config import InvertConfig, load_config
from pipeline.run import plan, run
from tasks.benchmark.machine import describe_machine
from tasks.input.decode import decode
from tasks.input.read import RawSample, read_shard
from tasks.run.ledger import read_markers
from tasks.run.manifest import plan_shards
from tasks.work.invert import Inverter


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


def bare_loop(source: str, config: InvertConfig, limit: int) -> tuple[int, float]:
    """Pictures done and seconds, without ledger, Ray and Prefect."""
    job = config.job
    inverter = Inverter(job, "cpu", threads=os.cpu_count() or 1)
    resolution = inverter.generator.resolution
    shards = list(plan_shards(source, config.engine.shard_size, limit, job.input))
    done, started = 0, time.perf_counter()
    for shard in shards:
        for samples in _batches(read_shard(shard, job.input), job.batch):
            keys, pictures = [], []
            for sample in samples:
                try:
                    pictures.append(decode(sample, job.input, resolution))
                    keys.append(sample.key)
                except SampleError:
                    continue
            inverter.invert(torch.stack([torch.from_numpy(p) for p in pictures]).numpy(), keys)
            done += len(keys)
    return done, time.perf_counter() - started


def pipeline_run(source: str, config: InvertConfig, limit: int, out: str) -> dict[str, object]:
    """One run of the engine; its own clock starts when the first worker is ready."""
    plan(source, out, config, limit=limit)
    outcome = run(out, config.engine)
    stages = dict.fromkeys(Inverter.stages, 0.0)
    for marker in read_markers(out).values():
        for stage in Inverter.stages:
            stages[stage] += marker.seconds[stage]
    return {
        "images": outcome.rows_now,
        "failed": outcome.failed,
        "seconds": outcome.seconds,
        "startup_s": outcome.startup_s,
        "stage_seconds": {stage: round(value, 2) for stage, value in stages.items()},
    }


def compare(data: Path, limit: int, rounds: int) -> dict[str, object]:
    """Interleaved rounds of both; medians and their ratio."""
    config = load_config(None, [], ["e4e"])
    bare: list[float] = []
    pipeline: list[float] = []
    last: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        source_folder = Path(folder) / "in"
        source_folder.mkdir()
        source = prepare_input(data, source_folder)
        for index in range(rounds):
            done, seconds = bare_loop(source, config, limit)
            bare.append(done / seconds)
            last = pipeline_run(source, config, limit, str(Path(folder) / f"run-{index}"))
            pipeline.append(float(last["images"]) / float(last["seconds"]))  # type: ignore[arg-type]
    return {
        "machine": describe_machine(),
        "images": limit,
        "rounds": rounds,
        "bare_images_per_s": statistics.median(bare),
        "pipeline_images_per_s": statistics.median(pipeline),
        "pipeline / bare": statistics.median(pipeline) / statistics.median(bare),
        "last_round": last,
    }


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=default_data())
    parser.add_argument("--limit", type=int, default=4990)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    sys.stdout.write(json.dumps(compare(args.data, args.limit, args.rounds), indent=2) + "\n")


if __name__ == "__main__":
    main()
