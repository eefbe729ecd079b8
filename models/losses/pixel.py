"""Pixel errors, per picture.

Legend: N batch, C H W image.
"""

import torch
from jaxtyping import Float
from torch import Tensor

PEAK = 2.0
"""Largest possible difference of two pictures in [-1, 1]."""


def mse(a: Float[Tensor, "N C H W"], b: Float[Tensor, "N C H W"]) -> Float[Tensor, " N"]:
    """Mean squared error in [-1, 1] units (four times that of [0, 1] units)."""
    return (a - b).square().mean(dim=(1, 2, 3))


def psnr(a: Float[Tensor, "N C H W"], b: Float[Tensor, "N C H W"]) -> Float[Tensor, " N"]:
    """Peak signal-to-noise ratio in dB of pictures in [-1, 1]: 10 log10(4 / mse).

    The peak is the full range, 2. Programs that put 2 instead of 4 in the fraction report 3.01 dB
    less. Equal pictures give infinity.
    """
    return 10.0 * torch.log10(PEAK**2 / mse(a, b))
