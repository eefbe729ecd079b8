"""The IR-SE trunk: ArcFace's residual network with squeeze-and-excitation, its width a setting.

Parameter names are those of ArcFace's PyTorch port (TreB1eN), which pSp, e4e and their kin share:
`input_layer.*`, `body.N.res_layer.M.*`, `body.N.shortcut_layer.M.*`.

Legend: N batch, I/O in/out channels, C channels, H W input size, h w output size.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

IR_SE_50 = (3, 4, 14, 3)
"""Units of each of the four stages of IR-SE50 (ArcFace, arXiv 1801.07698)."""


class SqueezeExcite(nn.Module):
    """Scale every channel by a gate computed from the channels' means (reduction 16)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 16, 1)
        self.fc1 = nn.Conv2d(channels, hidden, 1, bias=False)
        self.fc2 = nn.Conv2d(hidden, channels, 1, bias=False)

    def forward(self, x: Float[Tensor, "N C H W"]) -> Float[Tensor, "N C H W"]:
        gate = x.mean(dim=(2, 3), keepdim=True)
        return x * torch.sigmoid(self.fc2(F.relu(self.fc1(gate))))


class StridedProjection(nn.Conv2d):
    """A 1x1 convolution of every `stride`-th pixel, which is what a strided one computes.

    The pixels are picked first: the weight gradient of oneDNN's strided 1x1 convolution writes past
    its buffer where the input has fewer channels than a vector register (oneDNN issue 6035; seen
    with torch 2.13 on AVX2 as wrong gradients, hangs and crashes).
    """

    def forward(self, input: Float[Tensor, "N I H W"]) -> Float[Tensor, "N O h w"]:
        rows, columns = self.stride
        return F.conv2d(input[:, :, ::rows, ::columns], self.weight)


class Unit(nn.Module):
    """Pre-activation residual unit: BN, conv, PReLU, conv (strided), BN, squeeze-excite.

    The shortcut is the strided input where the channels match, else a 1x1 convolution and BN.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        if in_channels == out_channels:
            self.shortcut_layer: nn.Module = nn.MaxPool2d(1, stride)
        else:
            self.shortcut_layer = nn.Sequential(
                StridedProjection(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(in_channels),
            nn.Conv2d(in_channels, out_channels, 3, 1, 1, bias=False),
            nn.PReLU(out_channels),
            nn.Conv2d(out_channels, out_channels, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out_channels),
            SqueezeExcite(out_channels),
        )

    def forward(self, x: Float[Tensor, "N I H W"]) -> Float[Tensor, "N O h w"]:
        return self.res_layer(x) + self.shortcut_layer(x)


class IrSe(nn.Module):
    """Stem and four stages; every stage halves the size and, after the first, doubles the channels.

    Args:
        width: channels of the stem and the first stage (64 in IR-SE50).
        units: residual units of each stage.
        in_channels: channels of the input picture.
        stem_stride: 1 as published, where the first unit halves the size; 2 halves it in the stem
            already, which saves the convolutions at full size: right for small pictures on a CPU.
    """

    def __init__(
        self,
        width: int = 64,
        units: Sequence[int] = IR_SE_50,
        in_channels: int = 3,
        stem_stride: int = 1,
    ) -> None:
        super().__init__()
        self.input_layer = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, stem_stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.PReLU(width),
        )
        body: list[nn.Module] = []
        self.stage_ends: list[int] = []
        channels = width
        for stage, count in enumerate(units):
            out_channels = width * 2**stage
            for index in range(count):
                is_halving = index == 0 and not (stage == 0 and stem_stride == 2)
                body.append(Unit(channels, out_channels, stride=2 if is_halving else 1))
                channels = out_channels
            self.stage_ends.append(len(body) - 1)
        self.body = nn.Sequential(*body)

    def stages(self, image: Float[Tensor, "N I H W"]) -> list[Float[Tensor, "N C h w"]]:
        """The last activation of every stage, at 1/2, 1/4, 1/8 and 1/16 of the input's size."""
        x, found = self.input_layer(image), []
        for index, unit in enumerate(self.body):
            x = unit(x)
            if index in self.stage_ends:
                found.append(x)
        return found
