"""Adaptive discriminator augmentation (ADA, arXiv 2006.06676): the `bgc` set.

Blit, geometry and colour, each applied with probability p, compose into one affine map of the plane
and one of the colour cube: the cost is one `grid_sample` and one small matrix product, whatever p
is. It differs from NVIDIA's pipeline in one point: bilinear sampling with reflected edges instead
of a wavelet-filtered supersampling.

Legend: N batch, H W image (square).
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def augment(image: Float[Tensor, "N 3 H W"], p: float) -> Float[Tensor, "N 3 H W"]:
    """Augment every image independently; `p = 0` returns the input itself.

    Randomness comes from torch's global generator. Differentiable once with respect to the image.
    """
    if p <= 0:
        return image
    n = image.shape[0]
    plane, colour = sample_plane_maps(n, p), sample_colour_maps(n, p)
    grid = F.affine_grid(plane[:, :2].to(image), list(image.shape), align_corners=False)
    image = F.grid_sample(image, grid, padding_mode="reflection", align_corners=False)
    colour = colour.to(image)
    flat = colour[:, :3, :3] @ image.flatten(2) + colour[:, :3, 3:]
    return flat.reshape(image.shape)


def adjusted_strength(p: float, overfit_sign: float, target: float, step: float) -> float:
    """One move of ADA's controller.

    Args:
        p: current probability.
        overfit_sign: r_t = E[sign(D(real))], 0 = none, 1 = complete overfitting (ADA, equation 1).
        target: r_t to hold (0.6 in the paper).
        step: size of the move, images seen since the last one / images from p = 0 to p = 1.
    """
    return min(max(p + math.copysign(step, overfit_sign - target), 0.0), 1.0)


def sample_plane_maps(n: int, p: float) -> Float[Tensor, "N 3 3"]:
    """Inverse maps in [-1, 1] coordinates: flips, turns, shifts, scale, rotation, anisotropy."""
    maps = torch.eye(3).repeat(n, 1, 1)

    def apply(step: Tensor, probability: float) -> None:
        nonlocal maps
        keep = torch.rand(n) >= probability
        step[keep] = torch.eye(3)
        maps = step @ maps

    apply(_scale(1.0 - 2.0 * torch.randint(2, (n,)), torch.ones(n)), p)
    apply(_rotate(torch.randint(4, (n,)) * (math.pi / 2)), p)
    apply(_shift((torch.rand(n, 2) * 2 - 1) * 0.25), p)
    zoom = torch.exp2(torch.randn(n) * 0.2)
    apply(_scale(zoom, zoom), p)
    p_rotate = 1 - math.sqrt(1 - p)  # two rotations: P(at least one) = p
    apply(_rotate((torch.rand(n) * 2 - 1) * math.pi), p_rotate)
    stretch = torch.exp2(torch.randn(n) * 0.2)
    apply(_scale(stretch, 1 / stretch), p)
    apply(_rotate((torch.rand(n) * 2 - 1) * math.pi), p_rotate)
    apply(_shift(torch.randn(n, 2) * 0.25), p)
    return maps


def sample_colour_maps(n: int, p: float) -> Float[Tensor, "N 4 4"]:
    """Maps of homogeneous RGB: brightness, contrast, luma flip, hue, saturation."""
    maps = torch.eye(4).repeat(n, 1, 1)
    luma = torch.tensor([1.0, 1.0, 1.0, 0.0]) / math.sqrt(3)
    along = torch.outer(luma, luma)
    rgb = torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0]))
    one = torch.diag(torch.tensor([0.0, 0.0, 0.0, 1.0]))

    def apply(step: Tensor) -> None:
        nonlocal maps
        keep = torch.rand(n) >= p
        step[keep] = torch.eye(4)
        maps = step @ maps

    bright = torch.eye(4).repeat(n, 1, 1)
    bright[:, :3, 3] = (torch.randn(n) * 0.2)[:, None]
    apply(bright)
    apply(rgb * torch.exp2(torch.randn(n) * 0.5)[:, None, None] + one)
    apply(torch.eye(4) - 2 * along * torch.randint(2, (n,))[:, None, None])
    apply(_hue((torch.rand(n) * 2 - 1) * math.pi))
    apply(along + (rgb - along) * torch.exp2(torch.randn(n))[:, None, None] + one)
    return maps


def _scale(x: Tensor, y: Tensor) -> Tensor:
    return torch.diag_embed(torch.stack([x.float(), y.float(), torch.ones_like(y).float()], 1))


def _shift(offset: Tensor) -> Tensor:
    maps = torch.eye(3).repeat(len(offset), 1, 1)
    maps[:, :2, 2] = offset
    return maps


def _rotate(angle: Tensor) -> Tensor:
    cos, sin = torch.cos(angle), torch.sin(angle)
    maps = torch.eye(3).repeat(len(angle), 1, 1)
    maps[:, 0, 0], maps[:, 0, 1], maps[:, 1, 0], maps[:, 1, 1] = cos, -sin, sin, cos
    return maps


def _hue(angle: Tensor) -> Tensor:
    """Rotation about the grey axis (Rodrigues' formula)."""
    k = 1 / math.sqrt(3)
    cross = torch.tensor([[0.0, -k, k], [k, 0.0, -k], [-k, k, 0.0]])
    cos, sin = torch.cos(angle)[:, None, None], torch.sin(angle)[:, None, None]
    rotation = cos * torch.eye(3) + sin * cross + (1 - cos) * torch.full((3, 3), 1 / 3)
    maps = torch.eye(4).repeat(len(angle), 1, 1)
    maps[:, :3, :3] = rotation
    return maps
