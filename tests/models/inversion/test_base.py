"""Inversions that carry tuned weights: joining, naming, storing, rendering and editing."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from models.inversion.base import Inversion
from models.stylegan2.generator import Generator
from models.stylegan2.residual import LowRank
from models.stylegan2.weight_delta import WeightDelta

NAMES = ("conv1.conv.weight", "to_rgbs.0.bias", "convs.1.noise.weight")


def inversion(generator: Generator, n: int = 2, seed: int = 0, every: bool = True) -> Inversion:
    """Random codes, tuned weights, and every other door."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(n, *shape, generator=rng)

    own = dict(generator.named_parameters())
    weights = {k: WeightDelta.quantised(0.1 * draw(*own[k].shape)) for k in NAMES}
    found = Inversion(
        w_plus=draw(generator.num_ws, generator.w_dim), weights=weights, failures={1: "diverged"}
    )
    if not every:
        return found
    o, i = generator.conv(2).conv.weight.shape[1:3]
    sizes = [generator.conv_resolution(k) for k in range(generator.num_convs)]
    return Inversion(
        w_plus=found.w_plus,
        noise=tuple(draw(1, s, s) for s in sizes),
        features={3: draw(16, 8, 8)},
        residual={2: LowRank(u=0.1 * draw(o, 2), v=0.1 * draw(2, i, 3, 3))},
        weights=weights,
        failures=found.failures,
    )


def test_names_of_tensors(tiny_generator: Generator) -> None:
    found = inversion(tiny_generator, every=False).tensors()
    pairs = [f"weights_{k}_{part}" for k in sorted(NAMES) for part in ("codes", "step")]
    assert list(found) == ["w_plus", *pairs]
    assert found["weights_conv1.conv.weight_codes"].dtype == torch.int8


@pytest.mark.parametrize(
    "back",
    [
        lambda i: replace(Inversion.from_tensors(i.tensors()), failures=i.failures),
        lambda i: Inversion.cat([i[:1], i[1:]]),
        lambda i: i.detached(),
        lambda i: i.to("cpu"),
        lambda i: i[0:2],
    ],
)
def test_every_door_comes_back(
    tiny_generator: Generator, back: Callable[[Inversion], Inversion]
) -> None:
    whole = replace(inversion(tiny_generator), style_shift=shift_of(tiny_generator, 2))
    found = back(whole)
    assert set(found.tensors()) == set(whole.tensors())
    assert all(torch.equal(v, whole.tensors()[k]) for k, v in found.tensors().items())
    assert found.failures == whole.failures


def test_an_unknown_tensor_is_refused() -> None:
    with pytest.raises(ValueError, match="no tensor 'tokens_1'"):
        Inversion.from_tensors({"w_plus": torch.zeros(1, 2, 3), "tokens_1": torch.zeros(1)})


def test_what_is_stored_keeps_the_weights_bit_by_bit(tiny_generator: Generator) -> None:
    """Noise, features and factors are rounded to half precision; 8-bit changes stay exact."""
    whole = inversion(tiny_generator)
    stored, before = whole.stored().tensors(), whole.tensors()
    for name, value in before.items():
        is_rounded = name.startswith(("noise", "features", "residual"))
        assert torch.equal(stored[name], value.half().float() if is_rounded else value), name
    assert any(not torch.equal(stored[k], before[k]) for k in before)


def test_render_adds_the_change_of_each_row(tiny_generator: Generator) -> None:
    """Each row equals a generator whose parameters were changed by hand."""
    found = inversion(tiny_generator)
    pictures = found.render(tiny_generator)
    for row in range(2):
        changed = Generator(tiny_generator.architecture)
        changed.load_state_dict(tiny_generator.state_dict())
        with torch.no_grad():
            for name, parameter in changed.named_parameters():
                if name in NAMES:
                    parameter += (found.weights or {})[name].value()[row]
        one = found[row : row + 1]
        want = changed.synthesis(one.w_plus, list(one.noise or ()), one.features, one.residual)
        torch.testing.assert_close(pictures[row : row + 1], want, atol=1e-5, rtol=1e-5)
    plain = Inversion(w_plus=found.w_plus).render(tiny_generator)
    assert (plain - pictures).abs().mean() > 0.01


