"""Refinement of the encoder for one picture: its loss, its updates, its rows."""

from pathlib import Path
from typing import Any

import pytest
import torch

from models.encoders.checkpoint import load_encoder
from models.encoders.e4e import Encoder4Editing
from models.errors import ConfigError
from models.inversion.base import SampleRng
from models.inversion.cycle_refine import CycleRefine, CycleRefineConfig
from models.inversion.registry import load_method
from models.losses.perceptual import load_perceptual
from models.optim import Ranger
from models.stylegan2.generator import Generator
from tests.models.inversion.test_cycle import pictures, save


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_generator: Generator) -> str:
    return save(tmp_path, tiny_generator)


def make(generator: Generator, checkpoint: str, **settings: Any) -> CycleRefine:
    values = {"steps": 2, "companions": 2, "learning_rate": 1e-3, "perceptual": "none"}
    config = CycleRefineConfig(checkpoint=checkpoint, **{**values, **settings})
    return CycleRefine(generator, config)


def test_no_update_is_cycle(tiny_generator: Generator, checkpoint: str) -> None:
    found = make(tiny_generator, checkpoint, steps=0).invert(pictures(2), None, SampleRng([0, 1]))
    plain = load_method("cycle", tiny_generator, checkpoint=checkpoint)
    want = plain.invert(pictures(2), None, SampleRng([0, 1])).w_plus
    torch.testing.assert_close(found.w_plus, want, atol=1e-5, rtol=1e-5)


def test_the_loss_of_a_picture(tiny_generator: Generator, checkpoint: str) -> None:
    method = make(tiny_generator, checkpoint, perceptual="refinery", mse_weight=2.0)
    a, b = pictures(4)[:2], pictures(4)[2:]
    want = 2 * (a - b).square().mean((1, 2, 3)) + 0.8 * load_perceptual("refinery")(a, b)
    torch.testing.assert_close(method.similarity_loss(a, b), want)
    assert set(method.hashes()) == {"cycle", "trunk_distance"}


def test_companions_as_many_as_lambda_make_the_plain_mean(
    tiny_generator: Generator, checkpoint: str
) -> None:
    losses = torch.rand(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    published = make(tiny_generator, checkpoint, companions=7, regularisation=7.0)
    torch.testing.assert_close(published.total(losses), losses.mean(), rtol=1e-12, atol=0)
    heavy = make(tiny_generator, checkpoint, regularisation=3.0)
    want = (losses[0] + 3 * losses[1:].mean()) / 4
    torch.testing.assert_close(heavy.total(losses), want, rtol=1e-12, atol=0)
    assert heavy.total(losses[:1]) == losses[0]


def test_two_updates_by_hand(tiny_generator: Generator, checkpoint: str) -> None:
    """An encoder tuned in place by Ranger, in eval mode, on the same pictures gives the code."""
    method = make(tiny_generator, checkpoint, regularisation=2.0)
    target = pictures(1)
    found = method.invert(target, None, SampleRng([5]))
    encoder = load_encoder(checkpoint, 8, 16).encoder.requires_grad_(True)
    assert isinstance(encoder, Encoder4Editing)
    encoder.stage = 0
    assert not encoder.training
    ranger = Ranger(encoder.parameters(), lr=1e-3)
    stream = torch.Generator().manual_seed(5)
    tried = []
    for step in range(3):
        z = torch.randn(2, 16, generator=stream) if step < 2 else torch.zeros(2, 16)
        companions = tiny_generator.synthesis(tiny_generator.mapping(z))
        batch = torch.cat([target, companions])
        codes = tiny_generator.latent_avg + encoder(batch)
        loss = (tiny_generator.synthesis(codes) - batch).square().mean((1, 2, 3))
        tried.append((loss[0].item(), codes[:1].detach()))
        ranger.zero_grad()
        ((loss[0] + 2 * loss[1:].mean()) / 3).backward()
        ranger.settle()
        ranger.step()
    want = min(tried, key=lambda pair: pair[0])[1]
    torch.testing.assert_close(found.w_plus, want, atol=1e-4, rtol=1e-4)
    assert (found.w_plus - tried[0][1]).abs().max() > 1e-3


def test_it_comes_closer_and_leaves_the_encoder_alone(
    tiny_generator: Generator, checkpoint: str
) -> None:
    target = pictures(2)
    method = make(tiny_generator, checkpoint, steps=8, learning_rate=5e-3)
    before = {k: v.clone() for k, v in method.encoder.state_dict().items()}
    found = method.invert(target, None, SampleRng([0, 1]))
    plain = load_method("cycle", tiny_generator, checkpoint=checkpoint)
    start = plain.invert(target, None, SampleRng([0, 1]))
    errors = [(i.render(tiny_generator) - target).square().mean((1, 2, 3)) for i in (start, found)]
    assert (errors[1] < 0.97 * errors[0]).all()
    assert torch.equal(found.w_plus, found.w_plus[:, :1].expand(-1, 8, -1))
    for name, value in method.encoder.state_dict().items():
        assert torch.equal(value, before[name]), name  # batch statistics too
    assert not any(p.requires_grad for p in method.encoder.parameters())


def test_a_broken_picture_fails_alone(tiny_generator: Generator, checkpoint: str) -> None:
    target = pictures(3)
    target[1] = torch.nan
    method = make(tiny_generator, checkpoint)
    with torch.inference_mode():
        found = method.invert(target, None, SampleRng([0, 1, 2]))
    assert found.failures == {1: "cycle_refine: loss is not finite at step 0"}
    assert torch.equal(found.w_plus[1], tiny_generator.latent_avg.expand(8, -1))
    alone = method.invert(target[2:], None, SampleRng([2]))
    assert torch.equal(found.w_plus[2:], alone.w_plus)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": -1}, "steps must be >= 0"),
        ({"companions": -1}, "companions must be >= 0"),
        ({"learning_rate": 0.0}, "learning_rate must be > 0"),
        ({"mse_weight": 0.0, "perceptual": "none"}, "nothing to minimise"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CycleRefineConfig(**settings)
