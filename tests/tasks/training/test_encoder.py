"""Encoder training: schedules, loss table, exact resume, what is written, and that it learns."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from models.checkpoints.native import save_generator
from models.encoders.checkpoint import load_encoder
from models.errors import AssetError, ConfigError
from models.inversion.base import SampleRng
from models.inversion.registry import load_method
from models.stylegan2.generator import Generator, weights_hash
from tasks.training.encoder import (
    E4eObjective,
    FitEncoderConfig,
    absolute_codes,
    fit,
)
from tasks.training.losses import PictureLosses, code_distance, delta_penalty
from tasks.training.schedules import annealed, open_offsets

SMALL: dict[str, Any] = {
    "width": 4,
    "units": (1, 1, 1, 1),
    "head_width": 8,
    "batch": 8,
    "images": 64,
    "log_images": 16,
    "checkpoint_images": 32,
    "validation_images": 4,
    "perceptual": "none",
    "learning_rate": 3e-3,
    "synthetic_fraction": 0.25,
}


@pytest.fixture
def generator_file(tmp_path: Path, tiny_generator: Generator) -> str:
    return str(save_generator(tiny_generator, tmp_path / "tiny.safetensors", {"terms": "test"}))


@pytest.fixture
def config(tmp_path: Path, generator_file: str, face_bytes: list[bytes]) -> FitEncoderConfig:
    table = pa.table({"image": [{"bytes": data, "path": None} for data in face_bytes]})
    pq.write_table(table, tmp_path / "pictures.parquet")
    data = (str(tmp_path / "pictures.parquet"),)
    return FitEncoderConfig(
        generator=generator_file, data=data, validation=data, out=str(tmp_path / "run"), **SMALL
    )


def rows(config: FitEncoderConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(config.out) / "log.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------- schedules and losses


def test_offsets_open_as_published() -> None:
    """18 rows: an offset opens at step 20,000 of 300,000, one each 2,000, the last at 52,000."""
    start, end = 20 / 300, 52 / 300
    assert (FitEncoderConfig.open_start, FitEncoderConfig.open_end) == (start, end)
    for step, opened in [(0, 0), (19_999, 0), (20_000, 1), (21_999, 1), (22_000, 2), (50_000, 16)]:
        assert open_offsets(step / 300_000, 18, start, end) == opened, step
    assert open_offsets(52_000 / 300_000, 18, start, end) == 17
    assert open_offsets(1.0, 18, start, end) == 17
    opened = [open_offsets(i / 3000, 8, start, end) for i in range(3000)]
    assert opened == sorted(opened)
    assert set(opened) == set(range(8))


def test_rate_falls_along_a_cosine_at_the_end() -> None:
    assert annealed(0.3, 0.5) == 1.0
    assert annealed(0.5, 0.5) == 1.0
    assert annealed(0.75, 0.5) == pytest.approx(0.5)
    assert annealed(1.0, 0.5) == pytest.approx(0.0)
    assert annealed(1.0, 0.0) == 1.0


def test_delta_penalty_is_a_sum_of_norms_with_a_gradient_at_zero() -> None:
    deltas = torch.tensor([[[3.0, 4.0], [0.0, 2.0]], [[0.0, 0.0], [0.0, 0.0]]], requires_grad=True)
    penalty = delta_penalty(deltas)
    torch.testing.assert_close(penalty, torch.tensor([7.0, 0.0]), atol=1e-5, rtol=0)
    penalty.sum().backward()
    assert deltas.grad is not None
    torch.testing.assert_close(deltas.grad[0, 0], torch.tensor([0.6, 0.8]))
    assert not deltas.grad[1].any()


def test_code_distance_is_in_units_of_the_spread() -> None:
    found, wanted = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)
    found[0] = 1.0  # squared norm 4 on every row
    assert code_distance(found, wanted, 2.0).tolist() == [1.0, 0.0]


def test_loss_table_is_per_picture_and_weighted() -> None:
    a = torch.zeros(2, 3, 32, 32, requires_grad=True)
    b = torch.zeros(2, 3, 32, 32)
    b[1] = 0.5
    losses = PictureLosses({"mse": 2.0, "perceptual": 0.8, "identity": 0.1}, "refinery")
    table = losses(a, b)
    assert set(table) == {"mse", "perceptual"}  # no identity weights were given
    assert losses.perceptual_name == "trunk_distance"
    assert table["mse"].tolist() == [0.0, 0.25]
    assert float(table["perceptual"][0].detach()) == pytest.approx(0, abs=1e-6)
    assert table["perceptual"][1] > 0.01
    want = 2.0 * 0.125 + 0.8 * table["perceptual"].mean()
    torch.testing.assert_close(losses.total(table), want)
    assert set(PictureLosses({"mse": 1.0, "perceptual": 0.8}, "none").weights) == {"mse"}


def test_absolute_codes_put_offsets_on_the_open_rows(tiny_generator: Generator) -> None:
    w, deltas = torch.randn(2, 16), torch.randn(2, 3, 16)
    codes = absolute_codes(w, deltas, tiny_generator) - tiny_generator.latent_avg
    torch.testing.assert_close(codes[:, 0], w)
    torch.testing.assert_close(codes[:, 1:4], w[:, None] + deltas)
    torch.testing.assert_close(codes[:, 4:], w[:, None].expand(-1, 4, -1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be > 0"),
        ({"open_start": 0.5, "open_end": 0.2}, "expected 0 <= open_start <= open_end"),
        ({"synthetic_fraction": 1.0}, "leaves 0 real pictures, expected at least 2"),
        ({"precision": "float8"}, "expected one of float32, bfloat16, found 'float8'"),
        ({"images": 0}, "images must be >= 1, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FitEncoderConfig(generator="g", data=("d",), out="o", **{**SMALL, **settings})


# ---------------------------------------------------------------------- a run


def test_a_run_writes_weights_card_log_and_grids(
    config: FitEncoderConfig, tiny_generator: Generator
) -> None:
    path = fit(config)
    card = json.loads(path.with_suffix(".json").read_text())
    assert path.name == "e4e.safetensors"
    assert (card["kind"], card["generator_hash"]) == ("e4e", weights_hash(tiny_generator))
    assert card["provenance"]["images_shown"] == 64
    assert card["provenance"]["settings"]["data"] == ["pictures.parquet"]
    assert str(path.parent) not in path.with_suffix(".json").read_text()
    logged = rows(config)
    steps = [row for row in logged if "mse" in row]
    assert [row["images"] for row in steps] == [16, 32, 48, 64]
    assert {"images_per_s", "eta_s", "code", "delta", "adversarial", "discriminator"} <= set(
        steps[-1]
    )
    assert steps[0]["rows"] < steps[-1]["rows"] == 8
    with Image.open(path.parent / "validation-00000064.png") as grid:
        assert grid.size == (4 * 2 * 32, 2 * 32)  # eight pairs, four to a row
    # The scores in the card are those of the file, as any user would measure them.
    method = load_method("e4e", load(config), checkpoint=str(path))
    pictures = held_out(config)
    found = method.invert(pictures, None, SampleRng(range(8)))
    mse = (found.render(method.generator) - pictures).square().mean()
    assert card["scores"]["mse"] == pytest.approx(float(mse), rel=1e-3)
    assert logged[-1]["validation_mse"] == pytest.approx(float(mse), rel=1e-3)


def load(config: FitEncoderConfig) -> Generator:
    from models.checkpoints.load import load_generator

    return load_generator(config.generator)


def held_out(config: FitEncoderConfig) -> torch.Tensor:
    from tasks.training.data import load_pictures

    return load_pictures(config.validation, 32).float().div(127.5).sub(1)


def test_resuming_is_exact(config: FitEncoderConfig, tmp_path: Path) -> None:
    whole = fit(config)
    stopped = dataclasses.replace(config, out=str(tmp_path / "stopped"), time_limit_s=0.0)
    torch.manual_seed(99)
    for _ in range(4):
        # Each call takes one step, writes its checkpoint and leaves.
        assert fit(stopped).name == "checkpoint.pt"
    resumed = fit(dataclasses.replace(stopped, time_limit_s=float("inf")))
    assert resumed.read_bytes() == whole.read_bytes()
    assert (
        json.loads(resumed.with_suffix(".json").read_text())["scores"]
        == json.loads(whole.with_suffix(".json").read_text())["scores"]
    )


def test_a_checkpoint_of_another_encoder_is_not_resumed(config: FitEncoderConfig) -> None:
    fit(dataclasses.replace(config, time_limit_s=0.0))
    with pytest.raises(
        AssetError, match=r"cannot be resumed.*architecture was .*'width': 4.*'width': 6"
    ):
        fit(dataclasses.replace(config, width=6))


def test_a_run_can_start_from_an_earlier_encoder(config: FitEncoderConfig, tmp_path: Path) -> None:
    path = fit(config)
    again = dataclasses.replace(config, start_from=str(path), out=str(tmp_path / "again"))
    encoder = E4eObjective(again, load(config)).encoder
    want = load_encoder(path, 8, 16).encoder.state_dict()
    assert all(torch.equal(value, want[name]) for name, value in encoder.state_dict().items())
    card = json.loads(fit(again).with_suffix(".json").read_text())
    assert card["provenance"]["settings"]["start_from"] == "e4e.safetensors"
    with pytest.raises(AssetError, match=r"start_from .*'width': 4.* this run's are .*'width': 6"):
        E4eObjective(dataclasses.replace(again, width=6), load(config))


def test_the_generator_takes_no_gradient_and_stays(config: FitEncoderConfig) -> None:
    generator = load(config)
    before = weights_hash(generator)
    objective = E4eObjective(config, generator)
    pictures = held_out(config)
    start = {name: p.detach().clone() for name, p in objective.encoder.named_parameters()}
    for shown in (0, 8, 32):
        logged = objective.step(pictures, shown)
        assert all(value.isfinite().all() for value in logged.values())
    assert weights_hash(generator) == before
    assert all(p.grad is None for p in generator.parameters())
    still = [n for n, p in objective.encoder.named_parameters() if torch.equal(p, start[n])]
    # Every row is open by now, so every head learns (a gate's ReLU may be dead at these widths).
    assert not [name for name in still if ".fc" not in name]


def test_it_learns(config: FitEncoderConfig) -> None:
    """On pictures that the generator can draw, forty steps beat the mean code clearly."""
    generator = load(config)
    torch.manual_seed(0)
    objective = E4eObjective(dataclasses.replace(config, images=320), generator)
    z = torch.randn(64, 16, generator=torch.Generator().manual_seed(7))
    pictures = generator.synthesis(generator.mapping(z)).clamp(-1, 1)
    mean_code = generator.latent_avg.expand(64, 8, -1)
    start = (generator.synthesis(mean_code) - pictures).square().mean()
    for step in range(40):
        objective.step(pictures[torch.randint(64, (8,))], 8 * step)
    scores, _ = objective.score(pictures)
    assert scores["mse"].mean() < 0.85 * start


def test_bfloat16_trains_and_only_validation_is_optional(config: FitEncoderConfig) -> None:
    settings = {"precision": "bfloat16", "images": 16, "validation": (), "synthetic_fraction": 0.0}
    path = fit(dataclasses.replace(config, **settings))
    assert load_encoder(path, 8, 16).card["scores"] == {}
    assert "code" not in rows(config)[-1]
