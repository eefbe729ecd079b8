"""Our own perceptual trunk: a small convolutional network for pictures of 32 to 256 px.

It stands in where LPIPS's backbones cannot be had, and its number is called "trunk distance", never
LPIPS. Smooth everywhere (SiLU, average pooling), because inversion methods descend its gradient.

Legend: N batch, C channels, H W image, T taps.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from models.encoders.checkpoint import check_layout
from models.errors import AssetError

MIN_RESOLUTION = 32
"""Smallest height and width, px: the last of five scales is then 2 px."""


@dataclass(frozen=True, kw_only=True)
class TrunkArchitecture:
    """Shape of the trunk.

    Attributes:
        widths: channels of each scale; scale 0 is the full resolution, each next one half of it.
        depths: 3x3 convolutions of each scale.
    """

    widths: Sequence[int] = (16, 48, 64, 96, 128)
    depths: Sequence[int] = (1, 1, 2, 2, 2)

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))
        object.__setattr__(self, "depths", tuple(self.depths))
        if len(self.widths) != len(self.depths) or not self.widths:
            raise ValueError(
                f"trunk: expected as many depths as widths, found {self.depths} and {self.widths}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready values."""
        return {key: list(value) for key, value in asdict(self).items()}


class PerceptualTrunk(nn.Module):
    """3x3 convolutions with SiLU at halving scales; the last activation of each scale is a tap."""

    def __init__(self, architecture: TrunkArchitecture | None = None) -> None:
        super().__init__()
        self.architecture = architecture or TrunkArchitecture()
        self.scales = nn.ModuleList()
        in_channels = 3
        for width, depth in zip(self.architecture.widths, self.architecture.depths, strict=True):
            convs = nn.ModuleList()
            for _ in range(depth):
                conv = nn.Conv2d(in_channels, width, 3, padding=1)
                # SiLU halves small signals: without this gain a fresh trunk's deep taps are flat.
                nn.init.normal_(conv.weight, std=1.8 / math.sqrt(9 * in_channels))
                nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
                convs.append(conv)
                in_channels = width
            self.scales.append(convs)

    def forward(self, images: Float[Tensor, "N 3 H W"]) -> list[Tensor]:
        """Activations [N C h w] of every scale, finest first, not normalised.

        Args:
            images: [-1, 1], at least 32 px on each side.

        Raises:
            ValueError: the picture is too small.
        """
        if min(images.shape[2:]) < MIN_RESOLUTION:
            raise ValueError(
                f"perceptual trunk: expected pictures of at least {MIN_RESOLUTION} px, "
                f"found {images.shape[2]}x{images.shape[3]}; resize them first"
            )
        taps, x = [], images
        for index, convs in enumerate(self.scales):
            if index:
                x = F.avg_pool2d(x, 2)
            for conv in convs:  # type: ignore[union-attr]
                x = F.silu(conv(x))
            taps.append(x)
        return taps


def unit_normalise(x: Float[Tensor, "N C H W"]) -> Float[Tensor, "N C H W"]:
    """Scale the channel vector of every place to unit length; smooth where it vanishes."""
    return x * torch.rsqrt(x.square().sum(1, keepdim=True) + 1e-6)


def tap_distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> Float[Tensor, " N"]:
    """Mean over taps of the squared difference of unit-normalised features (LPIPS's baseline form).

    Squares are summed over channels and averaged over places (arXiv 1801.03924, equation 1 with
    w_l = 1), then averaged over taps: 0 for equal pictures, at most 4.

    Args:
        a, b: one normalised activation [N C h w] for every tap.
    """
    parts = [(p - q).square().sum(1).mean((1, 2)) for p, q in zip(a, b, strict=True)]
    return torch.stack(parts).mean(0)


def load_trunk(path: str | Path) -> tuple[PerceptualTrunk, dict[str, Any]]:
    """Read `trunk.safetensors` and the card `trunk.json` beside it; float32, frozen, on the CPU.

    Raises:
        AssetError: a file is missing, or the weights do not fit the card's architecture.
    """
    path = Path(path)
    card_path = path.with_suffix(".json")
    for file in (path, card_path):
        if not file.is_file():
            raise AssetError(
                f"perceptual trunk: {file} is missing; reinstall the package, or train one with "
                f"tasks.training.assets.trunk.fit and copy trunk.safetensors and trunk.json there"
            )
    try:
        card = json.loads(card_path.read_text())
        trunk = PerceptualTrunk(TrunkArchitecture(**card["architecture"]))
        state = {name: value.float() for name, value in load_file(path).items()}
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise AssetError(f"perceptual trunk: cannot read {path}: {error}") from error
    complaint = (
        f"perceptual trunk: {path} does not fit the architecture of {card_path.name}, the two must "
        "come from the same training"
    )
    check_layout(state, trunk.state_dict(), complaint)
    trunk.load_state_dict(state)
    return trunk.eval().requires_grad_(False), card
