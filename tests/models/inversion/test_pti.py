"""Pivotal tuning: its updates by hand, its stops, its locality term, what it leaves behind."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from models.errors import ConfigError
from models.inversion import pti
from models.inversion.base import Inversion, SampleRng
from models.inversion.pti import Pti, PtiConfig, interpolated, synthesis_parameters
from models.losses.perceptual import load_perceptual
from models.stylegan2.generator import Generator, weights_hash
from models.stylegan2.residual import LowRank


def pictures(n: int = 2) -> torch.Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)


def pivots(generator: Generator, n: int = 2) -> Inversion:
    z = torch.randn(n, generator.z_dim, generator=torch.Generator().manual_seed(2))
    return Inversion(w_plus=generator.mapping(z))


def tuned(generator: Generator, n: int = 2, **settings: Any) -> Inversion:
    values = {"steps": 3, "perceptual": "none", "learning_rate": 0.01}
    method = Pti(generator, PtiConfig(**{**values, **settings}))
    return method.invert(pictures(n), pivots(generator, n), SampleRng(list(range(n))))


def copy_of(generator: Generator) -> Generator:
    """A twin whose synthesis parameters learn."""
    twin = Generator(generator.architecture)
    twin.load_state_dict(generator.state_dict())
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_(not name.startswith("style."))
    return twin


def within_a_step(found: Inversion, twin: Generator, generator: Generator, row: int = 0) -> None:
    """The stored change is that of the twin, to half a quantisation step and rounding."""
    own, trained = dict(generator.named_parameters()), dict(twin.named_parameters())
    weights = found.weights or {}
    assert set(weights) == {name for name in own if not name.startswith("style.")}
    for name, delta in weights.items():
        want = trained[name] - own[name]
        step = delta.step.reshape(*delta.step.shape, *[1] * (delta.codes.ndim - delta.step.ndim))
        error = (delta.value()[row] - want).abs()
        assert (error <= 0.55 * step[row] + 1e-6).all(), name
        assert want.abs().max() > 0, name


def test_every_parameter_but_the_mapping_networks_moves(tiny_generator: Generator) -> None:
    """Three updates of Adam on both losses, by hand on a copy of the generator."""
    found = tuned(tiny_generator, 1, perceptual="refinery", mse_weight=2.0, stop_perceptual=0.0)
    perceptual = load_perceptual("refinery")
    twin, target, pivot = copy_of(tiny_generator), pictures(1), pivots(tiny_generator, 1).w_plus
    adam = torch.optim.Adam((p for p in twin.parameters() if p.requires_grad), lr=0.01)
    for _ in range(3):
        image = twin.synthesis(pivot)
        adam.zero_grad()
        (2 * (image - target).square().mean() + perceptual(image, target)[0]).backward()
        adam.step()
    within_a_step(found, twin, tiny_generator)


def test_the_locality_term(tiny_generator: Generator) -> None:
    """PTI's L_R: the untuned picture, without noise, at a fixed distance from the pivot."""
    found = tuned(tiny_generator, 1, locality_weight=5.0, locality_distance=4.0, locality_psi=0.3)
    twin, target, pivot = copy_of(tiny_generator), pictures(1), pivots(tiny_generator, 1).w_plus
    adam = torch.optim.Adam((p for p in twin.parameters() if p.requires_grad), lr=0.01)
    stream = torch.Generator().manual_seed(0)
    for _ in range(3):
        z = torch.randn(1, 16, generator=stream)
        towards = tiny_generator.latent_avg.lerp(tiny_generator.mapping(z), 0.3) - pivot
        near = pivot + 4.0 * towards / towards.square().sum().sqrt()
        change = twin.synthesis(near, "none") - tiny_generator.synthesis(near, "none")
        adam.zero_grad()
        ((twin.synthesis(pivot) - target).square().mean() + 5 * change.square().mean()).backward()
        adam.step()
    within_a_step(found, twin, tiny_generator)


def test_locality_holds_the_neighbourhood(tiny_generator: Generator) -> None:
    """With it the plain generator's pictures nearby change less; the target is met less well."""
    z = torch.randn(8, 16, generator=torch.Generator().manual_seed(9))
    pivot = pivots(tiny_generator, 1)
    near = interpolated(pivot.w_plus, tiny_generator.mapping(z, truncation_psi=0.5), 4.0)
    before = tiny_generator.synthesis(near, "none")
    changes, errors = [], []
    for weight in (0.0, 10.0):
        found = tuned(tiny_generator, 1, steps=20, locality_weight=weight, locality_distance=4.0)
        nearby = replace(pivots(tiny_generator, 1), weights=found.weights)
        pictures_nearby = [
            replace(nearby, w_plus=code[None]).render(tiny_generator) for code in near
        ]
        changes.append((torch.cat(pictures_nearby) - before).square().mean().item())
        errors.append((found.render(tiny_generator) - pictures(1)).square().mean().item())
    assert changes[1] < 0.7 * changes[0]
    assert errors[1] > errors[0]


