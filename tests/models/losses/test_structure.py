"""SSIM against scikit-image, MS-SSIM against a NumPy twin."""

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate1d
from skimage.data import astronaut
from skimage.metrics import structural_similarity

from models.losses.structure import C1, C2, SCALE_WEIGHTS, ms_ssim, num_scales, ssim


def smooth_pictures(count: int, size: int, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 6, 6, generator=rng) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")


@pytest.mark.parametrize("size", [16, 64])
def test_ssim_equals_scikit_image(size):
    a = smooth_pictures(3, size)
    b = (a + 0.3 * torch.randn(a.shape, generator=torch.Generator().manual_seed(1))).clamp(-1, 1)
    expected = [
        structural_similarity(
            p.permute(1, 2, 0).numpy() / 2 + 0.5,
            q.permute(1, 2, 0).numpy() / 2 + 0.5,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1,
            channel_axis=2,
        )
        for p, q in zip(a.double(), b.double(), strict=True)
    ]
    np.testing.assert_allclose(ssim(a, b).numpy(), expected, atol=2e-6)


def test_photographs_score_as_scikit_image_scores_their_bytes():
    """As anybody would call it on 8-bit pictures, without converting anything."""
    face = astronaut()[:128, 160:288]
    noisy = np.clip(face + np.random.default_rng(0).normal(0, 12, face.shape), 0, 255)
    noisy = noisy.astype(np.uint8)
    expected = structural_similarity(
        face,
        noisy,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
        channel_axis=2,
        data_range=255,
    )
    a, b = (
        torch.from_numpy(x.copy()).permute(2, 0, 1)[None].double() / 127.5 - 1
        for x in (face, noisy)
    )
    assert float(ssim(a, b)) == pytest.approx(expected, abs=1e-6)


def test_flat_pictures_have_a_closed_form():
    a, b = torch.full((1, 3, 32, 32), 0.5), torch.full((1, 3, 32, 32), -0.25)
    expected = (2 * 0.75 * 0.375 + C1) / (0.75**2 + 0.375**2 + C1)
    assert float(ssim(a, b)) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("side", "scales"),
    [(11, 1), (21, 1), (22, 2), (32, 2), (64, 3), (88, 4), (128, 4), (176, 5), (1024, 5)],
)
def test_number_of_scales(side, scales):
    assert num_scales(side, 2 * side) == scales


def slow_ms_ssim(a: np.ndarray, b: np.ndarray, scales: int) -> float:
    """Textbook MS-SSIM of two [C H W] pictures in [-1, 1]."""
    a, b = (a + 1) / 2, (b + 1) / 2
    taps = np.exp(-0.5 * ((np.arange(11) - 5) / 1.5) ** 2)
    taps /= taps.sum()

    def window(x: np.ndarray) -> np.ndarray:
        return correlate1d(correlate1d(x, taps, 1), taps, 2)[:, 5:-5, 5:-5]

    weights = np.array(SCALE_WEIGHTS[:scales]) / sum(SCALE_WEIGHTS[:scales])
    result = np.ones(len(a))
    for index in range(scales):
        ma, mb = window(a), window(b)
        covariance = window(a * b) - ma * mb
        contrast = (2 * covariance + C2) / (window(a * a) - ma**2 + window(b * b) - mb**2 + C2)
        if index == scales - 1:
            contrast = contrast * (2 * ma * mb + C1) / (ma**2 + mb**2 + C1)
        result *= contrast.mean((1, 2)) ** weights[index]
        a, b = (x.reshape(3, x.shape[1] // 2, 2, -1, 2).mean((2, 4)) for x in (a, b))
    return float(result.mean())


@pytest.mark.parametrize(("size", "scales"), [(64, 3), (192, 5)])
def test_ms_ssim_equals_the_slow_twin(size, scales):
    a = smooth_pictures(2, size)
    b = (a + 0.2 * torch.randn(a.shape, generator=torch.Generator().manual_seed(1))).clamp(-1, 1)
    expected = [
        slow_ms_ssim(p.numpy(), q.numpy(), scales)
        for p, q in zip(a.double(), b.double(), strict=True)
    ]
    np.testing.assert_allclose(ms_ssim(a, b).numpy(), expected, atol=2e-5)
    assert min(expected) < 0.97


def test_equal_pictures_score_one_and_rows_are_independent():
    a = smooth_pictures(3, 64)
    torch.testing.assert_close(ssim(a, a), torch.ones(3))
    torch.testing.assert_close(ms_ssim(a, a), torch.ones(3))
    b = a.flip(3)
    torch.testing.assert_close(ms_ssim(a, b)[1:2], ms_ssim(a[1:2], b[1:2]))


def test_opposite_pictures_keep_a_finite_gradient():
    a = smooth_pictures(1, 64).requires_grad_(True)
    value = ms_ssim(a, -a.detach())
    (gradient,) = torch.autograd.grad(value.sum(), a)
    assert 0 <= float(value.detach()) < 1e-3
    assert bool(gradient.isfinite().all())


def test_too_small():
    a = torch.zeros(1, 3, 10, 40)
    with pytest.raises(ValueError, match=r"at least 11 px .* found 10x40"):
        ssim(a, a)
