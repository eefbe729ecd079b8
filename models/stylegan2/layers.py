"""Equalised-learning-rate layers, with rosinality's parameter names and shapes.

Legend: N batch, I/O in/out features or channels, k kernel size. A weight is stored with unit
variance and scaled when it is used (StyleGAN2, "equalized learning rate").
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

SQRT2 = math.sqrt(2.0)


def leaky_relu(x: Tensor) -> Tensor:
    """LeakyReLU(0.2). Its usual gain sqrt(2) is folded into what comes before it."""
    return F.leaky_relu(x, 0.2)


def leaky_relu_(x: Tensor) -> Tensor:
    """`leaky_relu` in place."""
    return F.leaky_relu(x, 0.2, inplace=True)


def scaled_lrelu(x: Tensor) -> Tensor:
    """LeakyReLU(0.2) times sqrt(2), StyleGAN2's `lrelu` with its default gain."""
    return F.leaky_relu(x, 0.2) * SQRT2


class PixelNorm(nn.Module):
    """Scale every vector to unit mean square along dimension 1."""

    def forward(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + 1e-8)


class EqualLinear(nn.Module):
    """Fully connected layer, `y = act(x W^T * lr_mul / sqrt(I) + b * lr_mul)`.

    Args:
        in_dim, out_dim: I and O.
        bias_init: initial bias (1 for style affines).
        lr_mul: learning-rate multiplier (0.01 in the mapping network).
        is_activated: apply `scaled_lrelu`.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        bias_init: float = 0.0,
        lr_mul: float = 1.0,
        is_activated: bool = False,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_dim, in_dim) / lr_mul)
        self.bias = nn.Parameter(torch.full((out_dim,), float(bias_init) / lr_mul))
        self.scale = lr_mul / math.sqrt(in_dim)
        self.lr_mul = lr_mul
        self.is_activated = is_activated

    def forward(self, x: Float[Tensor, "N I"]) -> Float[Tensor, "N O"]:
        weight, bias = self.weight.to(x.dtype) * self.scale, self.bias.to(x.dtype) * self.lr_mul
        y = F.linear(x, weight, bias)
        return scaled_lrelu(y) if self.is_activated else y


class EqualConv2d(nn.Module):
    """Convolution `y = conv(x, W / sqrt(I k k))`, without bias."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, padding: int = 0
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel, kernel))
        self.scale = 1.0 / math.sqrt(in_channels * kernel * kernel)
        self.stride, self.padding = stride, padding

    def forward(self, x: Float[Tensor, "N I H W"], gain: float = 1.0) -> Float[Tensor, "N O h w"]:
        weight = (self.weight * (self.scale * gain)).to(x.dtype)
        return F.conv2d(x, weight, stride=self.stride, padding=self.padding)


class Bias(nn.Module):
    """A per-channel bias, the parameter of rosinality's `FusedLeakyReLU` (key `bias`)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))
