"""`refine`: a network's residuals on codes, alone, in a chain, in one stage."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from models.encoders.token_network import TokenArchitecture, TokenNetwork
from models.errors import AssetError, ConfigError
from models.files import file_sha256
from models.inversion.base import Inversion, Method, SampleRng
from models.inversion.refine import Refine
from models.inversion.registry import load_method
from models.stylegan2.generator import Generator
from models.stylegan2.residual import LowRank
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


def test_passes_look_at_the_render_of_the_one_before(
    tmp_path: Path, tiny_generator: Generator
) -> None:
    settings = files(tmp_path, tiny_generator)
    path = tiny_refine(tmp_path, tiny_generator, iterations=2)
    settings["checkpoint"] = str(path)
    method = load_method("refine", tiny_generator, **settings)
    once = load_method("refine", tiny_generator, **settings, iterations=1)
    found, first = (m.invert(pictures(), None, SEEDS) for m in (method, once))
    assert isinstance(method, Refine)
    network = method.network
    plain = tiny_generator.synthesis(first.w_plus)
    with torch.no_grad():
        one = network(pictures(), plain)
        seen = tiny_generator.synthesis(first.w_plus, residual=one.residual)
        two = network(pictures(), seen, one)
    assert found.residual is not None
    assert first.residual is not None
    for layer in two.residual:
        torch.testing.assert_close(first.residual[layer].kernel(), one.residual[layer].kernel())
        torch.testing.assert_close(found.residual[layer].kernel(), two.residual[layer].kernel())
        assert (two.residual[layer].kernel() - one.residual[layer].kernel()).abs().max() > 1e-3
    with pytest.raises(ConfigError, match=r"`iterations` is 3, .* was trained with 2"):
        load_method("refine", tiny_generator, **settings, iterations=3)


@pytest.mark.parametrize("iterations", [1, 2])
def test_every_pass_sees_what_a_start_brings(
    iterations: int, tmp_path: Path, tiny_generator: Generator
) -> None:
    """Its noise and its residual are in every render; a broken picture fails alone; in half
    precision the same is found, nearly."""
    path = tiny_refine(tmp_path, tiny_generator, iterations=iterations)
    method = load_method("refine", tiny_generator, checkpoint=str(path))
    first = torch.randn(3, 8, 16)
    noise = tuple(torch.randn(3, 1, *m.shape[2:]) for m in tiny_generator.noises.buffers())
    plain = method.invert(pictures(), Inversion(w_plus=first), SEEDS)
    start = Inversion(w_plus=first, noise=noise, residual=plain.residual)
    assert isinstance(method, Refine)
    renders, network = [], method.network

    def seen(_module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        renders.append(inputs[1])

    hook = network.register_forward_pre_hook(seen)
    found = method.invert(pictures(), start, SEEDS)
    hook.remove()
    assert len(renders) == iterations
    torch.testing.assert_close(renders[0], start.render(tiny_generator))
    if iterations == 2:
        with torch.no_grad():
            once = network(pictures(), renders[0])
        so_far = {
            k: LowRank.total([start.residual[k], v])  # type: ignore[index]
            for k, v in once.residual.items()
        }
        want = Inversion(w_plus=first, noise=noise, residual=so_far).render(tiny_generator)
        torch.testing.assert_close(renders[1], want)
    broken = pictures()
    broken[1] = float("nan")
    failed = method.invert(broken, start, SEEDS)
    assert set(failed.failures) == {1}
    tiny_generator.compute_dtype = torch.bfloat16
    half = method.invert(pictures(), start, SEEDS)
    tiny_generator.compute_dtype = None
    for layer, low_rank in (found.residual or {}).items():
        assert failed.residual is not None
        assert half.residual is not None
        torch.testing.assert_close(failed.residual[layer].kernel()[0], low_rank.kernel()[0])
        error = (half.residual[layer].kernel() - low_rank.kernel()).square().mean().sqrt()
        assert 0 < error < 0.1 * low_rank.kernel().square().mean().sqrt()


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
    # What its card says of the first stage is compared with the one that it gets.
    network = TokenNetwork(TokenArchitecture.tiny(tiny_generator))
    settings = files(tmp_path, tiny_generator)
    own = file_sha256(Path(settings["first_stage"]))
    for trained_on, told in (
        (own, ""),
        ("f" * 64, "trained on the codes of another first stage (sha256 ffff"),
        (None, "its card names no first stage"),
    ):
        caplog.clear()
        save_network(Path(path), tiny_generator, lambda: network, first_stage_sha256=trained_on)
        with caplog.at_level(logging.WARNING):
            load_method("refine", tiny_generator, **settings)
        assert told in caplog.text if told else not caplog.text
    with pytest.raises(ConfigError, match="strength must be >= 0, got -1"):
        load_method("refine", tiny_generator, checkpoint=path, strength=-1.0)
