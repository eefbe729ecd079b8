"""Distilling the trunk: resume, card, distortions, and the shipped one against its teacher."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from models.checkpoints.bundled import asset_path
from models.errors import AssetError, ConfigError
from models.losses.torchvision_shim import ensure_torchvision
from models.losses.trunk import load_trunk
from tasks.training.assets.trunk import FitTrunkConfig, evaluate, fit
from tasks.training.data import load_pictures
from tasks.training.distortions import Distorter
from tasks.training.squeezenet import SqueezeNet
from tasks.training.trainer import to_images


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    coarse = torch.rand(12, 3, 8, 8, generator=rng) * 1.6 - 0.8
    return torch.nn.functional.interpolate(coarse, size=(64, 64), mode="bicubic").clamp(-1, 1)


@pytest.fixture
def config(face_bytes, tmp_path) -> FitTrunkConfig:
    """Eight pictures and a teacher with random weights."""
    ensure_torchvision()
    from torchvision.models import squeezenet1_1

    torch.manual_seed(0)
    state = squeezenet1_1(weights=None).features.state_dict()
    save_file({f"features.{k}": v for k, v in state.items()}, tmp_path / "teacher.safetensors")
    pq.write_table(pa.table({"image": face_bytes}), tmp_path / "faces.parquet")
    pq.write_table(pa.table({"image": face_bytes[:3]}), tmp_path / "held_out.parquet")
    return FitTrunkConfig(
        data=(str(tmp_path / "faces.parquet"),),
        validation=(str(tmp_path / "held_out.parquet"),),
        teacher=str(tmp_path / "teacher.safetensors"),
        out=str(tmp_path / "straight"),
        images=12,
        batch=4,
    )


def card_of(weights: Path) -> dict[str, Any]:
    return json.loads(weights.with_suffix(".json").read_text())


def test_an_interrupted_run_ends_with_the_same_weights(config, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    straight = fit(config)
    again = replace(config, out=str(tmp_path / "again"), time_limit_s=0.0)
    assert fit(again).name == "checkpoint.pt"
    found = fit(again)
    while found.name == "checkpoint.pt":
        found = fit(again)
    assert "resumed" in caplog.text
    assert found.read_bytes() == straight.read_bytes()
    assert card_of(found)["images_shown"] == card_of(straight)["images_shown"] == 12
    first = load_file(straight)
    assert all(value.dtype == torch.float16 for value in first.values())


def test_the_card_describes_the_file(config, tmp_path):
    trunk, loaded = load_trunk(fit(config))
    assert loaded == card_of(tmp_path / "straight/trunk.safetensors")
    assert loaded["parameters"] == sum(p.numel() for p in trunk.parameters())
    assert loaded["scores"]["pairs"] == 9
    assert set(loaded["scores"]["by_distortion"]) >= {"blur", "warp", "blend", "low_rank"}
    assert loaded["settings"]["data"] == ["faces.parquet"]
    assert str(tmp_path) not in json.dumps(loaded)


def test_missing_and_wrong_teacher(config, tmp_path):
    with pytest.raises(AssetError, match=r"nothing\.safetensors is missing"):
        SqueezeNet(tmp_path / "nothing.safetensors")
    save_file({"features.0.weight": torch.zeros(3)}, tmp_path / "wrong.safetensors")
    with pytest.raises(AssetError, match=r"is not SqueezeNet v1\.1"):
        SqueezeNet(tmp_path / "wrong.safetensors")


def test_a_checkpoint_of_something_else_is_refused(config, tmp_path):
    fit(replace(config, time_limit_s=0.0))
    with pytest.raises(AssetError, match=r"it cannot be resumed.*batch was 4, is 6"):
        fit(replace(config, batch=6))


def test_scores_need_pictures_held_out(config):
    with pytest.raises(ConfigError, match="validation: expected files of held-out pictures"):
        replace(config, validation=())


def test_every_distortion_changes_every_picture(pictures):
    distorter = Distorter(pictures)
    for kind in distorter.kinds:
        rng = torch.Generator().manual_seed(2)
        found = distorter.apply(kind, pictures, rng)
        change = (found - pictures).square().mean((1, 2, 3))
        # A blend may draw the picture itself as its partner; a weak low rank keeps all components.
        assert int((change > 1e-7).sum()) >= (9 if kind in ("blend", "low_rank") else 12), kind
        assert float(found.abs().max()) <= 1
        rng.manual_seed(2)
        assert torch.equal(distorter.apply(kind, pictures, rng), found)


def test_distortions_at_strength_zero_change_little(pictures):
    distorter = Distorter(pictures)
    rng = torch.Generator().manual_seed(0)
    for kind in ("noise", "smooth_noise", "colour", "blend", "shift", "warp"):
        found = distorter.kinds[kind](pictures, torch.zeros(12), rng)
        torch.testing.assert_close(found, pictures, atol=1e-4, rtol=0)


def test_a_full_rank_reconstruction_is_exact(pictures):
    distorter = Distorter(pictures)
    rng = torch.Generator().manual_seed(0)
    found = distorter.low_rank(pictures, torch.zeros(12), rng)
    torch.testing.assert_close(found, pictures, atol=2e-3, rtol=0)
    weak = distorter.low_rank(pictures, torch.ones(12), rng)
    torch.testing.assert_close(weak[0], weak[1], atol=0.9, rtol=0)
    assert float((weak - pictures).square().mean()) > 0.01


def test_the_shipped_trunk_follows_its_teacher(shared):
    held_out = to_images(load_pictures([str(shared / "data/faces/val64-000.parquet")], 64), "cpu")
    teacher = SqueezeNet(shared / "weights/squeezenet1_1/squeezenet1_1_features_caffe.safetensors")
    trunk, _ = load_trunk(asset_path("trunk", "trunk.safetensors"))
    distorter = Distorter(held_out[96:])
    scores = evaluate(trunk, teacher, distorter, held_out[:32], seed=5, is_detailed=False)
    assert scores["pairs"] == 96
    assert scores["spearman"] > 0.85 > scores["spearman_mse"]
