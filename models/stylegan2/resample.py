"""Resampling with StyleGAN2's binomial filter [1, 3, 3, 1], in plain PyTorch operations.

Legend: N batch, C channels, H W image. Every function keeps the dtype and the memory format of its
input. `upfirdn2d` is the slow twin: the textbook definition that tests hold the fast forms against.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

TAPS = (1.0, 3.0, 3.0, 1.0)
"""The 1-D resampling filter of StyleGAN2, before normalisation."""


def filter_2d(
    gain: float = 1.0, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None
) -> Float[Tensor, "4 4"]:
    """The separable 2-D filter, normalised to sum to `gain`."""
    taps = torch.tensor(TAPS, dtype=dtype, device=device)
    kernel = torch.outer(taps, taps)
    return kernel * (gain / kernel.sum())


def upfirdn2d(
    x: Float[Tensor, "N C H W"],
    kernel: Float[Tensor, "kh kw"],
    up: int = 1,
    down: int = 1,
    padding: tuple[int, int] = (0, 0),
) -> Float[Tensor, "N C h w"]:
    """Upsample by zero insertion, pad, filter, downsample: the reference definition.

    Source: StyleGAN2 (Karras et al. 2020), `upfirdn_2d`. The filter is applied as a convolution
    (flipped), `padding` is (before, after) on both axes.
    """
    n, c, h, w = x.shape
    if up > 1:
        x = x.reshape(n, c, h, 1, w, 1)
        x = F.pad(x, [0, up - 1, 0, 0, 0, up - 1]).reshape(n, c, h * up, w * up)
    x = F.pad(x, [padding[0], padding[1], padding[0], padding[1]])
    weight = kernel.flip(0, 1).to(x.dtype)[None, None].expand(c, 1, -1, -1)
    return F.conv2d(x, weight, groups=c)[:, :, ::down, ::down]


def _depthwise(channels: int, x: Tensor, gain: float) -> Tensor:
    return filter_2d(gain, x.dtype, x.device)[None, None].expand(channels, 1, 4, 4)


def blur(
    x: Float[Tensor, "N C H W"], padding: int, gain: float = 1.0, stride: int = 1
) -> Float[Tensor, "N C h w"]:
    """Low-pass filter with symmetric zero padding; `stride=2` computes only what is kept."""
    channels = x.shape[1]
    return F.conv2d(
        x, _depthwise(channels, x, gain), padding=padding, stride=stride, groups=channels
    )


def upsample2x(x: Float[Tensor, "N C H W"]) -> Float[Tensor, "N C h w"]:
    """Double the size: zero insertion and filter (gain 4) in one transposed convolution."""
    channels = x.shape[1]
    return F.conv_transpose2d(x, _depthwise(channels, x, 4.0), stride=2, padding=1, groups=channels)
