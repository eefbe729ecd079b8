"""The part of the picture that a face network sees."""

import numpy as np
import pytest
import torch

from models.losses.dlib_face import FACE_CHIP
from models.losses.face_chip import FaceChip
from models.losses.sface import CHIP
from tasks.input.align import FACE_POINTS


@pytest.mark.parametrize("size", [64, 150, 256, 400])
def test_the_square_is_where_it_says(size):
    """A linear ramp keeps its values at the places of the samples, up to the filter's ripple."""
    ramp = ((torch.arange(size) + 0.5) / size).expand(1, 3, size, size)
    seen = FaceChip(left=0.1, top=0.2, side=0.7, pixels=150)(ramp)
    places = 0.1 + (torch.arange(150) + 0.5) * 0.7 / 150
    torch.testing.assert_close(seen[0, 0, 10], places, atol=5e-4, rtol=0)
    seen = FaceChip(left=0.1, top=0.2, side=0.7, pixels=150)(ramp.mT)
    torch.testing.assert_close(seen[0, 0, :, 10], places + 0.1, atol=5e-4, rtol=0)


def test_outside_is_the_nearest_pixel_and_fine_patterns_are_averaged():
    image = torch.zeros(1, 3, 64, 64)
    image[..., 0] = 1
    seen = FaceChip(left=-0.5, top=0.0, side=1.0, pixels=150)(image)
    torch.testing.assert_close(seen[..., :75], torch.ones(1, 3, 150, 75))
    board = (torch.arange(600) % 2).float().expand(1, 3, 600, 600)
    torch.testing.assert_close(
        FACE_CHIP(board)[..., 20:130], torch.full((1, 3, 150, 110), 0.5), atol=0.01, rtol=0
    )


def test_the_square_takes_a_gradient_after_inference():
    """What is kept between calls was not made by inference mode, which allows no gradient."""
    with torch.inference_mode():
        FACE_CHIP(torch.zeros(1, 3, 77, 77))
    image = torch.zeros(1, 3, 77, 77, requires_grad=True)
    FACE_CHIP(image).sum().backward()
    assert float(image.grad.sum()) == pytest.approx(3 * 150 * 150, rel=1e-4)


def test_sface_sees_our_points_where_arcface_has_its_own():
    """ArcFace's five points at 112 px: the best scale and shift leave no common offset or scale."""
    wanted = np.array(
        [(38.29, 51.70), (73.53, 51.50), (56.03, 71.74), (41.55, 92.37), (70.73, 92.20)]
    )
    found = (np.array(FACE_POINTS) - (CHIP.left, CHIP.top)) / CHIP.side * CHIP.pixels
    assert np.abs((found - wanted).mean(0)).max() < 0.05
    centred, ours = wanted - wanted.mean(0), found - found.mean(0)
    assert (centred * ours).sum() == pytest.approx((centred**2).sum(), rel=0.002)
