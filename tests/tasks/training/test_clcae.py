"""CLCAE's two trainings: what they write, exact resume, where they start, the memory."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from models.checkpoints.load import load_generator
from models.encoders.checkpoint import build_encoder, load_encoder, load_network
from models.encoders.clcae import CLCAE, ClcaeEncoder, load_clcae
from models.encoders.contrastive import TOWERS
from models.encoders.psp import EncoderArchitecture
from models.errors import AssetError, ConfigError
from models.inversion.base import Inversion, SampleRng
from models.inversion.registry import load_method
from models.stylegan2.generator import Generator, weights_hash
from tasks.training import clcae
from tasks.training.clcae import ClcaeObjective, FitClcaeConfig, PairMemory, fit
from tasks.training.clcae_align import AlignObjective, FitClcaeAlignConfig
from tasks.training.clcae_align import fit as fit_align
from tests.models.tiny_networks import save_tiny_encoder
from tests.tasks.training.conftest import held_out

SIZES: dict[str, Any] = {"width": 4, "units": (1, 1, 1, 1), "head_width": 8, "log_images": 16}


def align_config(folder: Path, generator_file: str, **settings: Any) -> FitClcaeAlignConfig:
    values = {"images": 64, "batch": 16, "hidden": 16, "held_out": 16, "checkpoint_images": 32}
    values |= {"generator": generator_file, "out": str(folder / "align")}
    return FitClcaeAlignConfig(**{**SIZES, **values, **settings})


@pytest.fixture
def config(places: dict[str, Any]) -> FitClcaeConfig:
    budget = {"images": 32, "batch": 8, "checkpoint_images": 16, "perceptual": "none"}
    widths = {"hidden": 8, "feature_hidden": 8, "feature_width": 8}
    return FitClcaeConfig(**places, **budget, **widths, **SIZES)


def rows(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------------- stage 1


def test_alignment_needs_no_pictures_and_learns(
    tmp_path: Path, generator_file: str, tiny_generator: Generator
) -> None:
    """Retrieval among held-out pairs is at least three times as good as chance (1 in 16)."""
    config = align_config(tmp_path, generator_file, images=960, checkpoint_images=10_000)
    path = fit_align(config)
    towers, _, card = load_network(path, TOWERS)
    assert path.name == "clcae-align.safetensors"
    assert card["generator_hash"] == weights_hash(tiny_generator)
    assert card["provenance"]["pairs_shown"] == 960
    assert card["scores"]["top1_code_of_picture"] >= 3 / 16
    assert card["scores"]["top1_picture_of_code"] >= 3 / 16
    assert not list((tmp_path / "align").glob("*.png"))
    objective = AlignObjective(config, tiny_generator)
    objective.network.load_state_dict(towers.state_dict())
    scores, _ = objective.score(torch.empty(0, 3, 32, 32))
    assert float(scores["align"].mean()) == pytest.approx(card["scores"]["align"], abs=1e-4)


def test_alignment_starts_from_an_encoder(tmp_path: Path, generator_file: str) -> None:
    generator = load_generator(generator_file)
    path = str(save_tiny_encoder(tmp_path / "e4e.safetensors", generator, stem_stride=2))
    encoder = load_encoder(path, 8, 16).encoder
    config = align_config(tmp_path, generator_file, start_from=path)
    tower = AlignObjective(config, generator).network.image
    for name, value in tower.state_dict().items():
        assert torch.equal(value, encoder.state_dict()[name]), name
    wide = align_config(tmp_path, generator_file, start_from=path, width=6)
    with pytest.raises(AssetError, match="no kernel of its trunk fits"):
        AlignObjective(wide, generator)


# ---------------------------------------------------------------------- stage 2


def test_a_run_writes_weights_that_the_method_takes(
    config: FitClcaeConfig, tmp_path: Path, generator_file: str, tiny_generator: Generator
) -> None:
    towers = fit_align(align_config(tmp_path, generator_file))
    config = dataclasses.replace(config, align=str(towers), start_from=str(towers))
    path = fit(config)
    encoder, _, card = load_clcae(path, 8, 16)
    assert card["kind"] == "clcae"
    assert card["generator_hash"] == weights_hash(tiny_generator)
    assert card["provenance"]["settings"]["align"] == "clcae-align.safetensors"
    assert encoder.architecture.feature_channels == 8
    logged = rows(config.out)
    for name in ("mse", "mse_w", "mse_w_plus", "feature", "align"):
        assert name in logged[0], name
    assert len(list(Path(config.out).glob("validation-*.png"))) == 2
    method = load_method("clcae", tiny_generator, checkpoint=str(path))
    pictures = torch.rand(2, 3, 32, 32) * 2 - 1
    found = method.invert(pictures, None, SampleRng([0, 1]))
    scores, _ = _settled(config, tiny_generator, encoder).score(pictures)
    mse = (found.render(tiny_generator) - pictures).square().mean((1, 2, 3))
    torch.testing.assert_close(mse, scores["mse"], atol=1e-4, rtol=1e-4)


def _settled(config: FitClcaeConfig, generator: Generator, encoder: ClcaeEncoder) -> ClcaeObjective:
    objective = ClcaeObjective(dataclasses.replace(config, align=None), generator)
    objective.network.load_state_dict(encoder.state_dict())
    return objective


def test_a_resumed_run_is_the_same_run(
    config: FitClcaeConfig, tmp_path: Path, generator_file: str
) -> None:
    towers = str(fit_align(align_config(tmp_path, generator_file, images=32)))
    config = dataclasses.replace(config, align=towers, log_images=8, align_memory=12)
    whole, _, _ = load_network(fit(config), CLCAE)
    stopped = dataclasses.replace(config, out=str(tmp_path / "stopped"), time_limit_s=0.0)
    for _ in range(2):
        assert fit(stopped).name == "checkpoint.pt"
    again, _, _ = load_network(fit(dataclasses.replace(stopped, time_limit_s=1e9)), CLCAE)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, atol=1e-6, rtol=1e-5)


def test_the_map_takes_the_activations_place_along_the_ramp(
    config: FitClcaeConfig, tiny_generator: Generator
) -> None:
    """Before the ramp G(w+, f) is G(w+), behind it f alone stands there."""
    tiny_generator.noises.noise_0.zero_()
    for index in range(tiny_generator.num_convs):
        tiny_generator.conv(index).noise.weight.data.zero_()
    objective = ClcaeObjective(config, tiny_generator)
    w_plus = tiny_generator.mapping(torch.randn(2, 16))
    features = torch.randn(2, 8, 16, 16)
    for share, scale in ((0.0, 0.0), (0.05, 0.5), (0.1, 1.0), (1.0, 1.0)):
        renders, activation = objective._renders(w_plus[:, 0], w_plus, features, share)
        blended = activation.lerp(features, scale)
        want = tiny_generator.synthesis(w_plus, features={5: blended})
        torch.testing.assert_close(renders["full"], want, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(renders["w"], tiny_generator.synthesis(w_plus))


def test_one_update_reaches_every_part(config: FitClcaeConfig, tiny_generator: Generator) -> None:
    objective = ClcaeObjective(config, tiny_generator)
    before = {k: v.clone() for k, v in objective.network.state_dict().items()}
    pictures = torch.rand(8, 3, 32, 32) * 2 - 1
    objective.step(pictures, 8)
    after = objective.network.state_dict()
    for name in (
        "styles.0.linear.weight",
        "styles_others.0.linear.weight",
        "cross_attention.3.multihead_attn.out_proj.weight",
        "content_layer.convs.0.weight",
        "content_layer.convs.2.weight",
    ):
        assert not torch.equal(after[name], before[name]), name


def test_w_can_be_rendered_for_a_share_of_the_batch(
    config: FitClcaeConfig, tiny_generator: Generator
) -> None:
    objective = ClcaeObjective(dataclasses.replace(config, w_share=0.25), tiny_generator)
    w_plus = tiny_generator.mapping(torch.randn(8, 16))
    renders, _ = objective._renders(w_plus[:, 0], w_plus, torch.zeros(8, 8, 16, 16), 1.0)
    assert {k: len(v) for k, v in renders.items()} == {"full": 8, "w_plus": 8, "w": 2}


def test_pairs_of_edits_weigh_what_an_edit_should_have_made(
    config: FitClcaeConfig, tiny_generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An encoder that finds codes and activation again has no loss; a map that holds the picture as
    it was has the distance between the picture and its edit."""
    objective = ClcaeObjective(dataclasses.replace(config, pair_weight=1.0), tiny_generator)
    codes = tiny_generator.mapping(torch.randn(4, 16))
    found = tiny_generator.activations(codes, 5, "const")
    edits = []

    def random_edits(*_: object) -> torch.Tensor:
        edits.append(torch.randn(4, 16))
        return edits[-1]

    monkeypatch.setattr(clcae, "random_edits", random_edits)
    for kept, is_found in ((found, True), (found + torch.randn_like(found), False)):
        monkeypatch.setattr(objective, "_encode", lambda _, kept=kept: (codes[:, 0], codes, kept))
        logged: dict[str, torch.Tensor] = {}
        total = objective._pair_losses(codes, logged)
        assert total.item() == pytest.approx(logged["mse_pair"].mean().item())
        if is_found:
            assert total.item() < 1e-9
        moved = codes + edits[-1][:, None]
        want = Inversion(w_plus=codes, features={5: kept}).edited(tiny_generator, moved)
        after = tiny_generator.synthesis(moved)
        expected = (want.render(tiny_generator) - after).square().mean((1, 2, 3))
        torch.testing.assert_close(logged["mse_pair"], expected)
        assert is_found or expected.min() > 1e-6


