"""Pixel errors against closed forms."""

import math

import pytest
import torch

from models.losses.pixel import mse, psnr


@pytest.fixture
def pictures() -> torch.Tensor:
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) - 0.5


def test_shift_by_a_tenth(pictures):
    shifted = pictures + 0.1
    torch.testing.assert_close(mse(pictures, shifted), torch.full((3,), 0.01))
    # 10 log10(4 / 0.01): the range of [-1, 1] is 2.
    torch.testing.assert_close(
        psnr(pictures, shifted), torch.full((3,), 26.0206), atol=1e-3, rtol=0
    )


def test_equal_pictures(pictures):
    assert mse(pictures, pictures).tolist() == [0.0, 0.0, 0.0]
    assert psnr(pictures, pictures).tolist() == [math.inf] * 3


def test_psnr_equals_scikit_image(pictures):
    from skimage.metrics import peak_signal_noise_ratio

    other = pictures.flip(0)
    expected = peak_signal_noise_ratio(pictures[0].numpy(), other[0].numpy(), data_range=2)
    assert float(psnr(pictures, other)[0]) == pytest.approx(expected, abs=1e-4)


def test_rows_are_independent(pictures):
    other = pictures.flip(3)
    alone = torch.cat([mse(pictures[i : i + 1], other[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(mse(pictures, other), alone)