def test_a_zero_change_is_the_plain_generator(tiny_generator: Generator) -> None:
    own = dict(tiny_generator.named_parameters())
    w_plus = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(3))
    zero = {k: WeightDelta.quantised(torch.zeros(2, *own[k].shape)) for k in NAMES}
    tuned = Inversion(w_plus=w_plus, weights=zero).render(tiny_generator)
    plain = torch.cat([Inversion(w_plus=w[None]).render(tiny_generator) for w in w_plus])
    assert torch.equal(tuned, plain)


def test_edits_keep_the_tuned_weights(tiny_generator: Generator) -> None:
    found = inversion(tiny_generator)
    moved = found.w_plus + 0.5
    edited = found.edited(tiny_generator, moved, strength=0.5)
    assert torch.equal(edited.w_plus, moved)
    assert edited.weights is found.weights
    assert edited.noise is found.noise
    kernel = (found.residual or {})[2].kernel()
    torch.testing.assert_close((edited.residual or {})[2].kernel(), 0.5 * kernel)
    maps = list(found.noise or ())
    shift = tiny_generator.activations(moved, 3, maps) - tiny_generator.activations(
        found.w_plus, 3, maps
    )
    plain = tiny_generator.activations(found.w_plus, 3, maps)
    own = (found.features or {})[3] - plain
    torch.testing.assert_close((edited.features or {})[3], plain + shift + 0.5 * own)
    whole = found.edited(tiny_generator, moved)
    torch.testing.assert_close((whole.features or {})[3], plain + shift + own)
    torch.testing.assert_close(
        found.edited(tiny_generator, found.w_plus).render(tiny_generator),
        found.render(tiny_generator),
        atol=1e-4,
        rtol=1e-4,
    )


def shift_of(generator: Generator, n: int) -> dict[int, Tensor]:
    rng = torch.Generator().manual_seed(9)
    sizes = [layer.weight.shape[2] for _, layer, _ in generator.layers()]
    return {i: 0.5 * torch.randn(n, sizes[i], generator=rng) for i in (1, 3, 8)}


@pytest.mark.parametrize("every", [True, False])
def test_a_style_shift_reaches_every_kind_of_render(tiny_generator: Generator, every: bool) -> None:
    """Row by row the same, with tuned weights and without, for one shift and for one each."""
    found = replace(inversion(tiny_generator, every=every), failures={})

    def edited(part: Inversion, shift: dict[int, Tensor]) -> Inversion:
        return part.edited(tiny_generator, part.w_plus, style_shift=shift)

    for inverted in (found, replace(found, weights=None)):
        for n in (1, 2):
            shift = shift_of(tiny_generator, n)
            shifted = edited(inverted, shift)
            whole = shifted.render(tiny_generator)
            rows = [shifted[r : r + 1].render(tiny_generator) for r in range(2)]
            one = edited(inverted[1:2], {k: s[1 % n][None] for k, s in shift.items()})
            torch.testing.assert_close(one.render(tiny_generator), rows[1], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(whole, torch.cat(rows), atol=1e-5, rtol=1e-5)
            assert (whole - inverted.render(tiny_generator)).abs().mean() > 0.01
        zero = {k: torch.zeros_like(s) for k, s in shift.items()}
        still = edited(replace(inverted, features=None), zero).render(tiny_generator)
        plain = replace(inverted, features=None).render(tiny_generator)
        assert torch.equal(still, plain)


def test_features_move_by_what_a_style_shift_does_to_activations(tiny_generator: Generator) -> None:
    """CLCAE's formula with a shift at unchanged codes."""
    found = replace(inversion(tiny_generator), weights=None, noise=None)
    shift = shift_of(tiny_generator, 2)
    edited = found.edited(tiny_generator, found.w_plus, style_shift=shift)
    moved = tiny_generator.activations(found.w_plus, 3, "const", shift)
    change = moved - tiny_generator.activations(found.w_plus, 3)
    assert change.abs().mean() > 0.01
    torch.testing.assert_close((edited.features or {})[3], (found.features or {})[3] + change)
    assert torch.equal(edited.w_plus, found.w_plus)
