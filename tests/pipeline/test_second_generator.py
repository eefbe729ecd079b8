"""Nothing is about faces: the second bundled generator, with its own encoder."""

import hashlib
import json
from pathlib import Path

import pytest

from models.checkpoints.load import load_generator
from models.stylegan2.generator import weights_hash
from pipeline.cli import run_app
from tasks.run.query import query


def test_every_bundled_network_belongs_to_its_generator() -> None:
    assets = Path(__file__).resolve().parents[2] / "models" / "assets"
    found = []
    for name in ("faces64", "hands64"):
        generator = load_generator(name)
        for path in sorted((assets / name).glob("*.safetensors")):
            if path.stem in ("generator", "statistics", "discriminator", "attributes"):
                continue
            card = json.loads(path.with_suffix(".json").read_text())
            assert card["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest(), path
            assert card["generator_hash"] == weights_hash(generator), path
            assert path.with_name(f"{path.stem.upper()}_CARD.md").is_file()
            found.append(f"{name}/{path.stem}")
    assert {"faces64/e4e", "faces64/cycle", "faces64/lsap", "hands64/e4e"} <= set(found)


@pytest.mark.slow
def test_hands_come_back_as_hands(shared: Path, tmp_path: Path) -> None:
    command = ["invert", str(shared / "data/hands/hands64.parquet"), str(tmp_path / "run")]
    options = ["--set", "generator=hands64", "--set", "perceptual=none", "--engine", "inline"]
    assert run_app([*command, *options, "--limit", "16"]) == 0
    sql = "SELECT count(*) AS n, median(psnr) AS middle FROM latents WHERE status = 'ok'"
    (row,) = query(str(tmp_path / "run"), sql).to_pylist()
    assert row["n"] == 16
    # The picture of the mean code as everybody's answer has 15.5 dB.
    assert row["middle"] > 18
