"""The layers of the synthesis network, with rosinality's parameter names.

Legend: N batch, I/O in/out channels, k kernel size.
"""

import math

import torch
from torch import Tensor, nn

from models.stylegan2.layers import SQRT2, Bias, EqualLinear, leaky_relu, leaky_relu_
from models.stylegan2.modulated_conv import Form, FrozenKernel, is_constant, modulated_conv2d
from models.stylegan2.resample import blur, upsample2x
from models.stylegan2.residual import LowRank


class ModulatedConv(nn.Module):
    """A modulated convolution: kernel `weight` [1 O I k k] and its style affine `modulation`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        w_dim: int,
        *,
        up: bool,
        demodulate: bool,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, out_channels, in_channels, kernel, kernel))
        self.modulation = EqualLinear(w_dim, in_channels, bias_init=1.0)
        self.scale = 1.0 / math.sqrt(in_channels * kernel * kernel)
        self.up, self.demodulate = up, demodulate
        self._kept: FrozenKernel | None = None

    def forward(
        self, x: Tensor, styles: Tensor, *, gain: float, residual: LowRank | None, form: Form
    ) -> Tensor:
        return modulated_conv2d(
            x,
            self.weight[0],
            styles,
            scale=self.scale,
            gain=gain,
            should_demodulate=self.demodulate,
            up=self.up,
            residual=residual,
            form=form,
            kept=self._frozen_kernel(),
        )

    def _frozen_kernel(self) -> FrozenKernel | None:
        """Kept while the kernel is frozen and the layer's own: not one of a `functional_call`."""
        if torch.compiler.is_compiling() or not self.demodulate:
            return None
        weight = self.weight
        if not isinstance(weight, nn.Parameter) or not is_constant(weight):
            return None
        if self._kept is None or not self._kept.fits(weight):
            self._kept = FrozenKernel(weight, self.up)
        return self._kept


class NoiseStrength(nn.Module):
    """The learned noise gain, rosinality's `NoiseInjection` (key `weight`, shape [1])."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))


class StyledConv(nn.Module):
    """Modulated 3x3 convolution, filter after an up-convolution, noise, bias, LeakyReLU."""

    def __init__(self, in_channels: int, out_channels: int, w_dim: int, *, up: bool) -> None:
        super().__init__()
        self.conv = ModulatedConv(in_channels, out_channels, 3, w_dim, up=up, demodulate=True)
        self.noise = NoiseStrength()
        self.activate = Bias(out_channels)

    def forward(
        self,
        x: Tensor,
        styles: Tensor,
        noise: Tensor | None,
        *,
        clamp: float | None,
        residual: LowRank | None,
        form: Form,
    ) -> Tensor:
        # LeakyReLU is positively homogeneous: its gain sqrt(2) rides on d, noise and bias for free.
        y = self.conv(x, styles, gain=SQRT2, residual=residual, form=form)
        if self.conv.up:
            y = blur(y, padding=1, gain=4.0)
        bias = (self.activate.bias * SQRT2).to(y.dtype)[None, :, None, None]
        if noise is not None:
            noise = (noise * (self.noise.weight * SQRT2)).to(y.dtype)
        if not torch.is_grad_enabled() or not any(
            t is not None and t.requires_grad for t in (y, noise, bias)
        ):
            # No graph: the fresh result of the convolution is changed in place.
            y = leaky_relu_((y if noise is None else y.add_(noise)).add_(bias))
        else:
            y = leaky_relu((y if noise is None else y + noise) + bias)
        return y if clamp is None else y.clamp(-clamp, clamp)


class ToRGB(nn.Module):
    """Modulated 1x1 convolution to three channels, added to the upsampled image so far."""

    def __init__(self, in_channels: int, w_dim: int) -> None:
        super().__init__()
        self.conv = ModulatedConv(in_channels, 3, 1, w_dim, up=False, demodulate=False)
        self.bias = nn.Parameter(torch.zeros(1, 3, 1, 1))

    def forward(
        self, x: Tensor, styles: Tensor, image: Tensor | None, *, clamp: float | None, form: Form
    ) -> Tensor:
        y = self.conv(x, styles, gain=1.0, residual=None, form=form)
        y = y + self.bias.to(y.dtype)
        if clamp is not None:
            y = y.clamp(-clamp, clamp)
        y = y.to(styles.dtype)  # the image accumulates in the master precision
        return y if image is None else y + upsample2x(image)


class ConstantInput(nn.Module):
    """The learned 4x4 input (key `input`, shape [1 C 4 4])."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.input = nn.Parameter(torch.randn(1, channels, 4, 4))
