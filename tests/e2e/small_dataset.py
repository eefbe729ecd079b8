"""A dataset that a run of milliseconds inverts, and what is compared between runs of it."""

import os
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from models.checkpoints.native import save_generator
from models.stylegan2.generator import Generator
from pipeline.config import RunConfig, load_config, load_stored_config
from pipeline.edit import Wishes, load_edit_config
from pipeline.run import Summary, carry_out
from tasks.edit_job import EditJobConfig
from tasks.input.align import FACE_POINTS
from tasks.run.ledger import read_markers
from tasks.run.query import query

NUM_SHARDS = 6
SHARD_SIZE = 2
CONFIG = """\
generator = "{generator}"
perceptual = "none"
batch = 2

[[method]]
name = "wplus"
steps = 1
perceptual = "none"

[engine]
shard_size = {shard_size}
retry_wait_s = 0.1
"""


@dataclass(frozen=True)
class Dataset:
    """Loose pictures (one of them broken) and the config of a run over them."""

    source: str
    config: str


def write_dataset(folder: Path, generator: Generator, pictures: list[bytes]) -> Dataset:
    """Six shards of two samples; the last sample cannot be decoded."""
    source = folder / "pictures"
    source.mkdir(parents=True)
    for index in range(NUM_SHARDS * SHARD_SIZE - 1):
        (source / f"face-{index:02d}.png").write_bytes(pictures[index % len(pictures)])
    (source / "zz-broken.png").write_bytes(b"\x89PNG not a picture")
    path = save_generator(generator, folder / "tiny.safetensors", {"terms": "test"})
    config = folder / "config.toml"
    config.write_text(CONFIG.format(generator=path, shard_size=SHARD_SIZE))
    return Dataset(str(source), str(config))


def write_tars(folder: Path, pictures: list[bytes]) -> Path:
    """good.tar with three pictures, and bad.tar, which ends in the middle."""
    folder.mkdir()
    for name in ("good", "bad"):
        with tarfile.open(folder / f"{name}.tar", "w") as archive:
            for index, data in enumerate(pictures[:3]):
                path = folder / f"{name}-{index}.png"
                path.write_bytes(data)
                archive.add(path, path.name)
                path.unlink()
    bad = folder / "bad.tar"
    bad.write_bytes(bad.read_bytes()[:700])
    return folder


def run_inline(dataset: Dataset, out: str, *sets: str) -> Summary:
    """All stages in this process."""
    config = load_config(dataset.config, ["engine.kind=inline", *sets])
    return carry_out(dataset.source, out, config)


def edit_config(source: str, place: Path, *sets: str) -> RunConfig[EditJobConfig]:
    """A direction twice and a domain, as they lie at `place`."""
    wishes = Wishes(
        edits=[f"{place}/turn.json=-1:1:2"], domains=[f"{place}/oil"], strength=0.7, is_each=True
    )
    plain = ["perceptual=none", "attributes=none", "batch=2", "engine.retry_wait_s=0.1"]
    return load_edit_config(source, None, [*plain, *sets], wishes)


def rescore_inline(source: str, out: str, *sets: str) -> Summary:
    """Scores of another run, all stages in this process."""
    plain = ["perceptual=none", "batch=2", "engine.kind=inline", "engine.retry_wait_s=0.1"]
    return carry_out(source, out, load_stored_config("rescore", source, None, [*plain, *sets]))


def index_inline(source: str, out: str, *sets: str) -> Summary:
    """An index of another run, all stages in this process."""
    plain = ["batch=2", "engine.kind=inline", "engine.retry_wait_s=0.1"]
    return carry_out(source, out, load_stored_config("index", source, None, [*plain, *sets]))


def find_face(picture: np.ndarray) -> list[tuple[float, float]]:
    """A detector: a face of half the picture's size in its middle."""
    return [(0.25 + x / 2, 0.25 + y / 2) for x, y in FACE_POINTS]


def run_aligned(dataset: Dataset, out: str) -> Summary:
    """Inversions that know where in their pictures they are."""
    detector = f"{__name__}:find_face"
    sets = ["input.fit=align", "input.template=face", f"input.detector={detector}"]
    return run_inline(dataset, out, *sets)


def compose_inline(source: str, out: str) -> Summary:
    """The inversions of an aligned run back in their pictures, all stages in this process."""
    plain = ["batch=2", "engine.kind=inline", "engine.retry_wait_s=0.1"]
    return carry_out(source, out, load_stored_config("compose", source, None, plain))


def run_kind(kind: str, dataset: Dataset, source: str, place: Path, out: str) -> Summary:
    """A job of each kind: over the dataset, or over its finished run `source`."""
    if kind == "invert":
        return run_inline(dataset, out)
    if kind == "rescore":
        return rescore_inline(source, out)
    if kind == "index":
        return index_inline(source, out)
    if kind == "compose":
        return compose_inline(str(place / "aligned"), out)
    return carry_out(source, out, edit_config(source, place, "engine.kind=inline"))


def crash_kind(crash: str, *job: Any) -> None:
    """The body of a driver process that is to die at a crash point."""
    os.environ["REFINERY_CRASH"] = crash
    run_kind(*job)


def fingerprint(run_uri: str) -> dict[int, dict[str, str]]:
    """sha256 of every committed part, by shard and kind."""
    return {
        shard: {kind: part.sha256 for kind, part in sorted(marker.parts.items())}
        for shard, marker in read_markers(run_uri).items()
    }


def rows(run_uri: str, without: str = "") -> pa.Table:
    """All committed rows of latents in order of keys, whatever the run's folder is called."""
    excluded = ", ".join(filter(None, ["run", without]))
    return query(run_uri, f"SELECT * EXCLUDE ({excluded}) FROM latents ORDER BY sample_key")
