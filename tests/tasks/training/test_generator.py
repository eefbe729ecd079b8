"""Generator training: exact resume, growing, the pieces of a step."""

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from models.errors import AssetError, ConfigError
from models.losses.torchvision_shim import ensure_torchvision
from models.stylegan2.resample import upsample2x
from tasks.training.data import load_pictures
from tasks.training.generator import GeneratorTraining, fit
from tasks.training.generator_state import FitGeneratorConfig, GeneratorState


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[str]:
    """Sixteen pictures of 32 px, every one a flat colour with a bright square."""
    path = tmp_path_factory.mktemp("data") / "train.parquet"
    rng = np.random.default_rng(0)
    encoded = []
    for _ in range(16):
        pixels = np.full((32, 32, 3), rng.integers(0, 100, 3), dtype=np.uint8)
        pixels[8:24, 8:24] = rng.integers(150, 256, 3)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        encoded.append(buffer.getvalue())
    pq.write_table(pa.table({"image": encoded}), path)
    return (str(path),)


@pytest.fixture(scope="module")
def eyes(tmp_path_factory: pytest.TempPathFactory) -> str:
    """SqueezeNet with random weights."""
    ensure_torchvision()
    from torchvision.models import squeezenet1_1

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("eyes") / "eyes.safetensors"
    save_file(squeezenet1_1(weights=None).features.state_dict(), path)
    return str(path)


def config(data: tuple[str], out: Path, **changes: object) -> FitGeneratorConfig:
    values: dict[str, object] = {
        "data": data,
        "out": str(out),
        "images": 64,
        "resolution": 16,
        "widths": {4: 8, 8: 8, 16: 8, 32: 8},
        "z_dim": 8,
        "w_dim": 8,
        "mapping_layers": 2,
        "batch": 8,
        "r1_interval": 2,
        "path_length_interval": 2,
        "precision": "float32",
        "threads": 1,
        "frechet_images": 0,
        "checkpoint_images": 32,
        "log_images": 32,
    }
    return FitGeneratorConfig(**{**values, **changes})  # type: ignore[arg-type]


def load(path: Path) -> dict[str, object]:
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("is_aided", [False, True])
def test_resume_is_exact(data: tuple[str], eyes: str, tmp_path: Path, is_aided: bool) -> None:
    vision = eyes if is_aided else None
    whole = load(fit(config(data, tmp_path / "whole", vision=vision)))
    halves = config(data, tmp_path / "halves", images=32, vision=vision)
    fit(halves)
    resumed = load(fit(replace(halves, images=64)))
    assert resumed["images"] == whole["images"] == 64
    assert resumed["ada_p"] == whole["ada_p"]
    for part in ("g", "d", "g_ema", *(["second"] if is_aided else [])):
        for name, value in whole[part].items():
            torch.testing.assert_close(
                resumed[part][name], value, rtol=0, atol=0, equal_nan=True, msg=name
            )
    assert torch.equal(resumed["rng"], whole["rng"])


def test_writes_log_and_samples(data: tuple[str], tmp_path: Path) -> None:
    fit(config(data, tmp_path, frechet_images=8, resolution=32))
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["images"] for row in rows] == [32, 64]
    assert rows[-1]["eta_s"] == 0
    assert rows[-1]["frechet_trunk_distance"] > 0
    with Image.open(tmp_path / "samples-00000064.png") as grid:
        assert grid.size == (10 * 32, 6 * 32)


def test_growing_keeps_the_image(data: tuple[str], tmp_path: Path) -> None:
    small = config(data, tmp_path / "small")
    checkpoint = fit(small)
    saved = load(checkpoint)
    before = GeneratorState(small)
    before.load(checkpoint, "cpu")
    grown = GeneratorState(config(data, tmp_path / "large", resolution=32))
    grown.grow(checkpoint)
    assert grown.images == saved["images"] == 64
    w_plus = before.ema.mapping(torch.randn(2, 8))
    w_large = torch.cat([w_plus, w_plus[:, -1:].expand(-1, 2, -1)], 1)
    image = grown.ema.synthesis(w_large)
    torch.testing.assert_close(image, upsample2x(before.ema.synthesis(w_plus)))
    # The old discriminator blocks sit one place further down.
    torch.testing.assert_close(
        grown.d.state_dict()["convs.2.conv1.0.weight"], saved["d"]["convs.1.conv1.0.weight"]
    )
    pictures = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    losses = GeneratorTraining(grown, config(data, tmp_path, resolution=32), pictures).step()
    assert torch.isfinite(losses["loss_g"])
    assert grown.images == 72


