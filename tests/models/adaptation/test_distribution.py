"""The sliced distance against a slow twin, its zero, and what shuffling does not change."""

import pytest
import torch
import torch.nn.functional as F

from models.adaptation.distribution import (
    PLACE,
    PatchBasis,
    ReferenceTaps,
    _quantiles,
    placed,
    recoloured,
    sliced_distance,
)


def taps(n: int, seed: int = 0, shift: float = 0.0) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [
        torch.randn(n, 4, 8, 8, generator=rng, dtype=torch.float64) + shift,
        torch.randn(n, 6, 4, 4, generator=rng, dtype=torch.float64) * 2 + shift,
    ]


def stream() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def by_hand(
    found: list[torch.Tensor], references: list[list[torch.Tensor]], lines: int
) -> torch.Tensor:
    """Scale by scale, line by line, domain by domain."""
    rng = stream()
    d = len(references)
    b = len(found[0]) // d
    total = torch.zeros(d, b, dtype=torch.float64)
    for scale, tap in enumerate(found):
        c, size = tap.shape[1], tap.shape[2] ** 2
        line = F.normalize(torch.randn(lines, c, generator=rng), dim=1).double()
        torch.randperm(size, generator=rng)  # all places are taken: their order says nothing
        for domain in range(d):
            wanted = references[domain][scale].permute(1, 0, 2, 3).flatten(1)
            unit = wanted.var(1).mean().sqrt()
            own = tap[domain * b : (domain + 1) * b].flatten(2)  # [B C S]
            for k in range(lines):
                values = [(float(v), n) for n in range(b) for v in line[k] @ own[n]]
                values.sort()
                target = _quantiles((line[k] @ wanted)[None], len(values))[0]
                for (value, n), goal in zip(values, target, strict=True):
                    error = ((value - float(goal)) / float(unit)) ** 2
                    total[domain, n] += error / (lines * size * len(found))
    return total


def test_agrees_with_the_slow_twin() -> None:
    references = [taps(5, 1, 0.5), taps(3, 2, -1.0)]
    found = taps(4)  # two domains of two pictures
    given = [ReferenceTaps.of(r) for r in references]
    fast = sliced_distance(found, given, stream(), lines=3)
    assert fast.shape == (2, 2)
    assert float((fast - by_hand(found, references, 3)).abs().max()) < 1e-6


def test_the_same_set_is_at_0_wherever_its_places_are() -> None:
    own = taps(6)
    reference = [ReferenceTaps.of(own)]
    assert float(sliced_distance(own, reference, stream(), places=64).max()) < 1e-12
    shuffled = [
        t.flatten(2)[:, :, torch.randperm(t[0, 0].numel(), generator=stream())].reshape(t.shape)
        for t in own
    ]
    assert float(sliced_distance(shuffled, reference, stream(), places=64).max()) < 1e-12
    other = sliced_distance(taps(6, 1, 1.0), reference, stream())
    assert float(other.min()) > 0.1


def test_a_domain_does_not_depend_on_its_neighbours() -> None:
    references = [ReferenceTaps.of(taps(5, 1, 0.5)), ReferenceTaps.of(taps(3, 2, -1.0))]
    found = taps(4)
    both = sliced_distance(found, references, stream())
    alone = sliced_distance([t[2:] for t in found], references[1:], stream())
    torch.testing.assert_close(both[1:], alone)


def test_the_gradient_leads_to_the_references() -> None:
    reference = [ReferenceTaps.of(taps(8, 1, 2.0))]
    moving = [t.clone().requires_grad_() for t in taps(4)]
    first = sliced_distance(moving, reference, stream()).mean().item()
    for _ in range(40):
        loss = sliced_distance(moving, reference, stream()).mean()
        for t, g in zip(moving, torch.autograd.grad(loss, moving), strict=True):
            t.data -= 40 * g
    assert sliced_distance(moving, reference, stream()).mean().item() < 0.3 * first


