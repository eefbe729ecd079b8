"""`refine`: a network's residuals on codes, alone, in a chain, in one stage."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from models.encoders.token_network import TokenArchitecture, TokenNetwork
from models.errors import AssetError, ConfigError
from models.inversion.base import Inversion, Method, SampleRng
from models.inversion.registry import load_method
from models.stylegan2.generator import Generator
from tests.conftest import make_tiny_generator
from tests.models.tiny_networks import save_network, save_tiny_encoder
from tests.test_method_contract import pictures

SEEDS = SampleRng([1, 2, 3])


@pytest.fixture
def method(tmp_path: Path, tiny_generator: Generator) -> Method:
    return load_method("refine", tiny_generator, **files(tmp_path, tiny_generator))


def files(folder: Path, generator: Generator) -> dict[str, str]:
    return {
        "checkpoint": str(tiny_refine(folder, generator)),
        "first_stage": str(save_tiny_encoder(folder / "encoder.safetensors", generator)),
    }


def tiny_refine(folder: Path, generator: Generator, **sizes: Any) -> Path:
    architecture = TokenArchitecture.tiny(generator, **sizes)
    path = folder / "refine.safetensors"
    return save_network(path, generator, lambda: TokenNetwork(architecture), seed=3)


def test_without_a_start_it_refines_its_own_first_stage(method: Method, tmp_path: Path) -> None:
    """The same as the chain e4e, refine; both files' hashes are recorded."""
    generator = method.generator
    e4e = load_method("e4e", generator, checkpoint=str(tmp_path / "encoder.safetensors"))
    first = e4e.invert(pictures(), None, SEEDS)
    alone, chained = method.invert(pictures(), None, SEEDS), method.invert(pictures(), first, SEEDS)
    assert torch.equal(alone.w_plus, first.w_plus)
    for name, value in chained.tensors().items():
        assert torch.equal(alone.tensors()[name], value), name
    assert set(method.hashes()) == {"refine", "first_stage"}
    assert method.hashes()["first_stage"] == e4e.hashes()["e4e"]
    assert not torch.allclose(alone.render(generator), first.render(generator), atol=1e-3)


def test_strength_zero_is_the_unrefined_picture_and_strength_scales(
    method: Method, tmp_path: Path
) -> None:
    generator = method.generator
    plain = load_method("refine", generator, **files(tmp_path, generator), strength=0.0)
    found = plain.invert(pictures(), None, SEEDS)
    assert torch.equal(found.render(generator), generator.synthesis(found.w_plus))
    half = load_method("refine", generator, **files(tmp_path, generator), strength=0.5)
    whole, halved = (m.invert(pictures(), None, SEEDS).residual for m in (method, half))
    assert whole is not None
    assert halved is not None
    for layer, low_rank in whole.items():
        torch.testing.assert_close(halved[layer].kernel(), 0.5 * low_rank.kernel())


def test_rank_is_that_of_the_network(method: Method) -> None:
    residual = method.invert(pictures(), None, SEEDS).residual
    assert residual is not None
    assert len(residual) == method.generator.num_convs
    for low_rank in residual.values():
        assert torch.linalg.matrix_rank(low_rank.kernel().flatten(2)).max() <= 2


def test_what_a_start_brings_is_kept(method: Method) -> None:
    """Its noise and features are rendered with, its residual is added to."""
    generator = method.generator
    once = method.invert(pictures(), None, SEEDS)
    noise = tuple(torch.randn(3, 1, *m.shape[2:]) for m in generator.noises.buffers())
    twice = method.invert(
        pictures(), Inversion(w_plus=once.w_plus, noise=noise, residual=once.residual), SEEDS
    )
    assert twice.noise == noise
    assert once.residual is not None
    assert twice.residual is not None
    assert twice.residual[0].u.shape[2] == 2 * once.residual[0].u.shape[2]
    torch.testing.assert_close(twice.residual[0].u[:, :, :2], once.residual[0].u)


def test_one_stage_gives_codes_and_ignores_a_start(
    tmp_path: Path, tiny_generator: Generator
) -> None:
    path = tiny_refine(tmp_path, tiny_generator, stages="one")
    method = load_method("refine", tiny_generator, checkpoint=str(path))
    found = method.invert(pictures(), None, SEEDS)
    start = Inversion(w_plus=torch.randn(3, 8, 16))
    assert torch.equal(method.invert(pictures(), start, SEEDS).w_plus, found.w_plus)
    assert (found.w_plus - tiny_generator.latent_avg).square().mean() > 1e-4
    assert set(method.hashes()) == {"refine"}
    broken = pictures()
    broken[1] = float("nan")
    failed = method.invert(broken, None, SEEDS)
    assert set(failed.failures) == {1}
    assert torch.equal(failed.w_plus[1], tiny_generator.latent_avg.expand(8, -1))
    assert failed.residual is not None
    assert not failed.residual[3].kernel()[1].any()


def test_a_failed_row_of_the_start_stays_failed(method: Method) -> None:
    start = Inversion(w_plus=torch.zeros(3, 8, 16), failures={2: "e4e: lost"})
    assert method.invert(pictures(), start, SEEDS).failures == {2: "e4e: lost"}


def test_networks_that_do_not_belong_are_refused(
    tmp_path: Path, tiny_generator: Generator, caplog: pytest.LogCaptureFixture
) -> None:
    path = str(tiny_refine(tmp_path, tiny_generator))
    alone = load_method("refine", tiny_generator, checkpoint=path)
    with pytest.raises(ConfigError, match=r"there is none: put another.*or set `first_stage`"):
        alone.invert(pictures(), None, SEEDS)
    with pytest.raises(AssetError, match="was trained with generator"):
        load_method("refine", make_tiny_generator(seed=1), checkpoint=path)
    with pytest.raises(AssetError, match="8 rows of 16, the generator needs 10 rows of 16"):
        load_method("refine", make_tiny_generator(resolution=64), checkpoint=path)
    with caplog.at_level(logging.WARNING):
        load_method("refine", tiny_generator, **files(tmp_path, tiny_generator))
    assert "trained on the codes of another first stage" in caplog.text
    with pytest.raises(ConfigError, match="strength must be >= 0, got -1"):
        load_method("refine", tiny_generator, checkpoint=path, strength=-1.0)