def test_a_run_with_pairs_logs_them(config: FitClcaeConfig) -> None:
    fit(dataclasses.replace(config, pair_weight=0.5))
    assert {"mse_pair", "mse"} <= rows(config.out)[0].keys()


def test_an_e4e_encoder_gives_its_heads(
    config: FitClcaeConfig, tmp_path: Path, tiny_generator: Generator
) -> None:
    """And then the codes are e4e's from the first step on."""
    path = save_tiny_encoder(tmp_path / "e4e.safetensors", tiny_generator, stem_stride=2)
    config = dataclasses.replace(config, start_from=str(path), is_centred=False)
    objective = ClcaeObjective(config, tiny_generator)
    pictures = torch.rand(2, 3, 32, 32) * 2 - 1
    e4e, _, _ = load_network(path, {"e4e": (EncoderArchitecture, build_encoder)})
    objective.network.eval()
    _, w_plus, _ = objective._encode(pictures)
    torch.testing.assert_close(w_plus, tiny_generator.latent_avg + e4e(pictures))


def test_a_run_goes_on_from_an_encoder_of_its_kind(config: FitClcaeConfig, tmp_path: Path) -> None:
    before = fit(dataclasses.replace(config, images=32))
    known = json.loads(before.with_suffix(".json").read_text())
    settings = {"start_from": str(before), "out": str(tmp_path / "more")}
    more = dataclasses.replace(config, **settings, images=16)
    generator = load_generator(config.generator)
    objective = ClcaeObjective(more, generator)
    started = objective.score(held_out(config))[0]["mse"].mean()
    assert float(started) == pytest.approx(known["scores"]["mse"], rel=1e-3)
    again = fit(more)
    assert again.read_bytes() != before.read_bytes()
    last = dataclasses.replace(more, start_from=str(again), out=str(tmp_path / "last"))
    made = json.loads(fit(last).with_suffix(".json").read_text())["provenance"]
    assert made["started_from"]["images_shown"] == 16
    assert made["started_from"]["started_from"]["images_shown"] == 32
    page = (tmp_path / "last" / "CLCAE_CARD.md").read_text()
    assert "which had been shown 16, itself from clcae.safetensors" in page
    with pytest.raises(AssetError, match=r"start_from .*: its hidden is 8, this run's 4; choose"):
        ClcaeObjective(dataclasses.replace(more, hidden=4), generator)


