"""The methods `restyle` and `psp`: the iteration's arithmetic, official files, what they refuse."""

import gzip
import json
import logging
from functools import partial
from pathlib import Path

import pytest
import torch

from models.checkpoints.load import load_generator
from models.encoders.checkpoint import build_encoder, load_encoder
from models.encoders.psp import EncoderArchitecture
from models.encoders.restyle import BackboneEncoder, ProgressiveBackboneEncoder
from models.errors import AssetError, ConfigError
from models.inversion.base import Inversion, SampleRng
from models.inversion.registry import load_method
from models.inversion.restyle import Restyle
from models.stylegan2.generator import Generator
from tasks.benchmark.costs import network_parameters
from tests.models.tiny_networks import save_network, save_tiny_encoder


def save(folder: Path, generator: Generator, kind: str, in_channels: int) -> str:
    path = folder / "x.safetensors"
    return str(save_tiny_encoder(path, generator, kind=kind, in_channels=in_channels))


def bootstrapped(path: Path, generator: Generator, first_stage: str) -> Path:
    architecture = EncoderArchitecture.tiny(generator, in_channels=6)
    make = partial(build_encoder, architecture)
    return save_network(path, generator, make, first_stage_sha256=first_stage)


def pictures() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)


@pytest.mark.parametrize("kind", ["psp", "e4e", "restyle-psp", "restyle-e4e"])
def test_passes_add_up_from_the_average(
    tmp_path: Path, tiny_generator: Generator, kind: str
) -> None:
    path = save(tmp_path, tiny_generator, kind, 6)
    method = load_method("restyle", tiny_generator, checkpoint=path, iterations=3)
    found = method.invert(pictures(), None, SampleRng([0, 1]))
    encoder = load_encoder(path, 8, 16).encoder
    w_plus = tiny_generator.latent_avg.expand(2, 8, -1)
    with torch.no_grad():
        for _ in range(3):
            render = tiny_generator.synthesis(w_plus)
            w_plus = w_plus + encoder(torch.cat([pictures(), render], 1))
    torch.testing.assert_close(found.w_plus, w_plus, atol=1e-5, rtol=1e-5)
    assert set(method.hashes()) == {"restyle"}


def test_passes_go_on_from_an_earlier_method(tmp_path: Path, tiny_generator: Generator) -> None:
    """Two passes are one pass, and one more from its codes."""
    path = save(tmp_path, tiny_generator, "restyle-psp", 6)
    one, two = (
        load_method("restyle", tiny_generator, checkpoint=path, iterations=n) for n in (1, 2)
    )
    first = one.invert(pictures(), None, SampleRng([0, 1]))
    second = one.invert(pictures(), first, SampleRng([0, 1]))
    want = two.invert(pictures(), None, SampleRng([0, 1]))
    torch.testing.assert_close(second.w_plus, want.w_plus)
    failed = Inversion(w_plus=first.w_plus, failures={1: "before"})
    assert one.invert(pictures(), failed, SampleRng([0, 1])).failures == {1: "before"}


def test_a_network_trained_on_an_encoders_codes_begins_with_them(
    tmp_path: Path, tiny_generator: Generator, caplog: pytest.LogCaptureFixture
) -> None:
    """Alone it is the chain of both; another encoder is warned of, none is refused."""
    first = str(save_tiny_encoder(tmp_path / "first.safetensors", tiny_generator))
    e4e = load_method("e4e", tiny_generator, checkpoint=first)
    path = str(bootstrapped(tmp_path / "x.safetensors", tiny_generator, e4e.hashes()["e4e"]))
    alone = load_method("restyle", tiny_generator, checkpoint=path, first_stage=first)
    seeds = SampleRng([0, 1])
    want = alone.invert(pictures(), e4e.invert(pictures(), None, seeds), seeds)
    assert torch.equal(alone.invert(pictures(), None, seeds).w_plus, want.w_plus)
    assert alone.hashes()["first_stage"] == e4e.hashes()["e4e"]
    assert "another first stage" not in caplog.text
    # Both networks count, and are found by what walks over a method's networks.
    both = network_parameters(alone)
    assert both == network_parameters(e4e) + network_parameters(alone, is_first=False)
    without = load_method("restyle", tiny_generator, checkpoint=path)
    with pytest.raises(ConfigError, match=r"restyle: the network goes on from .*`first_stage`"):
        without.invert(pictures(), None, seeds)
    chained = [m.invert(pictures(), want, seeds).w_plus for m in (without, alone)]
    assert torch.equal(*chained)
    second = str(save_tiny_encoder(tmp_path / "second.safetensors", tiny_generator, width=8))
    with caplog.at_level(logging.WARNING):
        load_method("restyle", tiny_generator, checkpoint=path, first_stage=second)
    assert "restyle: the network was trained on the codes of another first stage" in caplog.text


