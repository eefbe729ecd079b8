"""The part of an aligned picture that a face recognition network sees.

Legend: N batch, H W image, S side of the face, P pixels of a row.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class FaceChip:
    """A square of the picture, resampled; differentiable.

    Attributes:
        left, top, side: in parts of the picture's side; it may reach outside.
        pixels: S.
    """

    left: float
    top: float
    side: float
    pixels: int

    def __call__(self, images: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N 3 S S"]:
        """Triangle filter, as wide as a pixel of the smaller density; outside of the picture is its
        nearest pixel. Float32, also under autocast."""
        with torch.autocast(images.device.type, enabled=False):
            down = _resampling(images.shape[2], self.top, self.side, self.pixels, images.device)
            across = _resampling(images.shape[3], self.left, self.side, self.pixels, images.device)
            return down @ images.float() @ across.T


@lru_cache(maxsize=32)
@torch.inference_mode(False)
def _resampling(
    size: int, start: float, side: float, pixels: int, device: torch.device
) -> Float[Tensor, "S P"]:
    """What each sample takes of a row of `size` pixels."""
    scale = max(1.0, side * size / pixels)
    samples = (torch.arange(pixels, dtype=torch.float64) + 0.5) / pixels
    centres = (start + samples * side) * size - 0.5
    margin = int(size * (abs(start) + side) + 2 * scale)
    places = torch.arange(-margin, size + margin)
    weights = (1 - (places - centres[:, None]).abs() / scale).clamp(min=0)
    weights = weights / weights.sum(1, keepdim=True)
    inside = places.clamp(0, size - 1).expand_as(weights)
    rows = torch.zeros(pixels, size, dtype=torch.float64).scatter_add_(1, inside, weights)
    return rows.float().to(device)
