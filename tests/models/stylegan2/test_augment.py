"""Adaptive augmentation: identity at p = 0, the stated probabilities, what the maps mean."""

import pytest
import torch

from models.stylegan2.augment import (
    adjusted_strength,
    augment,
    sample_colour_maps,
    sample_plane_maps,
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def test_p_zero_is_the_input_itself():
    image = torch.randn(2, 3, 8, 8)
    assert augment(image, 0.0) is image


def test_p_one_changes_every_picture():
    image = torch.rand(16, 3, 16, 16) * 2 - 1
    changed = augment(image, 1.0)
    assert changed.shape == image.shape
    assert torch.isfinite(changed).all()
    assert float((changed - image).abs().flatten(1).max(1).values.min()) > 0.1


def test_strength_is_the_share_of_what_changes():
    n, p = 6000, 0.3
    keep = 1 - p
    same = (sample_colour_maps(n, p) - torch.eye(4)).abs().amax((1, 2)) < 1e-6
    # Five steps; half of the luma flips do nothing.
    assert abs(float(same.float().mean()) - keep**4 * (keep + p / 2)) < 0.02
    same = (sample_plane_maps(n, p) - torch.eye(3)).abs().amax((1, 2)) < 1e-6
    # Flip (half do nothing), quarter turn (one in four), shift, scale, rotations, stretch, shift.
    assert abs(float(same.float().mean()) - (keep + p / 2) * (keep + p / 4) * keep**5) < 0.02


def test_vanishing_strength_is_the_identity():
    image = torch.rand(4, 3, 8, 8)
    assert torch.allclose(augment(image, 1e-9), image, atol=1e-5)


def test_plane_maps_are_affine_and_flip_half():
    maps = sample_plane_maps(4000, 1.0)
    assert torch.equal(maps[:, 2], torch.tensor([0.0, 0.0, 1.0]).expand(4000, 3))
    determinant = torch.linalg.det(maps)
    assert abs(float((determinant < 0).float().mean()) - 0.5) < 0.05
    # Scale 2^N(0, 0.2) on both axes, everything else keeps the area.
    assert abs(float(determinant.abs().log2().std()) - 0.4) < 0.03


def test_a_flat_picture_has_no_geometry():
    image = torch.full((8, 3, 16, 16), 0.3)
    changed = augment(image, 1.0)
    assert torch.allclose(changed, changed[:, :, :1, :1].expand_as(changed), atol=1e-5)


def test_grey_stays_grey():
    maps = sample_colour_maps(200, 1.0)
    grey = torch.tensor([0.4, 0.4, 0.4, 1.0])
    colour = maps @ grey
    assert torch.allclose(colour[:, :3], colour[:, :1].expand(-1, 3), atol=1e-5)
    assert float(colour[:, 0].std()) > 0.1
    red = (maps @ torch.tensor([1.0, 0.0, 0.0, 1.0]))[:, :3]
    assert float((red.amax(1) - red.amin(1)).min()) > 1e-3


def test_differentiable():
    image = torch.rand(4, 3, 8, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(augment(image, 0.8).square().sum(), image)
    assert torch.isfinite(gradient).all()
    assert float(gradient.abs().max()) > 0


def test_pictures_are_augmented_independently():
    image = torch.rand(1, 3, 16, 16).expand(8, -1, -1, -1)
    changed = augment(image, 1.0)
    for n in range(1, 8):
        assert not torch.allclose(changed[n], changed[0], atol=1e-2)


@pytest.mark.parametrize(
    ("p", "sign", "expected"),
    [(0.2, 0.9, 0.3), (0.2, 0.1, 0.1), (0.95, 1.0, 1.0), (0.05, 0.0, 0.0), (0.5, 0.7, 0.6)],
)
def test_controller(p, sign, expected):
    moved = adjusted_strength(torch.tensor(p), torch.tensor(sign), 0.6, 0.1)
    assert float(moved) == pytest.approx(expected)
