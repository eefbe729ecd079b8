"""Reconstruction-like distortions: what an inversion gets wrong, with random strength per picture.

Pairs (picture, distorted picture) train and test a perceptual distance. All randomness comes from
the `torch.Generator` that is handed in.

Legend: N batch, H W image, r rank of the picture basis.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Generator, Tensor

Distortion = Callable[[Tensor, Tensor, Generator], Tensor]
"""(pictures [N 3 H W], strength [N] in 0..1, rng) -> pictures [N 3 H W]"""


class Distorter:
    """Applies one of the named distortions, and half of the time a second one, to every picture.

    Args:
        pictures: a sample in [-1, 1]; its principal components, 96 at most, make the `low_rank`
            pictures.
    """

    def __init__(self, pictures: Float[Tensor, "M 3 H W"]) -> None:
        flat = pictures.flatten(1)
        self.mean = flat.mean(0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            rank = min(96, *flat.shape)
            self.basis = torch.svd_lowrank(flat - self.mean, q=rank, niter=2)[2]  # [3HW r]
        self.size = pictures.shape[2]
        self.kinds: dict[str, Distortion] = {
            "blur": blur,
            "noise": noise,
            "smooth_noise": smooth_noise,
            "shift": shift,
            "colour": colour,
            "warp": warp,
            "blend": blend,
            "rescale": rescale,
            "low_rank": self.low_rank,
        }

    def __call__(self, images: Float[Tensor, "N 3 H W"], rng: Generator) -> Tensor:
        """Distorted pictures in [-1, 1]; every kind equally often, strengths uniform."""
        n = len(images)
        first = torch.randint(len(self.kinds), (n,), generator=rng)
        images = self._apply(images, first, rng)
        second = torch.randint(len(self.kinds), (n,), generator=rng)
        second[torch.rand(n, generator=rng) < 0.5] = -1
        return self._apply(images, second, rng).clamp(-1, 1)

    def apply(self, kind: str, images: Float[Tensor, "N 3 H W"], rng: Generator) -> Tensor:
        """One kind for the whole batch."""
        index = torch.full((len(images),), list(self.kinds).index(kind))
        return self._apply(images, index, rng).clamp(-1, 1)

    def _apply(self, images: Tensor, kind: Int[Tensor, " N"], rng: Generator) -> Tensor:
        images = images.clone()
        strength = torch.rand(len(images), generator=rng)
        for index, distortion in enumerate(self.kinds.values()):
            rows = (kind == index).nonzero()[:, 0]
            if len(rows):
                images[rows] = distortion(images[rows], strength[rows], rng)
        return images

    def low_rank(self, images: Tensor, strength: Tensor, rng: Generator) -> Tensor:
        """Reconstruct from the leading principal components: the blurred face of a weak encoder."""
        small = F.interpolate(images, size=(self.size, self.size), mode="area")
        codes = (small.flatten(1) - self.mean) @ self.basis
        rank = self.basis.shape[1]
        keep = torch.arange(rank) < (rank * (1.05 - strength).clamp(max=1))[:, None]
        found = ((codes * keep) @ self.basis.T + self.mean).reshape(small.shape)
        return F.interpolate(found, size=images.shape[2:], mode="bilinear", align_corners=False)


def blur(images: Tensor, strength: Tensor, rng: Generator) -> Tensor:
    """Gaussian blur, standard deviation up to 1/22 of the side."""
    n, c, h, w = images.shape
    sigma = 0.3 + strength * (h / 22)
    radius = max(2, h // 11)
    taps = torch.arange(-radius, radius + 1.0)
    kernel = torch.exp(-0.5 * (taps / sigma[:, None]).square())
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(c, 0)[:, None]
    x = F.pad(images, [radius] * 4, mode="reflect").reshape(1, n * c, h + 2 * radius, -1)
    x = F.conv2d(x, kernel[:, :, None, :], groups=n * c)
    return F.conv2d(x, kernel[:, :, :, None], groups=n * c).reshape(n, c, h, w)


def noise(images: Tensor, strength: Tensor, rng: Generator) -> Tensor:
    """White noise, standard deviation up to 0.4."""
    return images + torch.randn(images.shape, generator=rng) * _column(0.4 * strength)


def smooth_noise(images: Tensor, strength: Tensor, rng: Generator) -> Tensor:
    """Coloured blobs: uneven light, or a feature that is not there."""
    return images + _field(images, 3, rng) * _column(0.5 * strength)


def shift(images: Tensor, strength: Tensor, rng: Generator) -> Tensor:
    """Move, turn and scale a little (up to 8 % of the side, 8 degrees, 10 %)."""
    n = len(images)
    draw = torch.rand(n, 4, generator=rng) * 2 - 1
    angle = draw[:, 0] * strength * math.radians(8)
    scale = torch.exp2(draw[:, 1] * strength * 0.14)
    maps = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).reshape(n, 2, 2)
    maps = torch.cat(
        [maps * scale[:, None, None], draw[:, 2:, None] * _column(strength)[..., 0] * 0.16], 2
    )
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def colour(images: Tensor, strength: Tensor, rng: Generator) -> Tensor:
    """Contrast, brightness, tint and saturation."""
    n = len(images)
    draw = (torch.rand(n, 5, 1, 1, generator=rng) * 2 - 1) * _column(strength)
    grey = images.mean(1, keepdim=True)
    images = grey + (images - grey) * torch.exp2(draw[:, :1] * 2)
    return images * torch.exp2(draw[:, 1:2] * 0.6) + draw[:, 2:5] * 0.3


def warp(images: Tensor, strength: Tensor, rng: Generator) -> Tensor:
    """A smooth random displacement: the wrong expression or face shape."""
    identity = torch.eye(2, 3).expand(len(images), 2, 3)
    grid = F.affine_grid(identity, list(images.shape), align_corners=False)
    offset = _field(images, 2, rng).permute(0, 2, 3, 1) * _column(strength * 0.12)
    return F.grid_sample(images, grid + offset, padding_mode="reflection", align_corners=False)


def blend(images: Tensor, strength: Tensor, rng: Generator) -> Tensor:
    """Mix with another picture of the batch, up to replacing it."""
    other = images[torch.randperm(len(images), generator=rng)]
    return images.lerp(other, _column(strength))


def rescale(images: Tensor, strength: Tensor, rng: Generator) -> Tensor:
    """Shrink to 1/1.3 .. 1/6 of the side and enlarge again."""
    resolution = images.shape[2]
    sides = (resolution / (1.3 + 4.7 * strength)).round().clamp(min=6).int()
    found = torch.empty_like(images)
    for side in sides.unique().tolist():
        rows = (sides == side).nonzero()[:, 0]
        small = F.interpolate(images[rows], size=(side, side), mode="area")
        found[rows] = F.interpolate(small, size=(resolution, resolution), mode="bilinear")
    return found


def _column(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _field(images: Tensor, channels: int, rng: Generator) -> Tensor:
    """Smooth noise: a random grid of 3 to 10 nodes, standard deviation 1, enlarged."""
    nodes = int(torch.randint(3, 11, (), generator=rng))
    coarse = torch.randn(len(images), channels, nodes, nodes, generator=rng)
    return F.interpolate(coarse, size=images.shape[2:], mode="bicubic", align_corners=False)
