"""Encoder training: schedules, loss table, exact resume, what is written, and that it learns."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from models.encoders.checkpoint import load_encoder
from models.errors import AssetError, ConfigError
from models.files import file_sha256
from models.inversion.base import SampleRng
from models.inversion.registry import load_method
from models.stylegan2.generator import Generator, weights_hash
from tasks.training import trainer
from tasks.training.encoder import (
    EncoderObjective,
    FitCycleConfig,
    FitEncoderConfig,
    FitLsapConfig,
    FitPspConfig,
    FitRestyleConfig,
    FitWEncoderConfig,
    absolute_codes,
    fit,
)
from tasks.training.losses import PictureLosses, code_distance, delta_penalty
from tasks.training.schedules import annealed, closed_offsets, open_offsets, progress
from tests.tasks.training.conftest import SMALL, held_out


@pytest.fixture
def config(places: dict[str, Any]) -> FitEncoderConfig:
    return FitEncoderConfig(**places, **SMALL, learning_rate=3e-3, synthetic_fraction=0.25)


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


def test_delta_penalty_is_a_mean_of_relative_norms_with_a_gradient_at_zero() -> None:
    deltas = torch.tensor([[[3.0, 4.0], [0.0, 2.0]], [[0.0, 0.0], [0.0, 0.0]]], requires_grad=True)
    penalty = delta_penalty(deltas, num_ws=5, spread=0.25)
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
        assert grid.size == (4 * 3 * 32, 2 * 32)  # eight: input, result, edit; four to a row
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
    encoder = EncoderObjective(again, load(config)).network
    want = load_encoder(path, 8, 16).encoder.state_dict()
    assert all(torch.equal(value, want[name]) for name, value in encoder.state_dict().items())
    card = json.loads(fit(again).with_suffix(".json").read_text())
    assert card["provenance"]["settings"]["start_from"] == "e4e.safetensors"
    with pytest.raises(AssetError, match=r"start_from .*: its width is 4, this run's 6; choose"):
        EncoderObjective(dataclasses.replace(again, width=6), load(config))


def test_the_generator_takes_no_gradient_and_stays(config: FitEncoderConfig) -> None:
    generator = load(config)
    before = weights_hash(generator)
    objective = EncoderObjective(config, generator)
    pictures = held_out(config)
    start = {name: p.detach().clone() for name, p in objective.network.named_parameters()}
    for shown in (0, 8, 32):
        logged = objective.step(pictures, shown)
        assert all(value.isfinite().all() for value in logged.values())
    assert weights_hash(generator) == before
    assert all(p.grad is None for p in generator.parameters())
    still = [n for n, p in objective.network.named_parameters() if torch.equal(p, start[n])]
    # Every row is open by now, so every head learns (a gate's ReLU may be dead at these widths).
    assert not [name for name in still if ".fc" not in name]


def test_it_learns(config: FitEncoderConfig) -> None:
    """On pictures that the generator can draw, forty steps beat the mean code clearly."""
    generator = load(config)
    torch.manual_seed(0)
    objective = EncoderObjective(dataclasses.replace(config, images=320), generator)
    z = torch.randn(64, 16, generator=torch.Generator().manual_seed(7))
    pictures = generator.synthesis(generator.mapping(z)).clamp(-1, 1)
    mean_code = generator.latent_avg.expand(64, 8, -1)
    start = (generator.synthesis(mean_code) - pictures).square().mean()
    for step in range(40):
        objective.step(pictures[torch.randint(64, (8,))], 8 * step)
    scores, _ = objective.score(pictures)
    assert scores["mse"].mean() < 0.85 * start


@pytest.mark.parametrize("has_instructions", [True, False])
def test_emulated_bfloat16_is_warned_of(
    config: FitEncoderConfig,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    has_instructions: bool,
) -> None:
    monkeypatch.setattr(trainer, "has_bfloat16_instructions", lambda: has_instructions)
    trainer.set_up(config)
    assert not caplog.records
    trainer.set_up(dataclasses.replace(config, precision="bfloat16"))
    assert ("set precision = float32" in caplog.text) is not has_instructions


def test_bfloat16_trains_and_only_validation_is_optional(config: FitEncoderConfig) -> None:
    settings = {"precision": "bfloat16", "images": 16, "validation": (), "synthetic_fraction": 0.0}
    path = fit(dataclasses.replace(config, **settings))
    assert load_encoder(path, 8, 16).card["scores"] == {}
    assert "code" not in rows(config)[-1]


# ---------------------------------------------------------------------- other methods' encoders


def preset(cls: type[FitEncoderConfig], config: FitEncoderConfig, **more: Any) -> Any:
    """The preset's config with the small run's settings."""
    names = ("generator", "data", "validation", "out")
    given = {name: getattr(config, name) for name in names}
    return cls(**(given | SMALL | {"learning_rate": 3e-3, "synthetic_fraction": 0.0} | more))


def test_the_way_back_is_cycle_encoding_s() -> None:
    """Its 750,000 steps: the last row closes at 646,000, one more every 4,000, none at 714,000."""
    start, end = FitCycleConfig.close_start, FitCycleConfig.close_end
    for step, still_open in (
        (0, 17),
        (645_999, 17),
        (646_000, 17),
        (650_000, 16),
        (710_000, 1),
        (714_000, 0),
        (750_000, 0),
    ):
        assert closed_offsets(step / 750_000, 18, start, end) == still_open, step
    shrink = FitCycleConfig.shrink_start, FitCycleConfig.shrink_end
    assert progress(0.1, *shrink) == 0.0
    assert progress(650 / 750, *shrink) == pytest.approx(1.0)
    assert 2e-4 * FitCycleConfig.delta_growth == pytest.approx(3.08e-3, rel=1e-3)
    assert 0.1 * FitCycleConfig.adversarial_decay == pytest.approx(3.05e-6, rel=1e-3)


def test_cycle_opens_closes_and_ends_in_w(config: FitEncoderConfig) -> None:
    path = fit(preset(FitCycleConfig, config, images=400, log_images=8))
    assert path.name == "cycle.safetensors"
    opened = [row["rows"] for row in rows(config) if "rows" in row]
    assert opened[0] == 1.0
    assert max(opened) == 8.0
    assert opened[-1] == 1.0
    assert opened.index(8.0) < len(opened) / 4 < 3 * len(opened) / 4 < opened[::-1].index(1.0) + 40
    loaded = load_encoder(path, 8, 16)
    assert loaded.card["space"] == "w"
    assert loaded.card["scores"]["offset_norm"] == 0.0
    codes = loaded.encoder(held_out(config))
    assert torch.equal(codes, codes[:, :1].expand_as(codes))


def test_a_w_encoder_never_opens_a_row(config: FitEncoderConfig) -> None:
    path = fit(preset(FitWEncoderConfig, config))
    assert {row["rows"] for row in rows(config) if "rows" in row} == {1.0}
    card = load_encoder(path, 8, 16).card
    assert card["space"] == "w"
    assert card["scores"]["offset_norm"] == 0.0


def test_lsap_aligns_all_layers_from_the_first_step(config: FitEncoderConfig) -> None:
    objective = EncoderObjective(preset(FitLsapConfig, config), load(config))
    logged = objective.step(held_out(config), 0)
    assert logged["rows"] == 1.0
    assert "discriminator" not in logged
    quirk = preset(FitLsapConfig, config, align_open_rows=True)
    torch.manual_seed(0)
    one = EncoderObjective(quirk, load(config))
    torch.manual_seed(0)
    all_rows = EncoderObjective(preset(FitLsapConfig, config), load(config))
    pictures = held_out(config)
    first = one.step(pictures, 0)["alignment"]
    w, deltas = all_rows._encode(pictures)
    codes = absolute_codes(w, deltas, all_rows.generator)
    torch.testing.assert_close(first, all_rows.style_space.loss(codes, 1))
    assert all_rows.step(pictures, 0)["alignment"].mean() < 4 * first.mean()


def test_alignment_lowers_nscd(config: FitEncoderConfig) -> None:
    """The same run with and without the term; nothing else differs."""

    def nscd(weight: float) -> float:
        torch.manual_seed(0)
        settings = {"nscd_weight": weight, "open_start": 0.0, "open_end": 0.01, "images": 240}
        objective = EncoderObjective(preset(FitLsapConfig, config, **settings), load(config))
        for step in range(30):
            objective.step(held_out(config), 8 * step)
        return float(objective.score(held_out(config))[0]["nscd"].mean())

    assert nscd(0.5) < 0.9 * nscd(0.0)


def test_psp_starts_from_an_e4e_trunk(config: FitEncoderConfig, tmp_path: Path) -> None:
    e4e = fit(dataclasses.replace(config, images=16))
    settings = {"start_from": str(e4e), "out": str(tmp_path / "psp")}
    objective = EncoderObjective(preset(FitPspConfig, config, **settings), load(config))
    want = load_encoder(e4e, 8, 16).encoder.state_dict()
    for name, value in objective.network.state_dict().items():
        assert torch.equal(value, want[name]) != name.startswith("styles."), name
    path = fit(preset(FitPspConfig, config, **settings))
    assert load_encoder(path, 8, 16).encoder.architecture.kind == "psp"
    assert load_encoder(path, 8, 16).card["space"] == "w_plus"


def test_restyle_adds_to_what_it_rendered(config: FitEncoderConfig, tmp_path: Path) -> None:
    e4e = fit(dataclasses.replace(config, images=16))
    settings = {"start_from": str(e4e), "out": str(tmp_path / "restyle"), "iterations": 3}
    fit_config = preset(FitRestyleConfig, config, **settings)
    objective = EncoderObjective(fit_config, load(config))
    objective.network.eval()
    pictures = held_out(config)
    with torch.no_grad():
        first = absolute_codes(*objective._encode(pictures), objective.generator)
        # The new channels begin without a say: the first pass is the e4e encoder's.
        want = load_encoder(e4e, 8, 16).encoder(pictures) + objective.generator.latent_avg
        torch.testing.assert_close(first, want, atol=1e-5, rtol=1e-5)
        again = objective._encode(pictures, first)
        both = absolute_codes(*again, objective.generator, first)
        alone = absolute_codes(*again, objective.generator) - objective.generator.latent_avg
        torch.testing.assert_close(both, first + alone, atol=1e-6, rtol=1e-6)
    logged = objective.step(pictures, 32)
    assert all(value.isfinite().all() for value in logged.values())
    path = fit(fit_config)
    loaded = load_encoder(path, 8, 16)
    assert loaded.encoder.architecture.in_channels == 6
    assert load_method("restyle", load(config), checkpoint=str(path)).iterations == 3
    assert load_method("restyle", load(config), checkpoint=str(path), iterations=2).iterations == 2


def test_restyle_begins_with_a_first_stages_codes(config: FitEncoderConfig, tmp_path: Path) -> None:
    """Its network is silent at first; the method finds the same codes as the training's passes."""
    e4e = fit(dataclasses.replace(config, images=16))
    settings = {"first_stage": str(e4e), "out": str(tmp_path / "restyle"), "iterations": 1}
    fit_config = preset(FitRestyleConfig, config, **settings, start_from=str(e4e), images=32)
    generator, pictures = load(config), held_out(config)
    objective = EncoderObjective(fit_config, generator)
    first = load_encoder(e4e, 8, 16).encoder(pictures) + generator.latent_avg
    before = objective.score(pictures)[1][0]
    torch.testing.assert_close(before, generator.synthesis(first), atol=1e-5, rtol=1e-5)
    path = fit(fit_config)
    loaded = load_encoder(path, 8, 16)
    assert loaded.encoder.architecture.in_channels == 6
    assert loaded.card["first_stage_sha256"] == file_sha256(e4e)
    assert loaded.card["provenance"]["settings"]["first_stage"] == "e4e.safetensors"

    method = load_method(
        "restyle", generator, checkpoint=str(path), first_stage=str(e4e), iterations=1
    )
    found = method.invert(pictures, None, SampleRng([0] * len(pictures))).w_plus
    seen = torch.cat([pictures, generator.synthesis(first)], 1)
    torch.testing.assert_close(found, first + loaded.encoder(seen), atol=1e-5, rtol=1e-5)
    assert (found - first).abs().mean() > 1e-4  # 32 pictures taught it to say something

    # A run that goes on from that network goes on correcting.
    settings = {"start_from": str(path), "out": str(tmp_path / "again")}
    again = EncoderObjective(dataclasses.replace(fit_config, **settings), generator)
    again.network.eval()
    torch.testing.assert_close(again.network(seen), loaded.encoder(seen))


