"""Random views: what they change and what they keep."""

import torch

from tasks.training import views as module
from tasks.training.views import block_rounding, disturb, views


def pictures(count: int = 64) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 6, 6, generator=rng)
    fine = torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bicubic")
    return fine.clamp(0, 1).mul(255).round().to(torch.uint8)


def test_views_follow_the_global_generator() -> None:
    torch.manual_seed(3)
    first, second = views(pictures()), views(pictures())
    torch.manual_seed(3)
    again = views(pictures())
    assert torch.equal(first, again)
    changed = (first - second).square().mean((1, 2, 3))
    assert int((changed > 1e-4).sum()) > 60
    assert first.shape == (64, 3, 32, 32)
    assert float(first.abs().max()) <= 1


def test_views_keep_the_picture_recognisable() -> None:
    """The nearest picture to a view, or to its mirror, is mostly the one it was made of."""
    torch.manual_seed(0)
    clean = pictures().float() / 127.5 - 1
    both = torch.cat([clean, clean.flip(3)]).flatten(1)
    both = both - both.mean(1, keepdim=True)
    found = views(pictures()).flatten(1)
    found = found - found.mean(1, keepdim=True)
    cosines = torch.nn.functional.normalize(found, dim=1) @ torch.nn.functional.normalize(both).T
    is_own = cosines.argmax(1) % 64 == torch.arange(64)
    assert float(is_own.float().mean()) > 0.8


def test_rounding_of_blocks_equals_the_sum_of_rounded_waves() -> None:
    """Slow twin: every coefficient by its own sum over a block."""
    images = torch.rand(1, 1, 16, 19) * 2 - 1
    strength = torch.tensor([0.8])
    found = block_rounding(images, strength, torch.default_generator)
    assert torch.equal(found[..., 16:], images[..., 16:])
    block, want = images[0, 0, 8:, :8], torch.zeros(8, 8)
    for u in range(8):
        for v in range(8):
            wave = module._cosines()[u][:, None] * module._cosines()[v]
            step = 0.04 * (1 + u + v) * 0.8
            want += ((block * wave).sum() / step).round() * step * wave
    torch.testing.assert_close(found[0, 0, 8:, :8], want, atol=1e-5, rtol=0)
    assert float((found - images)[..., :16].abs().mean()) > 0.01


def test_the_transform_is_orthonormal_and_weak_rounding_changes_little() -> None:
    basis = module._cosines()
    torch.testing.assert_close(basis @ basis.T, torch.eye(8), atol=1e-6, rtol=0)
    images = torch.rand(2, 3, 16, 16)
    found = block_rounding(images, torch.zeros(2), torch.default_generator)
    torch.testing.assert_close(found, images, atol=5e-3, rtol=0)


def test_disturbed_is_the_share_and_the_rest_stays() -> None:
    clean = pictures().float() / 127.5 - 1
    torch.manual_seed(0)
    found = disturb(clean, 0.5)
    is_same = (found == clean).flatten(1).all(1)
    assert 20 <= int(is_same.sum()) <= 44
    assert float((found - clean)[~is_same].square().mean()) > 1e-3
    assert float(found.abs().max()) <= 1
    assert disturb(clean, 0.0) is clean
