"""The method `cycle`: codes truly in W, and the released variant."""

from pathlib import Path

import pytest
import torch

from models.encoders.checkpoint import load_encoder
from models.encoders.e4e import Encoder4Editing
from models.errors import AssetError
from models.inversion.base import SampleRng
from models.inversion.registry import load_method
from models.stylegan2.generator import Generator
from tests.models.tiny_networks import save_tiny_encoder


def save(folder: Path, generator: Generator, kind: str = "e4e") -> str:
    return str(save_tiny_encoder(folder / "cycle.safetensors", generator, kind=kind))


def pictures(n: int = 3) -> torch.Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)


def test_every_row_is_the_encoders_w(tiny_generator: Generator, tmp_path: Path) -> None:
    checkpoint = save(tmp_path, tiny_generator)
    method = load_method("cycle", tiny_generator, checkpoint=checkpoint)
    found = method.invert(pictures(), None, SampleRng([0, 1, 2])).w_plus
    encoder = load_encoder(checkpoint, 8, 16).encoder
    assert isinstance(encoder, Encoder4Editing)
    with torch.no_grad():
        w, deltas = encoder.split(pictures())
    want = tiny_generator.latent_avg + w
    assert torch.equal(found, found[:, :1].expand(-1, 8, -1))
    torch.testing.assert_close(found[:, 0], want, atol=1e-5, rtol=1e-5)
    released = load_method("cycle", tiny_generator, checkpoint=checkpoint, all_heads=True)
    codes = released.invert(pictures(), None, SampleRng([0, 1, 2])).w_plus
    torch.testing.assert_close(codes[:, 1:], want[:, None] + deltas, atol=1e-5, rtol=1e-5)
    assert deltas.abs().min() > 0
    assert set(method.hashes()) == {"cycle"}


def test_an_encoder_without_a_w_is_refused(tiny_generator: Generator, tmp_path: Path) -> None:
    checkpoint = save(tmp_path, tiny_generator, "psp")
    with pytest.raises(AssetError, match=r"cycle: `checkpoint` is a GradualStyleEncoder.*kind e4e"):
        load_method("cycle", tiny_generator, checkpoint=checkpoint)


def test_no_encoder_names_its_training(tiny_generator: Generator) -> None:
    with pytest.raises(AssetError, match=r"cycle: no bundled weights.*`refinery train cycle`"):
        load_method("cycle", tiny_generator)
