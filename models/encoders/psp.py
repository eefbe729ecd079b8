"""Pyramid encoders on the IR-SE trunk; `GradualStyleEncoder` is pSp's (arXiv 2008.00951).

Parameter names and, at the default settings, shapes are the official ones. Width, number of units,
head width and input size are settings, so that a small generator gets a small encoder.

Legend: N batch, L num_ws, D w_dim, C H W image or feature map.
"""

import json
import math
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from models.encoders.irse import IR_SE_50, IrSe
from models.stylegan2.generator import Generator
from models.stylegan2.layers import EqualLinear

COARSE_ROWS, MIDDLE_ROWS = 3, 7
"""Rows before 3 read the features at 1/16 of the input's size, rows before 7 at 1/8, others 1/4.

Row i renders at 4 * 2**((i + 1) // 2) px whatever the generator's size, so every generator has the
same split: 3, 4 and 11 rows at 1024 px, 3, 4 and 3 rows at 64 px.
"""


KINDS = ("e4e", "psp", "restyle-e4e", "restyle-psp")


@dataclass(frozen=True, kw_only=True)
class TrunkSizes:
    """Sizes of an IR-SE trunk and the style heads on it. The defaults are the official ones.

    Attributes:
        input_size: height and width the network sees, px (a power of two, at least 32).
        width: channels of the first stage; the last has 8 times as many, and so has the pyramid.
        units: residual units of the four stages.
        head_width: channels inside the style heads (they hold most of the official parameters).
        stem_stride: 1 as published; 2 halves the size in the stem already (see `IrSe`).
    """

    input_size: int = 256
    width: int = 64
    units: tuple[int, ...] = IR_SE_50
    head_width: int = 512
    stem_stride: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "units", tuple(int(count) for count in self.units))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready values, for a card."""
        return json.loads(json.dumps(asdict(self)))

    def trunk_sizes(self) -> dict[str, Any]:
        """These sizes alone, by name."""
        return {each.name: getattr(self, each.name) for each in fields(TrunkSizes)}

    @staticmethod
    def tiny_sizes(generator: Generator) -> dict[str, Any]:
        """Those of a network that costs milliseconds: what every `tiny` architecture is made of."""
        return {
            "num_ws": generator.num_ws,
            "w_dim": generator.w_dim,
            "input_size": generator.resolution,
            "width": 4,
            "units": (1, 1, 1, 1),
            "head_width": 8,
        }


@dataclass(frozen=True, kw_only=True)
class EncoderArchitecture(TrunkSizes):
    """Sizes of a pyramid encoder. The defaults are the official e4e and pSp ones but for `num_ws`.

    Attributes:
        num_ws: rows of w+, L.
        w_dim: dimension of w, D.
        kind: "e4e" (a w and offsets to it) or "psp" (every row on its own); with "restyle-" before
            it, every head reads the trunk's last map, and there is no pyramid.
        in_channels: channels of the input; 6 for encoders that see a picture and a reconstruction.
    """

    num_ws: int
    w_dim: int = 512
    kind: Literal["e4e", "psp", "restyle-e4e", "restyle-psp"] = "e4e"
    in_channels: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in KINDS:
            raise ValueError(
                f"encoder kind: expected one of {', '.join(KINDS)}, found {self.kind!r}"
            )
        if self.input_size < 32 or self.input_size & (self.input_size - 1):
            raise ValueError(
                f"encoder input_size: expected a power of two >= 32, found {self.input_size}"
            )
        if len(self.units) != 4 or min(self.units) < 1:
            raise ValueError(f"encoder units: expected four counts >= 1, found {self.units}")
        if self.stem_stride not in (1, 2):
            raise ValueError(f"encoder stem_stride: expected 1 or 2, found {self.stem_stride}")
        for name in ("num_ws", "w_dim", "width", "head_width", "in_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"encoder {name}: expected >= 1, found {getattr(self, name)}")

    @classmethod
    def tiny(cls, generator: Generator, **changes: Any) -> "EncoderArchitecture":
        """The smallest example for a generator."""
        return cls(**{**cls.tiny_sizes(generator), **changes})


class GradualStyleBlock(nn.Module):
    """One style head ("map2style"): strided convolutions down to 1x1, then a linear layer to w.

    Args:
        in_channels: channels of the feature map.
        head_width: channels after the first convolution.
        spatial: height and width of the feature map, a power of two.
        w_dim: D.
    """

    def __init__(self, in_channels: int, head_width: int, spatial: int, w_dim: int) -> None:
        super().__init__()
        convs: list[nn.Module] = []
        for _ in range(int(math.log2(spatial))):
            convs += [nn.Conv2d(in_channels, head_width, 3, 2, 1), nn.LeakyReLU(0.01)]
            in_channels = head_width
        self.convs = nn.Sequential(*convs)
        self.linear = EqualLinear(in_channels, w_dim)

    def forward(self, x: Float[Tensor, "N C H W"]) -> Float[Tensor, "N D"]:
        x = self.convs(x).flatten(1)
        with torch.autocast(x.device.type, enabled=False):  # codes stay float32
            return self.linear(x.float())


class PyramidEncoder(IrSe):
    """IR-SE trunk, a top-down feature pyramid and one style head per row of w+.

    Attributes:
        is_flat: every head reads the trunk's last map, and there is no pyramid.
    """

    is_flat: ClassVar[bool] = False

    def __init__(self, architecture: EncoderArchitecture) -> None:
        arch = architecture
        super().__init__(arch.width, arch.units, arch.in_channels, arch.stem_stride)
        self.architecture = arch
        channels, size = 8 * arch.width, arch.input_size
        self.styles = nn.ModuleList(
            GradualStyleBlock(channels, arch.head_width, spatial, arch.w_dim)
            for spatial in (
                _spatial(0 if self.is_flat else row, size) for row in range(arch.num_ws)
            )
        )
        if self.is_flat:
            return
        self.latlayer1 = nn.Conv2d(4 * arch.width, channels, 1)
        self.latlayer2 = nn.Conv2d(2 * arch.width, channels, 1)

    def pyramid(self, image: Float[Tensor, "N I H W"], rows: int) -> list[Float[Tensor, "N C h w"]]:
        """The feature map that each of the first `rows` rows reads."""
        _, c1, c2, c3 = self.stages(self.resized(image))
        if self.is_flat:
            return [c3] * rows
        maps = [c3] * min(rows, COARSE_ROWS)
        if rows > COARSE_ROWS:
            p2 = _add_upsampled(c3, self.latlayer1(c2))
            maps += [p2] * (min(rows, MIDDLE_ROWS) - COARSE_ROWS)
            if rows > MIDDLE_ROWS:
                maps += [_add_upsampled(p2, self.latlayer2(c1))] * (rows - MIDDLE_ROWS)
        return maps

    def resized(self, image: Float[Tensor, "N I H W"]) -> Float[Tensor, "N I h w"]:
        """Bilinear with antialiasing to `input_size`: Pillow's filter, as the originals do."""
        size = self.architecture.input_size
        if image.shape[2:] == (size, size):
            return image
        return F.interpolate(image, (size, size), mode="bilinear", antialias=True)


class GradualStyleEncoder(PyramidEncoder):
    """pSp's encoder: every row of w+ - latent_avg from its own head."""

    def forward(self, image: Float[Tensor, "N I H W"]) -> Float[Tensor, "N L D"]:
        """Codes relative to `latent_avg`, from pictures in [-1, 1] of any size."""
        maps = self.pyramid(image, self.architecture.num_ws)
        return torch.stack([head(x) for head, x in zip(self.styles, maps, strict=True)], 1)


def _spatial(row: int, input_size: int) -> int:
    """Size of the feature map that the head of a row reads, px."""
    return input_size // (16 if row < COARSE_ROWS else 8 if row < MIDDLE_ROWS else 4)


def _add_upsampled(top: Tensor, lateral: Tensor) -> Tensor:
    size = lateral.shape[2:]
    return F.interpolate(top, size, mode="bilinear", align_corners=True) + lateral
