"""The method `e4e`: what it adds to its encoder, which files it takes, what it refuses."""

import dataclasses
from pathlib import Path

import pytest
import torch

from models.encoders.checkpoint import LoadedEncoder, load_encoder
from models.errors import AssetError
from models.inversion.base import SampleRng
from models.inversion.e4e import E4e, E4eConfig
from models.inversion.registry import load_method
from models.stylegan2.generator import Generator, weights_hash
from tests.models.tiny_networks import save_tiny_encoder


def save(folder: Path, generator_hash: str) -> str:
    return str(save_tiny_encoder(folder / "e4e.safetensors", generator_hash))


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_generator: Generator) -> str:
    return save(tmp_path, weights_hash(tiny_generator))


def pictures(n: int = 3) -> torch.Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)


def test_codes_are_the_encoders_plus_latent_avg(tiny_generator: Generator, checkpoint: str) -> None:
    method = load_method("e4e", tiny_generator, checkpoint=checkpoint)
    found = method.invert(pictures(), None, SampleRng([0, 1, 2]))
    encoder = load_encoder(checkpoint, 8, 16).encoder
    with torch.no_grad():
        want = tiny_generator.latent_avg + encoder(pictures())
    torch.testing.assert_close(found.w_plus, want, atol=1e-5, rtol=1e-5)
    assert not found.failures
    assert set(method.hashes()) == {"e4e"}
    assert len(method.hashes()["e4e"]) == 64


def test_a_stored_latent_avg_wins(
    tiny_generator: Generator, checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = load_method("e4e", tiny_generator, checkpoint=checkpoint)
    own = torch.randn(8, 16, generator=torch.Generator().manual_seed(2))

    def load(*args: object) -> LoadedEncoder:
        return dataclasses.replace(load_encoder(*args), latent_avg=own)  # type: ignore[arg-type]

    monkeypatch.setattr("models.inversion.e4e.load_encoder", load)
    stored = load_method("e4e", tiny_generator, checkpoint=checkpoint)
    a, b = (m.invert(pictures(), None, SampleRng([0, 1, 2])).w_plus for m in (plain, stored))
    torch.testing.assert_close(b - a, (own - tiny_generator.latent_avg).expand(3, -1, -1))


def test_official_names_with_other_sizes_are_refused(
    tiny_generator: Generator, tmp_path: Path, checkpoint: str
) -> None:
    state = load_encoder(checkpoint, 8, 16).encoder.state_dict()
    torch.save({f"encoder.{k}": v for k, v in state.items()}, tmp_path / "small.pt")
    with pytest.raises(AssetError, match="not an official Encoder4Editing for a generator with 8"):
        E4e(tiny_generator, E4eConfig(checkpoint=str(tmp_path / "small.pt")))


def test_no_encoder_names_the_setting(tiny_generator: Generator) -> None:
    with pytest.raises(AssetError, match=r"no bundled weights belong .* set `checkpoint`"):
        load_method("e4e", tiny_generator)


def test_an_encoder_of_another_generator_needs_permission(
    tiny_generator: Generator, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = save(tmp_path, "f" * 64)
    with pytest.raises(AssetError, match=r"trained with generator ffffffffffff.*allow_other"):
        load_method("e4e", tiny_generator, checkpoint=path)
    load_method("e4e", tiny_generator, checkpoint=path, allow_other_generator=True)
    assert "was trained with generator ffffffffffff" in caplog.text


def test_a_generator_without_latent_avg_is_refused(
    tiny_generator: Generator, tmp_path: Path
) -> None:
    tiny_generator.latent_avg.fill_(float("nan"))
    path = save(tmp_path, weights_hash(tiny_generator))
    with pytest.raises(AssetError, match="no latent_avg"):
        load_method("e4e", tiny_generator, checkpoint=path)


def test_bfloat16_follows_the_generator(tiny_generator: Generator, checkpoint: str) -> None:
    method = load_method("e4e", tiny_generator, checkpoint=checkpoint)
    exact = method.invert(pictures(), None, SampleRng([0, 1, 2])).w_plus
    tiny_generator.compute_dtype = torch.bfloat16
    rough = method.invert(pictures(), None, SampleRng([0, 1, 2])).w_plus
    assert rough.dtype == torch.float32
    error = (rough - exact).abs().max() / exact.std()
    assert 0 < error < 0.05


def test_a_picture_that_is_not_finite_fails_alone(
    tiny_generator: Generator, checkpoint: str
) -> None:
    method = load_method("e4e", tiny_generator, checkpoint=checkpoint)
    clean = method.invert(pictures(), None, SampleRng([0, 1, 2]))
    dirty_pictures = pictures()
    dirty_pictures[1, 0, 3, 3] = float("nan")
    dirty = method.invert(dirty_pictures, None, SampleRng([0, 1, 2]))
    assert list(dirty.failures) == [1]
    assert "not finite" in dirty.failures[1]
    assert torch.equal(dirty.w_plus[1], tiny_generator.latent_avg.expand(8, -1))
    torch.testing.assert_close(dirty.w_plus[[0, 2]], clean.w_plus[[0, 2]], atol=1e-6, rtol=1e-6)