def test_alignment_takes_negatives_from_the_memory(
    config: FitClcaeConfig, tmp_path: Path, generator_file: str, tiny_generator: Generator
) -> None:
    towers = str(fit_align(align_config(tmp_path, generator_file, images=16)))
    config = dataclasses.replace(config, align=towers)
    objective = ClcaeObjective(config, tiny_generator)
    pictures = torch.rand(4, 3, 32, 32) * 2 - 1
    w = tiny_generator.mapping(torch.randn(4, 16))[:, 0].requires_grad_()
    alone = objective._align(pictures, w, pictures)
    assert objective.memory.codes is not None
    assert len(objective.memory.codes) == 4
    among = objective._align(pictures.flip(0), w, pictures)
    among.sum().backward()
    assert w.grad is not None
    assert float(w.grad.abs().sum()) > 0
    assert float((among - alone.flip(0)).detach().abs().max()) > 1e-4
    render = dataclasses.replace(config, align_target="render")
    objective = ClcaeObjective(render, tiny_generator)
    assert len(objective._align(pictures, w, pictures[:2])) == 2
    assert objective.memory.codes is None
    tiny_generator.conv1.conv.weight.data.add_(1)
    with pytest.raises(AssetError, match="its towers belong to generator"):
        ClcaeObjective(config, tiny_generator)


def test_the_memory_forgets_the_oldest_pairs() -> None:
    memory = PairMemory(5)
    for start in range(0, 9, 3):
        values = torch.arange(start, start + 3.0)[:, None]
        memory.add(values, -values)
    assert memory.pictures is not None
    assert memory.codes is not None
    assert memory.pictures[:, 0].tolist() == [4, 5, 6, 7, 8]
    assert memory.codes[:, 0].tolist() == [-4, -5, -6, -7, -8]
    empty = PairMemory(0)
    empty.add(torch.ones(2, 1), torch.ones(2, 1))
    assert empty.pictures is not None
    assert len(empty.pictures) == 0


def test_the_default_file_is_small_enough_to_ship() -> None:
    """Half precision, faces64's sizes: below 8 MiB."""
    config = FitClcaeConfig(generator="faces64", data=(), out="x", perceptual="none")
    objective = ClcaeObjective(config, load_generator("faces64"))
    state = objective.network.state_dict().values()
    size = sum(t.numel() * (2 if t.ndim > 1 and t.is_floating_point() else 4) for t in state)
    assert 7e6 < size < 8 * 2**20


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate must be > 0"),
        ({"feature_ramp": 1.5}, "feature_ramp must be in 0..1"),
        ({"align_target": "both"}, "align_target: expected one of input, render"),
        ({"batch": 1}, "batch must be >= 2"),
        ({"align_memory": -1}, "align_memory must be >= 0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FitClcaeConfig(generator="g", data=("d",), out="o", **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimiser": "sgd"}, "optimiser: expected one of adam, ranger"),
        ({"batch": 1}, "batch must be >= 2, got 1"),
        ({"balance": 2.0}, "balance must be in 0..1"),
    ],
)
def test_alignment_settings_out_of_range_are_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        FitClcaeAlignConfig(generator="g", out="o", **settings)
