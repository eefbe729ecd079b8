"""A complete small run: tiny generator on disk, a handful of pictures, two shards."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from models.checkpoints.native import save_generator
from models.stylegan2.generator import Generator
from tasks.job import JobConfig, MethodConfig, OutputConfig
from tasks.run.ledger import pending, shard_name
from tasks.run.manifest import plan_shards, read_shard_spec, write_manifest
from tasks.run.marker import Marker
from tasks.run.run_json import Declared, RunHandle, create_run
from tasks.storage.files import join, write_bytes
from tasks.work.invert import Inverter
from tasks.work.shard import do_shard

DECLARED = Declared(
    kind="invert",
    stages=Inverter.stages,
    stores_doors=True,
    method="e4e+wplus",
    metrics=("mse",),
    pictures=("input", "inversion"),
)
"""What a run of inversions says of itself, for tests that make one by hand."""
BROKEN = b"\x89PNG not a picture"


def make_job(generator: Generator, folder: Path, **changes: Any) -> JobConfig:
    """Two steps of wplus on a generator saved to `folder`, MSE only."""
    path = save_generator(generator, folder / "tiny.safetensors", {"terms": "test"})
    settings = {"steps": 2, "perceptual": "none"}
    values: dict[str, Any] = {
        "generator": str(path),
        "methods": (MethodConfig(name="wplus", settings=settings),),
        "batch": 3,
        "perceptual": "none",
    }
    return JobConfig(**{**values, **changes})


def make_noise_job(generator: Generator, folder: Path, **output: Any) -> JobConfig:
    """The same with noise maps, which are stored."""
    settings = {"steps": 2, "perceptual": "none", "optimise_noise": True}
    methods = (MethodConfig(name="wplus", settings=settings),)
    return make_job(generator, folder, methods=methods, output=OutputConfig(**output))


def write_pictures(folder: Path, pictures: list[bytes], broken: int = 1) -> Path:
    """Loose files face-0.png ..., and `broken` unreadable ones, zz-0.png ..., which sort last."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, data in enumerate(pictures):
        (folder / f"face-{index}.png").write_bytes(data)
    for index in range(broken):
        (folder / f"zz-{index}.png").write_bytes(BROKEN)
    return folder


def write_picture_table(path: Path, pictures: list[bytes | None], keys: list[str]) -> Path:
    """A Parquet input with an `image` struct and an `id` column."""
    images = [{"bytes": data, "path": None} for data in pictures]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"id": keys, "image": pa.array(images, kind)}), path)
    return path


@dataclass
class SmallRun:
    """A run that was begun; `finish` does its shards."""

    job: JobConfig
    handle: RunHandle
    inverter: Inverter

    @property
    def uri(self) -> str:
        return self.handle.uri

    def run(self, shard: int, **options: Any) -> Marker:
        spec = read_shard_spec(self.uri, shard)
        return do_shard(spec, self.handle, self.inverter, **options)

    def finish(self) -> "SmallRun":
        for shard in pending(self.uri):
            self.run(shard)
        return self


def begin(
    run_uri: str, input_uri: str, job: JobConfig, inverter: Inverter, shard_size: int = 5
) -> SmallRun:
    """Plan, write the manifest and run.json."""
    info = write_manifest(run_uri, plan_shards(str(input_uri), shard_size, None, job.input))
    handle = create_run(run_uri, job, info, inverter.hashes, "1.2.3", inverter.declared)
    return SmallRun(job=job, handle=handle, inverter=inverter)


def put_marker(run_uri: str, marker: Marker) -> None:
    """Write a marker over the one that is there, as no worker does."""
    write_bytes(join(run_uri, "commits", f"{shard_name(marker.shard)}.json"), marker.to_json())


def part_bytes(run_path: Path) -> dict[str, str]:
    """sha256 of every part file by kind and shard, attempts left out of the name."""
    return {
        f"{path.parent.name}/{path.name.split('-')[0]}": hashlib.sha256(
            path.read_bytes()
        ).hexdigest()
        for kind in ("latents", "images", "residuals")
        for path in sorted((run_path / kind).glob("*.parquet"))
    }
