"""What CLIP sees of a picture: small random shifts, scales and turns, the same before and after.

A network of a hundred pixels is easily fooled by pictures that are exactly aligned with its grid;
what still holds after a small move is in the picture (as VQGAN-CLIP's cut-outs, arXiv 2204.08583).

Legend: B pictures, H W image.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def random_maps(count: int, size: float, rng: torch.Generator) -> Float[Tensor, "B 2 3"]:
    """Affine maps for `moved`: shifts up to `size` of the picture, scales up to 1 + size, turns up
    to `size` of a right angle, half of them mirrored. Size 0 is the identity."""
    draw = torch.rand(count, 4, generator=rng) * 2 - 1
    if size == 0:
        return torch.eye(2, 3).repeat(count, 1, 1)
    scale, turn = (1 + size) ** draw[:, 0], size * math.pi / 2 * draw[:, 1]
    mirror = torch.where(torch.rand(count, generator=rng) < 0.5, -1.0, 1.0)
    cos, sin = scale * turn.cos(), scale * turn.sin()
    rows = [cos * mirror, -sin, 2 * size * draw[:, 2], sin * mirror, cos, 2 * size * draw[:, 3]]
    return torch.stack(rows, 1).reshape(count, 2, 3)


def crop_maps(
    count: int, rng: torch.Generator, low: float = 0.4, high: float = 0.8
) -> Float[Tensor, "B 2 3"]:
    """Affine maps for `moved`: parts of `low` to `high` of the side, inside the picture, half of
    them mirrored. A part enlarged shows a network lines that the whole hides."""
    draw = torch.rand(count, 4, generator=rng)
    scale = low + (high - low) * draw[:, 0]
    mirror = torch.where(draw[:, 3] < 0.5, -scale, scale)
    place = (1 - scale)[:, None] * (2 * draw[:, 1:3] - 1)
    zero = torch.zeros_like(scale)
    rows = [mirror, zero, place[:, 0], zero, scale, place[:, 1]]
    return torch.stack(rows, 1).reshape(count, 2, 3)


def moved(
    images: Float[Tensor, "B 3 H W"], maps: Float[Tensor, "B 2 3"]
) -> Float[Tensor, "B 3 H W"]:
    """Pictures under affine maps of [-1, 1]: bilinear, edges reflected; differentiable."""
    grid = F.affine_grid(maps.to(images), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
