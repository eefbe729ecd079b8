"""Structural similarity, per picture. Takes pictures in [-1, 1], measures them in [0, 1].

The luminance term depends on where zero is, so [-1, 1] itself would give other values than the
field's programs, which measure [0, 1] or 0..255.

Legend: N batch, C channels, H W image, M scales.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

WINDOW = 11
"""Side of the Gaussian window, px."""
SIGMA = 1.5
C1, C2 = 0.01**2, 0.03**2
"""Wang's stabilisers (K L)^2 with K1 = 0.01, K2 = 0.03 and the range L = 1 of [0, 1]."""
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Exponents of the five scales, finest first (Wang, Simoncelli, Bovik 2003)."""


def ssim(a: Float[Tensor, "N C H W"], b: Float[Tensor, "N C H W"]) -> Float[Tensor, " N"]:
    """Structural similarity (Wang et al. 2004): 1 for equal pictures, higher is better.

    Gaussian window of 11x11, sigma 1.5, biased (population) variances, per channel, averaged over
    the places where the window fits whole. Equals `skimage.metrics.structural_similarity` of the
    pictures in [0, 1] with `gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
    data_range=1`.

    Args:
        a, b: in [-1, 1].

    Raises:
        ValueError: a picture is smaller than the window.
    """
    luminance, contrast = _maps(_from_zero(a), _from_zero(b))
    return (luminance * contrast).mean(dim=(1, 2, 3))


def num_scales(height: int, width: int) -> int:
    """Scales of `ms_ssim`: up to five, while the halved picture still holds the window of 11 px.

    5 from 176 px, 4 from 88, 3 from 44, 2 from 22, else 1; so 3 at 64 px.
    """
    scales = 1
    while scales < len(SCALE_WEIGHTS) and min(height, width) // 2**scales >= WINDOW:
        scales += 1
    return scales


def ms_ssim(a: Float[Tensor, "N C H W"], b: Float[Tensor, "N C H W"]) -> Float[Tensor, " N"]:
    """Multi-scale structural similarity: prod_m cs_m^w_m * ssim_M^w_M, mean over channels.

    `num_scales` chooses M by size. With fewer than five scales the first M weights are kept and
    divided by their sum, so values at 64 px (three scales) are not comparable with those at 256 px.
    Scales are made by 2x2 average pooling; a negative factor counts as 0 (its power is undefined).

    Args:
        a, b: in [-1, 1].

    Raises:
        ValueError: a picture is smaller than the window.
    """
    a, b = _from_zero(a), _from_zero(b)
    scales = num_scales(*a.shape[2:])
    weights = torch.tensor(SCALE_WEIGHTS[:scales], dtype=a.dtype, device=a.device)
    weights = weights / weights.sum()
    result = torch.ones(a.shape[:2], dtype=a.dtype, device=a.device)  # [N C]
    for index in range(scales):
        luminance, contrast = _maps(a, b)
        last = index == scales - 1
        factor = (luminance * contrast if last else contrast).mean(dim=(2, 3))
        # The floor keeps the gradient of a broken power finite.
        result = result * factor.clamp(min=1e-8) ** weights[index]
        if not last:
            a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return result.mean(1)


def _from_zero(images: Tensor) -> Tensor:
    return (images + 1) / 2


def _maps(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The luminance term and the contrast-structure term at every place, [N C h w] each."""
    n, c, h, w = a.shape
    if min(h, w) < WINDOW:
        raise ValueError(
            f"ssim: expected pictures of at least {WINDOW} px (its window), found {h}x{w}"
        )
    # One pass filters the five moments of both pictures, as channels of one depthwise convolution
    # (several times faster on a CPU than as a batch of single channels).
    moments = torch.cat([a, b, a * a, b * b, a * b], dim=1)  # [N 5C H W]
    taps = torch.arange(WINDOW, dtype=a.dtype, device=a.device) - WINDOW // 2
    window = torch.exp(-0.5 * (taps / SIGMA).square())
    window = (window / window.sum()).expand(5 * c, 1, 1, WINDOW)
    moments = F.conv2d(moments, window.transpose(2, 3), groups=5 * c)
    moments = F.conv2d(moments, window, groups=5 * c)
    mean_a, mean_b, aa, bb, ab = moments.reshape(n, 5, c, *moments.shape[2:]).unbind(1)
    covariance = ab - mean_a * mean_b
    variances = aa - mean_a.square() + bb - mean_b.square()
    luminance = (2 * mean_a * mean_b + C1) / (mean_a.square() + mean_b.square() + C1)
    return luminance, (2 * covariance + C2) / (variances + C2)