def test_checkpoint_of_another_architecture_is_refused(data: tuple[str], tmp_path: Path) -> None:
    fit(config(data, tmp_path, images=8))
    with pytest.raises(AssetError, match="another architecture"):
        fit(config(data, tmp_path, w_dim=12))


def test_time_limit_stops_with_a_checkpoint(data: tuple[str], tmp_path: Path) -> None:
    checkpoint = fit(config(data, tmp_path, time_limit_s=0.0))
    assert load(checkpoint)["images"] == 8


def test_training_learns_the_colours(data: tuple[str], tmp_path: Path) -> None:
    """The mean picture of the generator approaches that of the data."""
    settings = config(
        data, tmp_path, images=200, learning_rate=1e-2, ema_half_life=80, checkpoint_images=10**6
    )
    checkpoint = fit(settings)
    state = GeneratorState(settings)
    state.load(checkpoint, "cpu")
    with torch.no_grad():
        mean = state.ema.synthesis(state.ema.mapping(torch.randn(64, 8))).mean(0)
    inside, outside = mean[:, 5:11, 5:11].mean(), mean[:, :3, :3].mean()
    assert inside - outside > 0.3


@pytest.mark.parametrize(
    ("key", "value"), [("precision", "float8"), ("batch", 6), ("loss", "hinge")]
)
def test_bad_settings(data: tuple[str], tmp_path: Path, key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key):
        config(data, tmp_path, **{key: value})


def test_without_noise_the_strengths_stay_zero(data: tuple[str], tmp_path: Path) -> None:
    settings = config(data, tmp_path, images=16, has_noise=False)
    state = GeneratorState(settings)
    state.load(fit(settings), "cpu")
    assert all(float(state.ema.conv(i).noise.weight) == 0 for i in range(state.ema.num_convs))
    with torch.no_grad():
        w_plus = state.g.mapping(torch.randn(2, 8))
        assert torch.equal(state.g.synthesis(w_plus, "const"), state.g.synthesis(w_plus, "none"))


def test_with_noise_the_strengths_are_learned(data: tuple[str], tmp_path: Path) -> None:
    settings = config(data, tmp_path, images=16)
    state = GeneratorState(settings)
    state.load(fit(settings), "cpu")
    assert any(float(state.ema.conv(i).noise.weight) != 0 for i in range(state.ema.num_convs))


def test_the_relativistic_loss_is_of_pairs(data: tuple[str], tmp_path: Path) -> None:
    """With a discriminator that says the same to everything both losses are log 2."""
    settings = config(data, tmp_path, loss="relativistic", ada_images=0)
    state = GeneratorState(settings)
    with torch.no_grad():
        state.d.final_linear[-1].weight.zero_()
        state.d.final_linear[-1].bias.fill_(7.0)  # only differences count
    training = GeneratorTraining(state, settings, torch.zeros(8, 3, 16, 16, dtype=torch.uint8))
    losses = training.step()
    for name in ("loss_g", "loss_d"):
        assert float(losses[name]) == pytest.approx(math.log(2), abs=1e-5)
    assert {"r1", "r2"} <= losses.keys()


def test_the_logistic_loss_has_no_penalty_of_fakes(data: tuple[str], tmp_path: Path) -> None:
    settings = config(data, tmp_path)
    pictures = torch.zeros(8, 3, 16, 16, dtype=torch.uint8)
    losses = GeneratorTraining(GeneratorState(settings), settings, pictures).step()
    assert "r1" in losses
    assert "r2" not in losses


# ---------------------------------------------------------------------- a second discriminator


def test_it_learns_and_pulls_the_generator_by_its_weight(
    data: tuple[str], eyes: str, tmp_path: Path
) -> None:
    def training(**changes: object) -> GeneratorTraining:
        settings = config(data, tmp_path, ada_images=0, **changes)
        torch.manual_seed(0)
        state = GeneratorState(settings)
        torch.manual_seed(1)  # one more network has drawn its weights
        return GeneratorTraining(state, settings, load_pictures(data, 16))

    def generator_after(made: GeneratorTraining) -> torch.Tensor:
        made.step()
        return torch.cat([p.detach().flatten() for p in made.state.g.parameters()])

    alone = generator_after(training())
    ignored = generator_after(training(vision=eyes, vision_weight=0.0))
    heard = training(vision=eyes, vision_weight=1.0)
    assert torch.equal(alone, ignored)
    assert float((generator_after(heard) - alone).abs().max()) > 1e-4
    losses = [float(heard.step()["loss_second"]) for _ in range(12)]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


def test_a_second_discriminator_needs_its_file(data: tuple[str], tmp_path: Path) -> None:
    with pytest.raises(AssetError, match=r"nothing\.safetensors is missing"):
        fit(config(data, tmp_path, vision=str(tmp_path / "nothing.safetensors")))
