"""Resampling with StyleGAN2's binomial filter [1, 3, 3, 1], in plain PyTorch operations.

Legend: N batch, C channels, H W image. Every function keeps the dtype and the memory format of its
input. `upfirdn2d` is the slow twin: the textbook definition that tests hold the fast forms against.
"""

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

HAS_TRITON = find_spec("triton") is not None
"""It comes with PyTorch's GPU builds."""
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
    """Upsample by zero insertion, pad, filter, downsample: the slow twin of what follows.

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
    return _kept_filter(gain, x.dtype, x.device)[None, None].expand(channels, 1, 4, 4)


@cache
def _kept_filter(gain: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    # Kept, since a copy from the host stops the stream, and a CUDA graph cannot hold one.
    with torch.inference_mode(False):
        return filter_2d(gain, dtype, device)


def blur(
    x: Float[Tensor, "N C H W"], padding: int, gain: float = 1.0, stride: int = 1
) -> Float[Tensor, "N C h w"]:
    """Low-pass filter with symmetric zero padding; `stride=2` computes only what is kept."""
    return _Blur.apply(x, padding, gain, stride)


class _Blur(torch.autograd.Function):
    """The filter is symmetric, so its adjoint is the filter again.

    torch's own backward pass of a depthwise convolution is about ten times slower on a CPU than the
    forward pass that this one runs. It is differentiable any number of times, and under
    `torch.func.vmap` the mapped dimension joins the batch.
    """

    @staticmethod
    def forward(x: Tensor, padding: int, gain: float, stride: int) -> Tensor:
        if x.is_cuda and HAS_TRITON:
            from models.stylegan2.blur_gpu import blur_gpu

            return blur_gpu(x, padding, gain, stride)
        channels = x.shape[1]
        kernel = _depthwise(channels, x, gain)
        return F.conv2d(x, kernel, padding=padding, stride=stride, groups=channels)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, padding, gain, stride = inputs
        ctx.settings = (padding, gain, stride, x.shape[2:])

    @staticmethod
    def vmap(  # type: ignore[override]
        info: Any, in_dims: tuple[Any, ...], x: Tensor, padding: int, gain: float, stride: int
    ) -> tuple[Tensor, int]:
        x = x.movedim(in_dims[0], 0)
        return blur(x.flatten(0, 1), padding, gain, stride).unflatten(0, x.shape[:2]), 0

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        padding, gain, stride, (height, width) = ctx.settings
        if stride > 1:
            n, c = gy.shape[:2]
            # Outputs of the full filter that were skipped had no influence: their gradient is 0.
            full = gy.new_zeros(
                (n, c, height + 2 * padding - 3, width + 2 * padding - 3)
            ).contiguous(memory_format=_format_of(gy))
            full[:, :, ::stride, ::stride] = gy
            gy = full
        return blur(gy, 3 - padding, gain), None, None, None


def _format_of(x: Tensor) -> torch.memory_format:
    is_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if is_last else torch.contiguous_format


def upsample2x(x: Float[Tensor, "N C H W"]) -> Float[Tensor, "N C h w"]:
    """Double the size: zero insertion and filter (gain 4) in one transposed convolution."""
    channels = x.shape[1]
    return F.conv_transpose2d(x, _depthwise(channels, x, 4.0), stride=2, padding=1, groups=channels)
