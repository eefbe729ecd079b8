"""The StyleGAN2 discriminator (residual), with rosinality's parameter names.

Legend: N batch, I/O in/out channels, C H W image.
"""

import math
from collections.abc import Mapping
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from models.stylegan2.layers import SQRT2, Bias, EqualConv2d, EqualLinear, PixelNorm, leaky_relu
from models.stylegan2.resample import blur


def _activate(x: Tensor, module: nn.Module, clamp: float | None) -> Tensor:
    # The convolution before it already carries the activation's gain sqrt(2).
    y = leaky_relu(x + (cast(Bias, module).bias * SQRT2).to(x.dtype)[None, :, None, None])
    return y if clamp is None else y.clamp(-clamp, clamp)


class ResBlock(nn.Module):
    """Two 3x3 convolutions, the second of stride 2, and a 1x1 skip; sum over sqrt(2)."""

    def __init__(self, in_channels: int, out_channels: int, clamp: float | None) -> None:
        super().__init__()
        self.clamp = clamp
        # The keys are rosinality's Sequential indices: conv2.0 and skip.0 are its blur buffers.
        self.conv1 = nn.ModuleDict(
            {"0": EqualConv2d(in_channels, in_channels, 3, padding=1), "1": Bias(in_channels)}
        )
        self.conv2 = nn.ModuleDict(
            {"1": EqualConv2d(in_channels, out_channels, 3, stride=2), "2": Bias(out_channels)}
        )
        self.skip = nn.ModuleDict({"1": EqualConv2d(in_channels, out_channels, 1)})

    def forward(self, x: Float[Tensor, "N I H W"]) -> Float[Tensor, "N O h w"]:
        y = _activate(self.conv1["0"](x, SQRT2), self.conv1["1"], self.clamp)
        y = self.conv2["1"](blur(y, padding=2), SQRT2)
        y = _activate(y, self.conv2["2"], self.clamp)
        skip = self.skip["1"](blur(x, padding=1, stride=2))
        return (y + skip) * (1.0 / SQRT2)


class Discriminator(nn.Module):
    """Image (and condition) to logit.

    Args:
        resolution: input size, px.
        widths: channels by resolution, 4..resolution.
        c_dim: size of the condition; 0 for none. A conditional discriminator projects its last
            features on an embedding of c (NVIDIA's `MappingNetwork` with z_dim 0).
        mapping_layers: depth of that embedding.
        stddev_group: images per group of the minibatch standard deviation.
        conv_clamp: clamp of every activation (NVIDIA's half-precision networks use 256), or None.
    """

    def __init__(
        self,
        resolution: int,
        widths: Mapping[int, int],
        *,
        c_dim: int = 0,
        mapping_layers: int = 8,
        stddev_group: int = 4,
        conv_clamp: float | None = None,
    ) -> None:
        super().__init__()
        self.resolution, self.c_dim, self.stddev_group = resolution, c_dim, stddev_group
        self.conv_clamp = conv_clamp
        self.compute_dtype: torch.dtype | None = None
        self.memory_format = torch.contiguous_format
        from_rgb = nn.ModuleDict(
            {"0": EqualConv2d(3, widths[resolution], 1), "1": Bias(widths[resolution])}
        )
        sizes = [res for res in sorted(widths, reverse=True) if res <= resolution]
        blocks = [ResBlock(widths[res], widths[res // 2], conv_clamp) for res in sizes if res > 4]
        self.convs = nn.ModuleList([from_rgb, *blocks])
        self.final_conv = nn.ModuleDict(
            {"0": EqualConv2d(widths[4] + 1, widths[4], 3, padding=1), "1": Bias(widths[4])}
        )
        out_dim = widths[4] if c_dim else 1
        self.final_linear = nn.Sequential(
            EqualLinear(widths[4] * 16, widths[4], is_activated=True),
            EqualLinear(widths[4], out_dim),
        )
        if c_dim:
            self.embed = EqualLinear(c_dim, out_dim)
            self.style = nn.Sequential(
                PixelNorm(),
                *(
                    EqualLinear(out_dim, out_dim, lr_mul=0.01, is_activated=True)
                    for _ in range(mapping_layers)
                ),
            )

    def forward(
        self, image: Float[Tensor, "N 3 H W"], c: Float[Tensor, "N K"] | None = None
    ) -> Float[Tensor, "N 1"]:
        """Logits; higher means more real.

        Args:
            image: [-1, 1]; N a multiple of `stddev_group`, or smaller than it.
            c: condition, required when `c_dim > 0`.
        """
        x = self.features(image)[-1]
        x = self.final_linear(x.flatten(1))
        if not self.c_dim:
            return x
        if c is None:
            raise ValueError(
                f"this discriminator is conditional: it needs c of shape [N {self.c_dim}]"
            )
        return (x * self.style(self.embed(c))).sum(1, keepdim=True) / math.sqrt(x.shape[1])

    def features(self, image: Float[Tensor, "N 3 H W"]) -> list[Tensor]:
        """Activations after from-RGB, after every block, and after the last 3x3 convolution."""
        dtype = self.compute_dtype or image.dtype
        x = image.to(dtype).contiguous(memory_format=self.memory_format)
        clamp = self.conv_clamp
        from_rgb = cast(nn.ModuleDict, self.convs[0])
        taps = [_activate(from_rgb["0"](x, SQRT2), from_rgb["1"], clamp)]
        for block in self.convs[1:]:
            taps.append(block(taps[-1]))
        x = taps[-1].to(image.dtype)
        x = torch.cat([x, minibatch_stddev(x, self.stddev_group)], dim=1)
        taps.append(_activate(self.final_conv["0"](x, SQRT2), self.final_conv["1"], clamp))
        return taps


def minibatch_stddev(x: Float[Tensor, "N C H W"], group: int) -> Float[Tensor, "N 1 H W"]:
    """One extra channel: the mean standard deviation over a group of images (StyleGAN, section 3).

    Image n belongs to the group of all images with the same n modulo N/group.
    """
    n, c, h, w = x.shape
    group = min(group, n)
    if n % group:
        raise ValueError(
            f"discriminator: expected a batch of at most {group} or a multiple of it, found {n}"
        )
    y = x.reshape(group, n // group, c, h, w)
    y = (y.var(0, unbiased=False) + 1e-8).sqrt().mean(dim=(1, 2, 3))
    return y.repeat(group)[:, None, None, None].expand(n, 1, h, w)