def test_first_codes_are_moved_towards_those_of_another_picture(
    config: FitEncoderConfig, tmp_path: Path
) -> None:
    e4e = fit(dataclasses.replace(config, images=16))
    settings = {"first_stage": str(e4e), "out": str(tmp_path / "restyle"), "first_mixed": 0.5}
    objective = EncoderObjective(preset(FitRestyleConfig, config, **settings), load(config))
    codes = objective._first_codes(held_out(config))
    assert codes is not None
    mixed = objective._mixed(codes)
    assert mixed is not None
    towards = codes.roll(1, 0) - codes
    share = ((mixed - codes) * towards).sum((1, 2)) / towards.square().sum((1, 2))
    torch.testing.assert_close(mixed, codes + share[:, None, None] * towards)
    assert share.min() >= 0
    assert 0.05 < share.max() <= 0.5
    assert share.std() > 0.01  # each picture its own


def test_offsets_are_those_of_the_codes_and_not_of_one_pass(
    config: FitEncoderConfig, tmp_path: Path
) -> None:
    """Passes that each add a little would otherwise add up to offsets that nothing holds."""
    settings = {"out": str(tmp_path / "restyle"), "open_start": 0.0, "open_end": 0.0}
    objective = EncoderObjective(preset(FitRestyleConfig, config, **settings), load(config))
    stage, pictures = objective._set_stage(1.0), held_out(config)
    guess = objective.generator.latent_avg + torch.randn(len(pictures), 8, 16)
    _, logged, codes = objective._losses(pictures, torch.empty(0), guess, 1.0, stage)
    want = (codes[:, 1:] - codes[:, :1]).norm(dim=2).mean(1) / objective.spread
    torch.testing.assert_close(logged["delta"], want)
    assert want.min() > 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"iterations": 0}, "iterations must be >= 1"),
        ({"first_mixed": 0.5}, r"first_mixed: 0\.5 of the way .* set `first_stage`"),
        ({"close_start": 0.9, "close_end": 0.8}, "close_start and close_end"),
        ({"shrink_start": -0.1, "shrink_end": 0.8}, r"shrink_start must be in 0\.\.1, got -0\.1"),
        ({"close_start": 0.1, "close_end": 0.2}, "close_start: expected at least open_end"),
        ({"adversarial_decay": 0.0}, "adversarial_decay must be > 0 and <= 1, got 0"),
    ],
)
def test_an_impossible_way_is_refused(
    config: FitEncoderConfig, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(config, **settings)


# ---------------------------------------------------------------------- settings and the page


def test_the_rate_of_cycle_does_not_fall_before_only_w_is_left(config: FitEncoderConfig) -> None:
    with pytest.raises(ConfigError, match=r"anneal: .* 1 - close_end = 0\.2, got 0\.3"):
        preset(FitCycleConfig, config, close_end=0.8, close_start=0.7, anneal=0.3)
    preset(FitCycleConfig, config, close_end=0.8, close_start=0.7, anneal=0.2)


def test_the_last_pictures_are_held_out(config: FitEncoderConfig) -> None:
    pictures = trainer.load_pictures(config.data, 32)
    wanted = dataclasses.replace(config, validation=(), validation_last=3)
    kept, held = trainer._pictures(wanted, 32)
    assert held is not None
    assert torch.equal(held, pictures[-3:])
    assert torch.equal(kept, pictures[:-3])
    with pytest.raises(ConfigError, match="validation_last: expected 0"):
        dataclasses.replace(config, validation_last=3)
    with pytest.raises(ConfigError, match="leave none"):
        trainer._pictures(dataclasses.replace(wanted, validation_last=10**6), 32)


def test_disturbed_pictures_train_another_network(config: FitEncoderConfig, tmp_path: Path) -> None:
    def heads(share: float) -> torch.Tensor:
        out = str(tmp_path / f"share-{share}")
        file = fit(dataclasses.replace(config, disturbed=share, out=out, images=16))
        state = load_encoder(file, 8, 16).encoder.state_dict()
        return torch.cat([v.float().flatten() for v in state.values()])

    assert torch.equal(heads(0.0), heads(0.0))
    assert not torch.equal(heads(0.0), heads(1.0))
    with pytest.raises(ConfigError, match=r"disturbed must be in 0\.\.1, got 1\.5"):
        dataclasses.replace(config, disturbed=1.5)


def test_a_page_says_what_the_network_is_and_went_on_from(config: FitEncoderConfig) -> None:
    first = fit(config)
    page = first.with_name("E4E_CARD.md").read_text()
    assert "# e4e for tiny" in page
    assert "From random weights." in page
    again = dataclasses.replace(
        config, out=str(Path(config.out).parent / "again"), start_from=str(first), images=16
    )
    page = fit(again).with_name("E4E_CARD.md").read_text()
    assert "From e4e.safetensors (refinery train e4e), which had been shown 64." in page
    assert "**Shown.** 16" in page