def test_places_are_thinned_evenly() -> None:
    tap = torch.arange(2 * 3 * 16, dtype=torch.float32).reshape(2, 3, 4, 4)
    kept = ReferenceTaps.of([tap], limit=8).places[0]
    assert torch.equal(kept, tap.permute(1, 0, 2, 3).flatten(1)[:, ::4])


def test_quantiles() -> None:
    values = torch.tensor([[3.0, 1.0, 2.0, 0.0]])
    assert _quantiles(values, 4).tolist() == [[0.0, 1.0, 2.0, 3.0]]
    assert _quantiles(values, 2).tolist() == [[0.5, 2.5]]
    assert _quantiles(values, 8)[0, [0, 1, 7]].tolist() == [0.0, 0.25, 3.0]


def test_scales_have_weights() -> None:
    reference = [ReferenceTaps.of(taps(5, 1, 1.0))]
    each = [
        sliced_distance(taps(2), reference, stream(), weights=w, lines=256)
        for w in ([1.0, 0.0], [0.0, 1.0], [3.0, 1.0])
    ]
    torch.testing.assert_close(each[2], 0.75 * each[0] + 0.25 * each[1])


# ---------------------------------------------------------------------- patches, places, colours


def pictures(n: int, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 5, 5, generator=rng) * 1.2 - 0.6
    return F.interpolate(coarse, size=(32, 32), mode="bicubic", align_corners=False)


def striped(images: torch.Tensor) -> torch.Tensor:
    lines = images.clone()
    lines[:, :, ::3] -= 0.4
    return lines


def test_patches_tell_lines_and_not_colours() -> None:
    plain, drawn = pictures(4), striped(pictures(6, 1))
    basis = PatchBasis.of(drawn)
    assert [kernel.shape for kernel in basis.kernels] == [(24, 3, 5, 5)] * 2
    flat = torch.tensor([0.3, -0.2, 0.5])[:, None, None].expand(2, 3, 32, 32)
    assert all(float(tap.abs().max()) < 1e-4 for tap in basis.taps(flat))
    references = [ReferenceTaps.of(basis.taps(drawn))]

    def distance(images: torch.Tensor) -> float:
        return float(sliced_distance(basis.taps(images), references, stream()).mean())

    assert distance(striped(plain)) < 0.4 * distance(plain)
    assert abs(distance(plain + 0.3) - distance(plain)) < 1e-4


def test_components_of_patches_are_half_whitened() -> None:
    drawn = striped(pictures(6))
    (tap, _) = PatchBasis.of(drawn).taps(drawn)
    flat = tap.transpose(0, 1).flatten(1)
    covariance = flat @ flat.T / flat.shape[1]
    values = covariance.diagonal()
    off = covariance - values.diag()
    assert float(off.abs().max()) < 1e-3 * float(values.max())
    kernel = PatchBasis.of(drawn).kernels[0].flatten(1)
    # A component of variance v has weights v^-1/4 and so the variance v^1/2.
    torch.testing.assert_close(kernel.square().sum(1) * values, torch.ones(24), atol=0.02, rtol=0)


def test_places_are_further_channels() -> None:
    (found,) = placed([torch.zeros(2, 4, 3, 5)])
    assert found.shape == (2, 6, 3, 5)
    assert found[0, 4, :, 0].tolist() == pytest.approx([-PLACE, 0, PLACE])
    assert found[1, 5, 0].tolist() == pytest.approx([-PLACE, -PLACE / 2, 0, PLACE / 2, PLACE])


def test_recoloured_pictures_have_the_others_colours() -> None:
    images, like = (
        pictures(5) * 0.5 + 0.2,
        pictures(7, 3) * torch.tensor([0.5, 0.2, 0.3])[:, None, None],
    )
    found = recoloured(images, like)

    def moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        flat = x.transpose(0, 1).flatten(1)
        return flat.mean(1), torch.cov(flat)

    for own, wanted in zip(moments(found), moments(like), strict=True):
        torch.testing.assert_close(own, wanted, atol=1e-3, rtol=0)
    torch.testing.assert_close(recoloured(images, images), images, atol=1e-4, rtol=0)
