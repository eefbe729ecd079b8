"""`refinery train all`: order, results of one stage in another, resume, what ships, refusals."""

import io
import json
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tomlkit
from PIL import Image

from models.checkpoints.load import load_generator
from models.stylegan2.generator import weights_hash
from pipeline.cli import run_app
from pipeline.config import load_dataclass
from pipeline.recipe import Recipe
from pipeline.train import FITS


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A 32 px generator, its release and an e4e encoder, of a few pictures each."""
    rng = np.random.default_rng(0)
    encoded = []
    for _ in range(16):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(buffer, "PNG")
        encoded.append(buffer.getvalue())
    data = tmp_path / "train.parquet"
    pq.write_table(pa.table({"image": encoded}), data)
    path = tmp_path / "recipe.toml"
    table = {
        "out": str(tmp_path / "out"),
        "bundle": str(tmp_path / "bundle"),
        "common": {"data": [str(data)], "precision": "float32", "threads": 1, "terms": "free"},
        "stage": {
            # Written first, run last: the order is that of the references.
            "e4e": {
                "run": ["train", "e4e"],
                "result": "e4e.safetensors",
                "ship": ["e4e.*"],
                "settings": {
                    "generator": "@release",
                    "images": 8,
                    "batch": 4,
                    "width": 8,
                    "units": [1, 1, 1, 1],
                    "head_width": 8,
                    "perceptual": "none",
                },
            },
            "release": {
                "run": ["train", "release"],
                "result": "generator.safetensors",
                "ship": ["generator.*", "MODEL_CARD.md"],
                "settings": {
                    "checkpoint": "@generator",
                    "held_out": [str(data)],
                    "data_note": "noise",
                    "frechet_images": 100,
                    "anchor_samples": 10_000,
                },
            },
            "generator": {
                "run": ["train", "generator"],
                "result": "checkpoint.pt",
                "settings": {
                    "resolution": 32,
                    "widths": {"4": 8, "8": 8, "16": 8, "32": 8},
                    "z_dim": 8,
                    "w_dim": 8,
                    "mapping_layers": 2,
                    "images": 16,
                    "batch": 8,
                    "frechet_images": 0,
                },
            },
        },
    }
    path.write_text(tomlkit.dumps(table))
    return path


@pytest.mark.slow
def test_one_command_makes_everything_and_does_nothing_twice(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, bundle = recipe.parent / "out", recipe.parent / "bundle"
    assert run_app(["train", "all", "--config", str(recipe)]) == 0
    card = json.loads((bundle / "e4e.json").read_text())
    digest = weights_hash(load_generator(bundle / "generator.safetensors"))
    assert card["generator_hash"] == digest
    assert card["provenance"]["images_shown"] == 8
    assert (bundle / "MODEL_CARD.md").is_file()
    assert not (bundle / "checkpoint.pt").exists()
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert run_app(["train", "all", "--config", str(recipe)]) == 0
    assert times == {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    # A setting that no longer fits what is there is told, not mixed in.
    capsys.readouterr()
    change = ["--set", "stage.e4e.settings.images=12"]
    assert run_app(["train", "all", "--config", str(recipe), *change]) == 2
    assert "stage e4e: it was made with other settings.images" in capsys.readouterr().err
    # A stage whose input changed is told, too.
    (out / "generator" / "checkpoint.pt").write_bytes(b"another")
    assert run_app(["train", "all", "--config", str(recipe)]) == 2
    assert "stage release: it was made with other made_from.generator" in capsys.readouterr().err


def test_a_failure_names_the_stage_and_stops_what_needs_it(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        run_app(
            [
                "train",
                "all",
                "--config",
                str(recipe),
                "--set",
                "stage.generator.settings.resolutionn=16",
            ]
        )
        != 0
    )
    error = capsys.readouterr().err
    assert "stage generator: status 2" in error
    assert not (recipe.parent / "out" / "release").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("stage.e4e.settings.generator=@nobody", "stage e4e: @nobody is no stage"),
        ("stage.generator.settings.grow_from=@e4e", "need each other in a circle"),
        ("stage.release.after=['nobody']", "stage release: @nobody is no stage"),
        ("stage.generator.after=['e4e']", "need each other in a circle"),
        ("jobs=0", "jobs must be >= 1"),
    ],
)
def test_bad_recipes(
    recipe: Path, change: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_app(["train", "all", "--config", str(recipe), "--set", change]) == 2
    assert says in capsys.readouterr().err


def test_all_needs_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(["train", "all"]) == 2
    assert "--config RECIPE.toml" in capsys.readouterr().err


def test_the_bundled_recipe_is_one() -> None:
    """Its keys, references and commands are known; every folder that a stage means is its own."""
    path = Path(__file__).resolve().parents[2] / "deploy" / "recipes" / "faces64.toml"
    recipe = load_dataclass(Recipe, str(path), [])
    assert {"generator", "release", "e4e", "directions", "domains", "benchmark"} <= set(
        recipe.stage
    )
    for name, stage in recipe.stage.items():
        if stage.run[0] == "train":
            module, config = FITS[stage.run[1]]
            known = {f.name for f in fields(getattr(import_module(module), config))}
            assert set(stage.settings) <= known, name
        for place in [*stage.run, str(stage.settings.get("out", ""))]:
            if place.startswith(recipe.out):
                assert place.startswith(f"{recipe.out}/{name}"), name
