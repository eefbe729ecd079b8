"""Batch, shard size and workers as `refinery plan` chooses them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from models.checkpoints.native import save_generator
from models.stylegan2.generator import Generator
from pipeline import run as stages
from pipeline import sizes
from pipeline.cli import run_app
from pipeline.config import load_config
from pipeline.sizes import choose
from tasks.run.ledger import read_markers
from tasks.run.manifest import read_shard_size
from tasks.run.prediction import read_prediction
from tasks.run.query import query
from tasks.run.run_json import read_run
from tasks.work.probe import ProbeResult
from tests.tasks.small_run import write_pictures

MEASURED = ProbeResult(
    batch=16,
    memory_bytes=900_000_000,
    loaded_bytes=500_000_000,
    rows_held=256,
    row_bytes=1e5,
    warm_up_s=0.0,
    num_images=64,
    num_failed=0,
    images_per_s={},
    bytes_per_image=1e4,
    device="cpu",
)
"""500 MB in any case, 25 MB for each picture of a batch; 100 kB for a row beyond 256 in flight."""


@pytest.mark.parametrize(
    ("sets", "seconds", "images", "expected"),
    [
        (["memory_gb=8"], 0.05, 10**6, (16, 2048, 4)),  # two minutes of work in a shard
        (["memory_gb=8"], 0.05, 20_000, (16, 512, 4)),  # but four shards for each place at a worker
        (["memory_gb=8"], 0.05, 40, (16, 128, 4)),  # and not less than ten seconds
        (["memory_gb=8"], 1e-4, 10**9, (16, 4096, 4)),
        (["memory_gb=6"], 1e-4, 10**9, (16, 2048, 4)),  # 4096 rows more would need 2.1 GB
        (["memory_gb=8"], 4.0, 10**6, (16, 16, 4)),  # a shard has a batch at least
        (["memory_gb=3.5"], 0.05, 10**6, (8, 512, 4)),  # 4 x 700 MB, and rows
        (["memory_gb=2"], 0.05, 10**6, (4, 128, 3)),  # three with 600 MB each, not four with 525
        (["memory_gb=2", "actors=1"], 0.05, 10**6, (16, 2048, 1)),
        (["memory_gb=0.1"], 0.05, 10**6, (1, 128, 1)),  # tried all the same
        (["memory_gb=8", "shard_timeout_s=10"], 1.0, 10**6, (2, 64, 4)),  # two in flight, twice
        (["memory_gb=8", "shard_timeout_s=10", "kind=inline"], 1.0, 10**6, (4, 64, 1)),
        (["memory_gb=1", "shard_size=77"], 0.05, 10**6, (16, 77, 1)),
        (["memory_gb=0.7", "batch=16"], 0.05, 10**6, (16, 128, 1)),  # what was asked for
    ],
)
def test_choose(
    sets: list[str], seconds: float, images: int, expected: tuple[int, int, int]
) -> None:
    own = [item if item.startswith("batch") else f"engine.{item}" for item in sets]
    config = load_config(sets=own)
    places = 1 if config.engine.kind == "inline" or config.engine.actors == 1 else 4
    found = choose(MEASURED, seconds, config, images=images, places=places)
    assert (found.batch, found.shard_size, found.workers) == expected
    assert bool(found.why) == (found.batch < 16)


def test_a_container_may_have_less_than_its_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load_config().engine
    machine = sizes.room_for_workers("cpu", engine)
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(sizes, "CONTAINER", (str(limit), str(tmp_path / "none")))
    for text, expected in (("max\n", machine), ("1000000\n", 10**6), (f"{2**62}\n", machine)):
        limit.write_text(text)
        assert sizes.room_for_workers("cpu", engine) == expected


def test_a_run_keeps_what_was_chosen(
    tiny_generator: Generator,
    tmp_path: Path,
    face_bytes: list[bytes],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without memory batches are of one, shards follow the workers, and the run is the same one as
    with other batches."""
    path = save_generator(tiny_generator, tmp_path / "tiny.safetensors", {"terms": "test"})
    folder, out = str(write_pictures(tmp_path / "in", face_bytes)), str(tmp_path / "out")
    flags = ["--engine", "inline", "--set", "perceptual=none", "--set", f"generator={path}"]
    flags += ["--method", "wplus", "--set", "method.0.steps=1", "--set", "method.0.perceptual=none"]
    plan = ["plan", folder, out, *flags, "--probe", "8"]
    monkeypatch.setattr(sizes, "LEAST_S", 0.0)  # however fast this machine is

    assert run_app([*plan, "--set", "engine.memory_gb=1000"]) == 0
    assert "batch     16\n" in "\n".join(map(str.rstrip, capsys.readouterr().out.split("\n")))
    assert run_app([*plan, "--set", "engine.memory_gb=0.001"]) == 0
    text = capsys.readouterr().out
    assert "batch     1 (16 would need " in text
    said = read_prediction(out)
    assert said is not None
    assert (said.batch, said.shard_size) == (1, 2)  # four shards of nine pictures, if it can be
    assert "shards    5 (files 5), 2 images each at most" in text

    run = ["invert", folder, out, *flags, "--no-flow"]
    assert run_app([*run, "--dry-run"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "shards 5 (files 5), 2 images each at most" in text
    assert " batch = 1 " in text
    assert run_app(run) == 0
    record = read_run(out)
    assert record["config"]["batch"] == 1
    assert (read_shard_size(out), record["num_shards"]) == (2, 5)

    # Once it has begun the run itself says it, whatever is predicted later.
    (tmp_path / "out/prediction.json").unlink()
    (tmp_path / "out/_SEALED.json").unlink()
    next((tmp_path / "out/commits").iterdir()).unlink()
    assert run_app(run) == 0
    assert read_run(out) == record
    assert len(read_markers(out)) == record["num_shards"]
    assert run_app(["verify", out]) == 0

    four = str(tmp_path / "four")
    others = ["--set", "batch=4", "--set", "engine.shard_size=2"]
    assert run_app(["invert", folder, four, *flags, *others, "--no-flow"]) == 0
    assert read_run(four)["run_id"] == record["run_id"]
    mine, other = (
        query(place, "SELECT sample_key, psnr FROM latents ORDER BY sample_key").to_pandas()
        for place in (out, four)
    )
    assert list(mine["sample_key"]) == list(other["sample_key"])
    np.testing.assert_allclose(mine["psnr"], other["psnr"], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_worker_that_dies_had_too_large_batches(
    tiny_generator: Generator,
    tmp_path: Path,
    face_bytes: list[bytes],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = save_generator(tiny_generator, tmp_path / "tiny.safetensors", {"terms": "test"})
    folder = str(write_pictures(tmp_path / "in", face_bytes))
    plan = ["plan", folder, "--probe", "8", "--set", "engine.actors=2", "--set", "perceptual=none"]
    plan += ["--set", f"generator={path}", "--method", "wplus", "--set", "method.0.steps=1"]
    plan += ["--set", "method.0.perceptual=none"]
    monkeypatch.setenv("REFINERY_CRASH", f"in_work:0:{tmp_path / 'token'}")
    assert run_app(plan) == 0
    assert "batch     8 (a worker died with 16)" in capsys.readouterr().out
    (tmp_path / "token").unlink()
    assert run_app([*plan, "--set", "batch=16"]) == 2
    assert "a worker died while it measured batches of 16" in capsys.readouterr().err


def test_workers_that_fit_into_what_they_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "local_device", lambda: "cpu")
    monkeypatch.setattr(stages, "places", lambda device, engine: 8)
    for sets, expected in (
        ([], "auto"),
        (["engine.memory_gb=4"], 3),  # of nine tenths
        (["engine.memory_gb=1"], 1),
        (["engine.memory_gb=40"], 8),
        (["engine.memory_gb=4", "engine.actors=6"], 6),
        (["engine.memory_gb=4", "engine.address=auto"], "auto"),
    ):
        engine = load_config(sets=sets).engine
        assert stages._within_memory(engine, 1_200_000_000).actors == expected


def test_sizes_of_other_settings_are_not_taken(tmp_path: Path, face_bytes: list[bytes]) -> None:
    """A plan of one method says nothing about a run of another."""
    folder, out = str(write_pictures(tmp_path / "in", face_bytes[:2])), tmp_path / "out"
    flags = ["--engine", "inline", "--set", "perceptual=none"]
    assert run_app(["plan", folder, str(out), *flags, "--method", "e4e", "--probe", "2"]) == 0
    said = json.loads((out / "prediction.json").read_text())
    (out / "prediction.json").write_text(json.dumps({**said, "batch": 3, "shard_size": 2}))
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    for place, method, batch, size in ((out, "e4e", 3, 2), (copy, "cycle", "auto", 256)):
        command = ["invert", folder, str(place), *flags, "--method", method, "--no-flow"]
        assert run_app(command) == 0
        assert read_run(str(place))["config"]["batch"] == batch
        assert read_shard_size(str(place)) == size
        assert (place / "prediction.json").exists() == (method == "e4e")