def test_codes_near_the_pivot() -> None:
    """alpha is the norm over all rows together."""
    pivot, samples = torch.zeros(1, 3, 4), torch.randn(5, 3, 4, dtype=torch.float64)
    found = interpolated(pivot.double() + 1, samples + 1, 30.0) - 1
    torch.testing.assert_close(found.flatten(1).norm(dim=1), torch.full((5,), 30.0).double())
    cosine = torch.nn.functional.cosine_similarity(found.flatten(1), samples.flatten(1))
    torch.testing.assert_close(cosine, torch.ones(5).double())


def test_presets() -> None:
    def numbers(**settings: Any) -> tuple[float, float]:
        config = PtiConfig(**settings)
        return config.or_preset("stop_perceptual"), config.or_preset("locality_weight")

    assert numbers() == (0.06, 0.0)
    assert numbers(preset="cycle") == (0.07, 0.1)
    assert numbers(preset="cycle", stop_perceptual=0.0, locality_weight=0.5) == (0.0, 0.5)
    assert numbers(preset="cycle", locality_weight=0.0) == (0.07, 0.0)
    assert (PtiConfig().steps, PtiConfig().locality_distance) == (350, 30.0)


def test_it_stops_where_the_picture_is_near_enough(tiny_generator: Generator) -> None:
    """Before the first update where the pivot is near enough; else as soon as it is."""
    far = tuned(tiny_generator, 1, perceptual="refinery", stop_perceptual=100.0)
    assert all((delta.codes == 0).all() for delta in (far.weights or {}).values())
    perceptual = load_perceptual("refinery")

    def distance(found: Inversion) -> float:
        return perceptual(found.render(tiny_generator), pictures(1)).item()

    start, rate = distance(far), 3e-3
    threshold = 0.9 * start
    found = tuned(
        tiny_generator,
        1,
        steps=60,
        perceptual="refinery",
        stop_perceptual=threshold,
        learning_rate=rate,
    )
    on = tuned(
        tiny_generator,
        1,
        steps=60,
        perceptual="refinery",
        stop_perceptual=0.0,
        learning_rate=rate,
    )
    assert distance(on) < 0.97 * threshold
    assert 0.9 * threshold < distance(found) <= 1.01 * threshold


def test_it_reconstructs_and_the_stored_change_is_what_renders(tiny_generator: Generator) -> None:
    before = weights_hash(tiny_generator)
    found = tuned(tiny_generator, steps=40)
    assert torch.equal(found.w_plus, pivots(tiny_generator).w_plus)
    start = pivots(tiny_generator).render(tiny_generator)
    errors = [
        (image - pictures()).square().mean((1, 2, 3))
        for image in (start, found.render(tiny_generator))
    ]
    assert (errors[1] < 0.7 * errors[0]).all()
    assert weights_hash(tiny_generator) == before
    stored = found.stored().render(tiny_generator)
    assert torch.equal(stored, found.render(tiny_generator))
    plain = Inversion(w_plus=found.w_plus).render(tiny_generator)
    assert torch.equal(plain, start)


def test_the_doors_of_the_pivot_stay_open(tiny_generator: Generator) -> None:
    """It tunes around the pivot's own noise, features and residual, which are kept."""
    rng = torch.Generator().manual_seed(3)
    generator = tiny_generator
    o, i = generator.conv(2).conv.weight.shape[1:3]
    sizes = [generator.conv_resolution(k) for k in range(generator.num_convs)]
    pivot = replace(
        pivots(generator, 1),
        noise=tuple(torch.randn(1, 1, s, s, generator=rng) for s in sizes),
        features={3: torch.randn(1, 16, 8, 8, generator=rng)},
        residual={
            2: LowRank(
                u=torch.randn(1, o, 1, generator=rng), v=torch.randn(1, 1, i, 3, 3, generator=rng)
            )
        },
    )
    method = Pti(generator, PtiConfig(steps=1, perceptual="none", learning_rate=0.01))
    found = method.invert(pictures(1), pivot, SampleRng([0]))
    for name, value in pivot.tensors().items():
        assert torch.equal(found.tensors()[name], value), name
    twin = copy_of(generator)
    adam = torch.optim.Adam((p for p in twin.parameters() if p.requires_grad), lr=0.01)
    image = twin.synthesis(pivot.w_plus, list(pivot.noise or ()), pivot.features, pivot.residual)
    (image - pictures(1)).square().mean().backward()
    before = {name: p.detach().clone() for name, p in twin.named_parameters()}
    adam.step()
    # What is before the replaced features has no part in the picture's later layers.
    for name in ("convs.3.conv.weight", "to_rgbs.2.bias", "convs.5.noise.weight"):
        change = dict(twin.named_parameters())[name] - before[name]
        delta = (found.weights or {})[name]
        torch.testing.assert_close(delta.value()[0], change, atol=1e-4, rtol=0.02)


