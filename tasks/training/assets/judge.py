"""How good a generator's samples are in the eyes of a network that no loss saw.

SqueezeNet v1.1 with ImageNet weights, read from a file. Its numbers are comparable among themselves
only: they are neither FID nor the precision and recall of other papers' networks.

Legend: N M pictures, D features, H W image.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from models.losses.frechet import frechet_distance
from tasks.training.squeezenet import SqueezeNet

MODULE = 7
"""Of SqueezeNet's `features`: the fourth fire module, 256 channels at an eighth of the input."""
SIZE = 128
"""Pictures are shown at this size, px."""
NEIGHBOURS = 3
"""k of precision and recall, as published."""


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Attributes:
    frechet: squared Frechet distance of the features; lower is better.
    precision: share of samples within the reach of a real picture.
    recall: share of real pictures within the reach of a sample.
    """

    frechet: float
    precision: float
    recall: float


class Judge:
    """Scores samples against real pictures.

    Args:
        path: safetensors file of SqueezeNet v1.1 in torchvision's names (Caffe input scaling).

    Raises:
        AssetError: the file is missing or holds another network.
    """

    def __init__(self, path: str | Path) -> None:
        self.network = SqueezeNet(path)

    @torch.no_grad()
    def features(self, images: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N D"]:
        """Activations of pictures in [-1, 1] after `MODULE`, averaged over places."""
        found = []
        for part in images.split(64):
            x = F.interpolate(part.clamp(-1, 1), size=SIZE, mode="bilinear")
            x = (x.flip(1) + 1) * 127.5 - self.network.mean
            found.append(self.network.layers[: MODULE + 1](x).mean((2, 3)))
        return torch.cat(found)

    def verdict(self, samples: Float[Tensor, "N D"], real: Float[Tensor, "M D"]) -> Quality:
        """Compare two sets of `features`."""
        return Quality(
            frechet=frechet_distance(samples, real),
            precision=covered(samples, real),
            recall=covered(real, samples),
        )


def covered(points: Float[Tensor, "N D"], others: Float[Tensor, "M D"]) -> float:
    """Share of points that lie within some other's distance to its k-th neighbour of its own kind.

    Source: Kynkaanniemi et al. 2019 (arXiv 1904.06991), equation 2; precision for points =
    samples, recall for points = real pictures.

    Raises:
        ValueError: fewer than k + 1 others.
    """
    if len(others) <= NEIGHBOURS:
        raise ValueError(f"expected more than {NEIGHBOURS} pictures, found {len(others)}")
    reach = torch.cdist(others, others).kthvalue(NEIGHBOURS + 1, dim=1).values  # itself is first
    return float((torch.cdist(points, others) <= reach).any(1).float().mean())