def test_a_picture_that_is_not_finite_fails_alone(
    tmp_path: Path, tiny_generator: Generator
) -> None:
    path = save(tmp_path, tiny_generator, "restyle-psp", 6)
    method = load_method("restyle", tiny_generator, checkpoint=path, iterations=2)
    broken = pictures()
    broken[1] = float("nan")
    found = method.invert(broken, None, SampleRng([0, 1]))
    assert list(found.failures) == [1]
    assert "after pass 1" in found.failures[1]
    torch.testing.assert_close(found.w_plus[1], tiny_generator.latent_avg.expand(8, -1))
    clean = method.invert(pictures(), None, SampleRng([0, 1]))
    torch.testing.assert_close(found.w_plus[0], clean.w_plus[0], atol=1e-5, rtol=1e-5)


def test_encoders_of_the_other_sort_are_refused(tmp_path: Path, tiny_generator: Generator) -> None:
    three = save(tmp_path, tiny_generator, "psp", 3)
    with pytest.raises(AssetError, match="sees 3 channels, expected 6: ReStyle's encoders"):
        load_method("restyle", tiny_generator, checkpoint=three)
    with pytest.raises(ConfigError, match="iterations must be >= 1, got 0"):
        load_method("restyle", tiny_generator, checkpoint=three, iterations=0)
    six = save(tmp_path, tiny_generator, "psp", 6)
    for name in ("e4e", "psp"):
        with pytest.raises(AssetError, match=f"{name}: the encoder .* sees 6 channels, expected 3"):
            load_method(name, tiny_generator, checkpoint=six)


def test_psp_is_one_pass_of_untied_rows(tmp_path: Path, tiny_generator: Generator) -> None:
    path = save(tmp_path, tiny_generator, "psp", 3)
    method = load_method("psp", tiny_generator, checkpoint=path)
    found = method.invert(pictures(), None, SampleRng([0, 1]))
    with torch.no_grad():
        want = tiny_generator.latent_avg + load_encoder(path, 8, 16).encoder(pictures())
    torch.testing.assert_close(found.w_plus, want, atol=1e-5, rtol=1e-5)
    assert set(method.hashes()) == {"psp"}
    with pytest.raises(AssetError, match=r"psp: no bundled weights .*refinery train psp"):
        load_method("psp", tiny_generator)


# ---------------------------------------------------------------------- official files


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("BackboneEncoder", BackboneEncoder),
        ("ProgressiveBackboneEncoder", ProgressiveBackboneEncoder),
    ],
)
def test_official_restyle_checkpoints_load_strictly(
    shared: Path, tmp_path: Path, name: str, cls: type
) -> None:
    with gzip.open(shared / "golden" / "encoders" / "manifest.json.gz") as file:
        recipe = json.load(file)["recipe"]["ganinv_ProgressiveBackbone_6ch_1024"]["keys"]
    state = {
        f"encoder.{k}": torch.tensor(0 if k.endswith("tracked") else index / 1000).expand(shape)
        for index, (k, (shape, _)) in enumerate(recipe.items())
    }
    path = tmp_path / "restyle.pt"
    average = torch.randn(18, 512)
    options = {"encoder_type": name, "input_nc": 6}
    torch.save({"state_dict": state, "latent_avg": average, "opts": options}, path)
    loaded = load_encoder(path, 18, 512)
    assert type(loaded.encoder) is cls
    found = loaded.encoder.state_dict()
    assert {k: list(v.shape) for k, v in found.items()} == {k: s for k, (s, _) in recipe.items()}
    assert torch.equal(found["styles.17.linear.bias"], state["encoder.styles.17.linear.bias"])
    assert torch.equal(loaded.latent_avg, average)
    state["encoder.latlayer1.weight"] = state.pop("encoder.styles.3.convs.0.bias")
    torch.save({"state_dict": state, "opts": options}, path)
    expected = rf"not an official {name} .* 1 missing \(styles\.3\.convs\.0\.bias \[512\]\); 1 unex"
    with pytest.raises(AssetError, match=expected):
        load_encoder(path, 18, 512)


# ---------------------------------------------------------------------- the bundled network


def test_the_bundled_network_corrects_the_bundled_e4e(caplog: pytest.LogCaptureFixture) -> None:
    """Without a setting: its own first stage, as many passes as it has learned, nearer pictures."""
    generator = load_generator("faces64")
    z = torch.randn(8, generator.z_dim, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        inputs = generator.synthesis(generator.mapping(z, truncation_psi=0.8)).clamp(-1, 1)
    seeds = SampleRng(range(8))
    with caplog.at_level(logging.WARNING):
        e4e, restyle = load_method("e4e", generator), load_method("restyle", generator)
    assert caplog.text == ""
    assert isinstance(restyle, Restyle)
    assert restyle.iterations == 2
    assert restyle.hashes()["first_stage"] == e4e.hashes()["e4e"]
    first, found = (m.invert(inputs, None, seeds).render(generator) for m in (e4e, restyle))
    mse = [(x.detach() - inputs).square().mean((1, 2, 3)) for x in (first, found)]
    assert mse[1].mean() < 0.9 * mse[0].mean()
    assert (mse[1] < mse[0]).sum() >= 6
