"""Random views of a picture for networks that judge renders: what they say must not hang on a
picture's sharpness, grain, colours or exact place, in which renders differ from photographs and
which an optimiser that follows their gradient would bend first.

All randomness comes from torch's global generator on the CPU, which a checkpoint keeps.

Legend: N batch, H W image.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Generator, Tensor

from tasks.training.distortions import blur, colour, noise, rescale, shift

BLOCK = 8
"""Side of JPEG's blocks, px."""


def block_rounding(
    images: Float[Tensor, "N 3 H W"], strength: Float[Tensor, " N"], rng: Generator
) -> Float[Tensor, "N 3 H W"]:
    """JPEG's loss without its colour space and tables: the cosine coefficients of 8 px blocks are
    rounded, high frequencies to coarser steps. Edges that fill no block stay as they are."""
    n, c, height, width = images.shape
    h, w = height - height % BLOCK, width - width % BLOCK
    blocks = images[:, :, :h, :w].reshape(n, c, h // BLOCK, BLOCK, w // BLOCK, BLOCK)
    blocks = blocks.transpose(3, 4)  # [N C h/8 w/8 8 8]
    basis, index = _cosines(), torch.arange(BLOCK)
    steps = 0.04 * (1 + index[:, None] + index).float() * strength[:, None, None]
    steps = steps[:, None, None, None].clamp(min=1e-3)
    rounded = ((basis @ blocks @ basis.T) / steps).round() * steps
    found = images.clone()
    restored = (basis.T @ rounded @ basis).transpose(3, 4)
    found[:, :, :h, :w] = restored.reshape(n, c, h, w)
    return found


CHAIN = (
    (shift, 0.9, 1.0),
    (colour, 0.7, 0.4),
    (rescale, 0.15, 0.35),
    (blur, 0.2, 0.35),
    (noise, 0.35, 0.4),
    (block_rounding, 0.15, 1.0),
)
"""In order: what is done, to which share of the pictures, at most how strongly."""
GREY_SHARE = 0.05


def views(pictures: UInt8[Tensor, "N 3 H W"]) -> Float[Tensor, "N 3 H W"]:
    """One random view of each picture, in [-1, 1]: mirrored or not, moved, turned, scaled,
    recoloured, softened, with grain, rounded as by JPEG; each of them to a share of the pictures.
    """
    rng = torch.default_generator
    images = pictures.float().div_(127.5).sub_(1)
    is_flipped = torch.rand(len(images)) < 0.5
    images[is_flipped] = images[is_flipped].flip(3)
    for change, share, most in CHAIN:
        rows = (torch.rand(len(images)) < share).nonzero()[:, 0]
        if len(rows):
            images[rows] = change(images[rows], most * torch.rand(len(rows)), rng)
    is_grey = torch.rand(len(images)) < GREY_SHARE
    images[is_grey] = images[is_grey].mean(1, keepdim=True).expand(-1, 3, -1, -1)
    return images.clamp_(-1, 1)


def disturb(images: Float[Tensor, "N 3 H W"], share: float) -> Float[Tensor, "N 3 H W"]:
    """A share of the pictures moved, turned and scaled (at most half of what `shift` does) and
    recoloured (at most a quarter of what `colour` does), in [-1, 1]; 0 returns the input itself and
    draws no random number."""
    if not share:
        return images
    rows = (torch.rand(len(images)) < share).nonzero()[:, 0].to(images.device)
    strength, rng = torch.rand(2, len(rows)), torch.default_generator
    moved = shift(images[rows].cpu(), 0.5 * strength[0], rng)
    moved = colour(moved, 0.25 * strength[1], rng)
    found = images.clone()
    found[rows] = moved.clamp_(-1, 1).to(found)
    return found


def zoomed(images: Float[Tensor, "N 3 H W"], share: float) -> Float[Tensor, "N 3 H W"]:
    """A share of the pictures replaced by a part of them, half the side to all of it, enlarged."""
    draw = torch.rand(len(images), 3)
    scale = torch.where(torch.rand(len(images)) < share, 0.5 + 0.5 * draw[:, 0], torch.ones(()))
    free = (1 - scale) * (2 * draw[:, 1:] - 1).T
    zero = torch.zeros_like(scale)
    maps = torch.stack([scale, zero, free[0], zero, scale, free[1]], 1).reshape(-1, 2, 3)
    grid = F.affine_grid(maps.to(images), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def _cosines() -> Float[Tensor, "8 8"]:
    """The orthonormal cosine transform (DCT-II): row k is the wave of frequency k."""
    place, frequency = torch.arange(BLOCK) + 0.5, torch.arange(BLOCK)[:, None]
    basis = torch.cos(math.pi / BLOCK * place * frequency) * math.sqrt(2 / BLOCK)
    basis[0] /= math.sqrt(2)
    return basis