def test_a_broken_picture_fails_alone(tiny_generator: Generator) -> None:
    target = pictures(3)
    target[1] = torch.nan
    init = replace(pivots(tiny_generator, 3), failures={2: "e4e: lost"})
    method = Pti(tiny_generator, PtiConfig(steps=2, perceptual="none"))
    with torch.inference_mode():
        found = method.invert(target, init, SampleRng([0, 1, 2]))
    assert found.failures == {1: "pti: loss is not finite at step 0", 2: "e4e: lost"}
    for delta in (found.weights or {}).values():
        assert (delta.codes[1:] == 0).all()
        assert delta.step.isfinite().all()
    assert any((delta.codes[0] != 0).any() for delta in (found.weights or {}).values())


@pytest.mark.parametrize(
    "settings",
    [
        {"mse_weight": 2.0},
        {"locality_weight": 5.0, "locality_distance": 4.0, "locality_samples": 2},
        {"steps": 6, "stop_perceptual": 0.6, "learning_rate": 0.01, "locality_weight": 0.1},
        {"perceptual": "none"},
    ],
)
def test_several_at_once_are_tuned_as_one_after_the_other(
    settings: dict[str, Any], tiny_generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where one leaves early, one has failed before and one has no finite loss."""
    generator, rng = tiny_generator, torch.Generator().manual_seed(3)
    o, i = generator.conv(2).conv.weight.shape[1:3]
    sizes = [generator.conv_resolution(k) for k in range(generator.num_convs)]
    pivot = replace(
        pivots(generator, 5),
        noise=tuple(torch.randn(5, 1, s, s, generator=rng) for s in sizes),
        residual={
            2: LowRank(
                u=torch.randn(5, o, 1, generator=rng),
                v=0.1 * torch.randn(5, 1, i, 3, 3, generator=rng),
            )
        },
        failures={1: "e4e: lost"},
    )
    targets = pictures(5)
    targets[2] = torch.nan
    targets[4] = pivot[4:].render(generator).clamp(-1, 1)[0]  # near from the start
    values = {"steps": 3, "perceptual": "refinery", "learning_rate": 1e-3, "stop_perceptual": 0.01}
    method = Pti(generator, PtiConfig(**{**values, **settings}))
    layout = generator.memory_format
    one = method.invert(targets, pivot, SampleRng(list(range(5))))
    monkeypatch.setitem(pti.TOGETHER, "cpu", 4)
    several = method.invert(targets, pivot, SampleRng(list(range(5))))
    assert several.failures == one.failures
    assert generator.memory_format is layout
    for name, twin in (one.weights or {}).items():
        codes = (several.weights or {})[name].value() - twin.value()
        step = twin.step.reshape(*twin.step.shape, *[1] * (codes.ndim - twin.step.ndim))
        assert (codes.abs() <= 2 * step + 1e-6).all(), name
    difference = several.render(generator) - one.render(generator)
    assert difference.abs().max() < 2e-3


def test_divergence_is_a_failure(tiny_generator: Generator) -> None:
    found = tuned(tiny_generator, 1, learning_rate=1e30, steps=4)
    assert "not finite" in found.failures[0]
    assert torch.equal(
        found.render(tiny_generator), pivots(tiny_generator, 1).render(tiny_generator)
    )


def test_the_generator_survives_an_error(
    tiny_generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error in the middle of a render leaves its own parameters in place."""
    before = {name: id(p) for name, p in tiny_generator.named_parameters()}
    digest, calls = weights_hash(tiny_generator), []

    def failing(module: object, inputs: object) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("third render")

    hook = tiny_generator.convs[2].register_forward_pre_hook(failing)
    with pytest.raises(RuntimeError, match="third render"):
        tuned(tiny_generator)
    hook.remove()
    assert {name: id(p) for name, p in tiny_generator.named_parameters()} == before
    assert weights_hash(tiny_generator) == digest


def test_the_mapping_network_has_no_part(tiny_generator: Generator) -> None:
    names = set(synthesis_parameters(tiny_generator))
    assert {n for n, _ in tiny_generator.named_parameters()} - names == {
        "style.1.weight",
        "style.1.bias",
        "style.2.weight",
        "style.2.bias",
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"preset": "both"}, "preset: expected one of pti, cycle"),
        ({"steps": -1}, "steps must be >= 0"),
        ({"learning_rate": 0.0}, "learning_rate must be > 0"),
        ({"stop_perceptual": -0.1}, "stop_perceptual must be >= 0"),
        ({"locality_psi": 1.5}, r"locality_psi must be in 0\.\.1"),
        ({"locality_samples": 0}, "locality_samples must be >= 1"),
        ({"mse_weight": 0.0, "perceptual": "none"}, "nothing to minimise"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PtiConfig(**settings)
