"""Training of RefineStyle's token network: what is written, resume, the trunk it starts from."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from models.checkpoints.load import load_generator
from models.encoders.checkpoint import load_encoder, load_network
from models.encoders.token_network import TOKEN_NETWORKS
from models.errors import AssetError, ConfigError
from models.inversion.base import SampleRng
from models.inversion.registry import load_method
from models.stylegan2.generator import Generator
from tasks.training.refine import FitRefineConfig, RefineObjective, fit
from tests.models.tiny_networks import save_tiny_encoder
from tests.tasks.training.conftest import SMALL, held_out

SIZES: dict[str, Any] = {"rank": 2, "token_width": 16, "heads": 2, "feed_forward": 16}


def encoder_file(folder: Path, generator: Generator, width: int = 4) -> str:
    path = folder / f"encoder{width}.safetensors"
    return str(save_tiny_encoder(path, generator, width=width, stem_stride=2))


@pytest.fixture
def config(places: dict[str, Any], tmp_path: Path, tiny_generator: Generator) -> FitRefineConfig:
    torch.manual_seed(0)
    first_stage = encoder_file(tmp_path, tiny_generator)
    return FitRefineConfig(**places, first_stage=first_stage, **SMALL, **SIZES)


def rows(config: FitRefineConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(config.out) / "log.jsonl").read_text().splitlines()]


def test_a_run_learns_and_writes_weights_and_card(config: FitRefineConfig) -> None:
    config = dataclasses.replace(config, images=320, checkpoint_images=10_000, learning_rate=1e-2)
    path = fit(config)
    network, _, card = load_network(path, TOKEN_NETWORKS)
    assert network.architecture.channels[0] == (16, 16)
    assert card["provenance"]["images_shown"] == 320
    assert len(card["first_stage_sha256"]) == 64
    assert card["provenance"]["settings"]["first_stage"] == "encoder4.safetensors"
    assert str(path.parent) not in path.with_suffix(".json").read_text()
    scores = card["scores"]
    assert scores["mse"] < 0.8 * scores["first_mse"]
    assert rows(config)[-1]["validation_mse"] == pytest.approx(scores["mse"], rel=1e-3)


def test_one_stage_raises_the_gain_of_its_tokens(config: FitRefineConfig) -> None:
    config = dataclasses.replace(
        config, stages="one", first_stage=None, token_warm_up=0.5, token_start=0.2
    )
    path = fit(config)
    assert path.name == "refine_one_stage.safetensors"
    logged = [row for row in rows(config) if "mse" in row]
    assert {"delta", "energy"} <= set(logged[0])
    network, _, card = load_network(path, TOKEN_NETWORKS)
    assert card["first_stage_sha256"] is None
    assert len(network.trunk.styles) == 8
    objective = RefineObjective(config, generator_of(config))
    gains = [objective._token_gain(share) for share in (0.0, 0.25, 0.5, 1.0)]
    assert gains == pytest.approx([0.2, 0.6, 1.0, 1.0])


def generator_of(config: FitRefineConfig) -> Generator:
    return load_generator(config.generator)


def test_resume_is_exact(config: FitRefineConfig, tmp_path: Path) -> None:
    config = dataclasses.replace(config, images=24)
    whole = fit(config).read_bytes()
    halves = dataclasses.replace(config, out=str(tmp_path / "halves"), time_limit_s=0.0)
    path = fit(halves)
    for _ in range(3):
        path = fit(halves)
    assert path.name == "refine.safetensors"
    assert path.read_bytes() == whole
    other = dataclasses.replace(halves, rank=3)
    with pytest.raises(AssetError, match="these settings differ: architecture"):
        fit(other)


def test_the_trunk_starts_where_an_encoder_ended(
    config: FitRefineConfig, tmp_path: Path, tiny_generator: Generator
) -> None:
    path = str(config.first_stage)
    started = dataclasses.replace(config, start_from=path)
    network = RefineObjective(started, generator_of(config)).network
    own = network.trunk.state_dict()
    encoder = load_encoder(path, 8, 16).encoder.eval()
    name = "body.3.res_layer.1.weight"
    assert torch.equal(own[name], encoder.get_parameter(name))
    seen = torch.randn(2, 3, 32, 32)
    anything = torch.randn(2, 3, 32, 32)
    found = network.trunk.eval().pyramid(torch.cat([seen, anything], 1), 8)
    for mine, its in zip(found, encoder.pyramid(seen, 8), strict=True):
        torch.testing.assert_close(mine, its)
    wide = dataclasses.replace(config, start_from=encoder_file(tmp_path, tiny_generator, width=8))
    with pytest.raises(AssetError, match="no kernel of its trunk fits"):
        RefineObjective(wide, generator_of(config))


def test_a_run_goes_on_from_a_network_and_adds_a_pass(
    config: FitRefineConfig, tmp_path: Path, tiny_generator: Generator
) -> None:
    """It begins as that one; the second pass then lowers what is left, and the method finds what
    the training found."""
    before = fit(dataclasses.replace(config, images=160, learning_rate=1e-2))
    settings = {"start_from": str(before), "iterations": 2, "out": str(tmp_path / "more")}
    more = dataclasses.replace(config, **settings, images=320, learning_rate=1e-2)
    objective = RefineObjective(more, generator_of(config))
    known = json.loads(before.with_suffix(".json").read_text())
    started = objective.score(held_out(config))[0]["mse"].mean()
    assert float(started) == pytest.approx(known["scores"]["mse"], rel=1e-3)

    path = fit(more)
    network, _, card = load_network(path, TOKEN_NETWORKS)
    assert network.architecture.iterations == 2
    assert card["provenance"]["started_from"]["images_shown"] == 160
    assert card["scores"]["mse"] < 0.95 * known["scores"]["mse"]
    method = load_method(
        "refine", tiny_generator, checkpoint=str(path), first_stage=config.first_stage
    )
    once = load_method(
        "refine", tiny_generator, checkpoint=str(path), first_stage=config.first_stage, iterations=1
    )
    seen = held_out(config)
    renders = [
        m.invert(seen, None, SampleRng([0] * len(seen))).render(tiny_generator)
        for m in (method, once)
    ]
    mse = [float((render - seen).square().mean()) for render in renders]
    assert mse[0] == pytest.approx(card["scores"]["mse"], rel=2e-3)
    assert mse[0] < mse[1]
    other = dataclasses.replace(more, rank=3)
    with pytest.raises(AssetError, match=r"start_from .*: its rank is 2, this run's 3; choose"):
        RefineObjective(other, generator_of(config))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stages": "three"}, "stages: expected"),
        ({"learning_rate": 0.0}, "learning_rate must be > 0"),
        ({"token_warm_up": 1.5}, "token_warm_up must be in"),
        ({"stages": "one"}, "first_stage: stages"),
        (
            {"stages": "one", "first_stage": None, "iterations": 2},
            'iterations: stages = "one" makes one pass, got 2',
        ),
        ({"iterations": 0}, "iterations must be >= 1"),
    ],
)
def test_settings_out_of_range_are_refused(
    config: FitRefineConfig, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(config, **settings)
