"""Losses in CLIP's space against values by hand, and at the zero difference of the first step."""

import pytest
import torch
import torch.nn.functional as F

from models.adaptation.clip_losses import (
    SOFTNESS,
    direction_loss,
    in_domain_loss,
    reference_loss,
    relaxed_transport,
    set_direction,
    soft_cosine,
    within_loss,
)
from models.errors import ConfigError


def units(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_soft_cosine_is_the_cosine_of_long_differences() -> None:
    a, b = 0.7 * units(5, 8), 3.0 * units(5, 8, seed=1)
    assert torch.allclose(soft_cosine(a, b), F.cosine_similarity(a, b, dim=1), rtol=0.004)
    exact = 0.7 / (0.7**2 + SOFTNESS**2) ** 0.5
    assert float(soft_cosine(a, 2 * a)[0]) == pytest.approx(exact, rel=1e-6)


def test_at_the_first_step_the_gradient_is_the_wanted_direction() -> None:
    before, wanted = units(2, 3, 8), units(2, 1, 8, seed=1)
    after = before.clone().requires_grad_()
    loss = direction_loss(after, before, wanted)
    assert loss.shape == (2, 3)
    assert torch.equal(loss, torch.ones(2, 3))
    (gradient,) = torch.autograd.grad(loss.sum(), after)
    torch.testing.assert_close(gradient, -wanted.expand(2, 3, 8) / SOFTNESS)


def test_direction_loss_is_0_along_the_direction_and_2_against_it() -> None:
    before, wanted = units(3, 8), units(1, 8, seed=1)
    assert float(direction_loss(before + 10 * wanted, before, wanted).max()) < 1e-4
    assert float(direction_loss(before - 10 * wanted, before, wanted).min()) > 1.9999


def test_within_loss_is_0_for_the_same_differences() -> None:
    before, inverted, reference = units(3, 8), units(1, 8, seed=1), units(1, 8, seed=2)
    after = reference + (before - inverted)
    found = within_loss(after, before, reference, inverted)
    assert float(found.max()) < 0.002
    assert float(within_loss(before, before, reference, inverted).min()) > 0.05


def test_reference_loss() -> None:
    a = units(2, 8)
    torch.testing.assert_close(reference_loss(a, a), torch.zeros(2))
    torch.testing.assert_close(reference_loss(a, -a), torch.full((2,), 2.0))


def test_in_domain_loss_by_hand() -> None:
    after, before = units(2, 4, 8), units(2, 4, 8, seed=1)
    found = in_domain_loss(after, before)
    for group in range(2):
        for n in range(4):
            parts = [
                (after[group, n] @ after[group, m] - before[group, n] @ before[group, m]) ** 2
                for m in range(4)
                if m != n
            ]
            assert float(found[group, n]) == pytest.approx(float(sum(parts)) / 3, rel=1e-5)
    # A turn of all embeddings together changes no difference between pictures.
    turn, _ = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(3)))
    assert float(in_domain_loss(before @ turn, before).max()) < 1e-10
    assert float(in_domain_loss(after[:, :1].expand(2, 4, 8), before).min()) > 0.1  # a collapse


def test_set_direction() -> None:
    references, source = units(6, 8), units(9, 8, seed=1)
    expected = F.normalize(references.mean(0) - source.mean(0), dim=0)
    torch.testing.assert_close(set_direction(references, source, "c"), expected)
    with pytest.raises(ConfigError, match="no direction to follow"):
        set_direction(source.flip(0), source, "c")


def test_relaxed_transport_by_hand() -> None:
    tokens = torch.tensor([[[1.0, 0], [0, 2]], [[1, 0], [1, 0]]])
    wanted = torch.tensor([[[3.0, 0], [0, 1]], [[1, 0], [0, 1]]])
    # Equal up to length; then: each token finds its own, but one wanted token finds none.
    assert relaxed_transport(tokens, wanted).tolist() == pytest.approx([0.0, 0.5])
    assert relaxed_transport(wanted, tokens).tolist() == pytest.approx([0.0, 0.5])
