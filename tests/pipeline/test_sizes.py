"""What is stored of pictures, and how many are worked on at once, by resolution."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models.checkpoints.native import save_generator
from models.stylegan2.generator import Generator, GeneratorArchitecture
from pipeline import progress
from pipeline import run as stages
from pipeline.cli import run_app
from pipeline.config import EngineConfig, RunConfig
from tasks.job import OutputConfig
from tasks.run.manifest import read_manifest, read_shard_size
from tasks.run.query import query
from tasks.run.rows import encode_picture, encode_thumbnail
from tasks.run.run_json import read_declared
from tasks.work.device import auto_batch
from tests.tasks.small_run import make_job, write_pictures


@pytest.mark.parametrize(
    ("side", "cpu", "gpu"), [(32, 16, 16), (256, 16, 16), (512, 4, 16), (1024, 1, 4)]
)
def test_batches_follow_the_pixels(side: int, cpu: int, gpu: int) -> None:
    assert (auto_batch(side, "cpu"), auto_batch(side, "cuda:1")) == (cpu, gpu)


@pytest.mark.parametrize(("side", "size"), [(64, 256), (256, 256), (512, 128), (1024, 64)])
def test_shards_follow_the_side(side: int, size: int) -> None:
    assert stages.auto_shard_size(side) == size


def test_what_is_kept_of_an_input_follows_the_side() -> None:
    auto = OutputConfig(pictures="auto")
    assert auto.settled(256).pictures == ("input", "inversion")
    assert auto.settled(512).pictures == ("thumbnail", "inversion")
    assert OutputConfig(pictures=("input",)).settled(1024).pictures == ("input",)


def test_quality_is_what_was_asked_for() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert len(encode_picture(pixels, "webp", 50)) < len(encode_picture(pixels, "webp", 95))
    assert len(encode_picture(pixels, "jpeg", 50)) < len(encode_picture(pixels, "jpeg"))
    same = Image.open(io.BytesIO(encode_picture(pixels, "webp")))
    np.testing.assert_array_equal(np.array(same), pixels)
    wide = np.zeros((512, 1024, 3), np.uint8)
    thumbnail = Image.open(io.BytesIO(encode_thumbnail(wide)))
    assert (thumbnail.format, thumbnail.size) == ("JPEG", (256, 128))


def test_a_run_goes_on_as_it_began(
    tiny_generator: Generator, tmp_path: Path, face_bytes: list[bytes]
) -> None:
    folder, out = str(write_pictures(tmp_path / "in", face_bytes)), str(tmp_path / "out")
    job = make_job(tiny_generator, tmp_path)
    thumbnails = OutputConfig(pictures=("thumbnail", "inversion"), picture_format="webp")
    job = replace(job, output=thumbnails)
    engine = EngineConfig(kind="inline", shard_size=4)
    stages.plan(folder, out, RunConfig(job=job, engine=engine))
    asked = RunConfig(
        job=replace(job, output=replace(thumbnails, pictures="auto")),
        engine=EngineConfig(kind="inline"),
    )
    summary = stages.carry_out(folder, out, asked)
    assert summary.is_clean
    assert read_shard_size(out) == 4
    assert [spec.num_samples for spec in read_manifest(out)] == [4, 4, 1]
    assert read_declared(out).pictures == ("thumbnail", "inversion")
    rows = query(out, "SELECT thumbnail, inversion FROM images ORDER BY sample_key").to_pylist()
    assert len(rows) == 8
    assert rows[0]["thumbnail"]["path"].endswith(".thumbnail.jpg")
    assert rows[0]["inversion"]["path"].endswith(".inversion.webp")
    shown = Image.open(io.BytesIO(rows[0]["thumbnail"]["bytes"])).convert("RGB")
    assert shown.size == (32, 32)
    assert (tmp_path / "out" / "report.html").read_text().count("data:image/jpeg") > 0


def test_a_large_generator_begins_with_thumbnails_and_tells_its_batches(
    tmp_path: Path,
    face_bytes: list[bytes],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The rules through the command, which sets nothing: a generator of 512 px, its synthesis
    thin."""
    widths = {side: 4 for side in (4, 8, 16, 32, 64, 128, 256, 512)}
    architecture = GeneratorArchitecture(
        resolution=512, widths=widths, z_dim=8, w_dim=8, mapping_layers=1
    )
    generator = Generator(architecture).requires_grad_(False)
    generator.latent_avg.zero_()
    path = save_generator(generator, tmp_path / "large.safetensors", {"terms": "test"})
    folder, out = str(write_pictures(tmp_path / "in", face_bytes[:6])), str(tmp_path / "out")
    config = tmp_path / "large.toml"
    config.write_text(
        f'generator = "{path}"\nperceptual = "none"\n[[method]]\nname = "wplus"\nsteps = 1\n'
        'perceptual = "none"\n'
    )
    monkeypatch.setattr(progress, "PLAIN_INTERVAL_S", 0.0)
    command = ["invert", folder, out, "--config", str(config), "--engine", "inline", "--no-flow"]
    assert run_app(command) == 0
    assert "0/1 shards, 0/7 images, 0 failed, 4 more computed" in capsys.readouterr().err
    assert read_shard_size(out) == 128
    assert read_declared(out).pictures == ("thumbnail", "inversion")
    first, *_ = query(out, "SELECT thumbnail FROM images").to_pylist()
    assert max(Image.open(io.BytesIO(first["thumbnail"]["bytes"])).size) == 256
