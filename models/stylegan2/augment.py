"""Adaptive discriminator augmentation (ADA, arXiv 2006.06676): the `bgc` set.

Blit, geometry and colour, each applied with probability p, compose into one affine map of the plane
and one of the colour cube: the cost is one `grid_sample` and one small matrix product, whatever p
is. It differs from NVIDIA's pipeline in one point: bilinear sampling with reflected edges instead
of a wavelet-filtered supersampling.

Legend: N batch, H W image (square).
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def augment(image: Float[Tensor, "N 3 H W"], p: float | Tensor) -> Float[Tensor, "N 3 H W"]:
    """Augment every image independently.

    Randomness comes from the generator of the image's device. Differentiable once with respect to
    the image.

    Args:
        p: probability of each step. The number 0 returns the input itself; a tensor [] is never
            looked at on the host, so that a CUDA graph can hold the call.
    """
    if not isinstance(p, Tensor) and p <= 0:
        return image
    n, device = image.shape[0], image.device
    plane, colour = sample_plane_maps(n, p, device), sample_colour_maps(n, p, device)
    grid = F.affine_grid(plane[:, :2].to(image), list(image.shape), align_corners=False)
    image = F.grid_sample(image, grid, padding_mode="reflection", align_corners=False)
    colour = colour.to(image)
    flat = colour[:, :3, :3] @ image.flatten(2) + colour[:, :3, 3:]
    return flat.reshape(image.shape)


def adjusted_strength(p: Tensor, overfit_sign: Tensor, target: float, step: float) -> Tensor:
    """One move of ADA's controller, on the device.

    Args:
        p: current probability, [].
        overfit_sign: r_t = E[sign(D(real))], 0 = none, 1 = complete overfitting (ADA, equation 1).
        target: r_t to hold (0.6 in the paper).
        step: size of the move, images seen since the last one / images from p = 0 to p = 1.
    """
    return (p + step * torch.sign(overfit_sign - target)).clamp(0.0, 1.0)


def sample_plane_maps(
    n: int, p: float | Tensor, device: torch.device | str = "cpu"
) -> Float[Tensor, "N 3 3"]:
    """Inverse maps in [-1, 1] coordinates: flips, turns, shifts, scale, rotation, anisotropy."""
    rand, randn = _draws(n, device)
    unit = torch.eye(3, device=device)
    maps = unit.repeat(n, 1, 1)

    def apply(step: Tensor, probability: float | Tensor) -> None:
        nonlocal maps
        is_applied = rand() < probability
        maps = torch.where(is_applied[:, None, None], step, unit) @ maps

    apply(_scale(1.0 - 2.0 * (rand() * 2).floor(), torch.ones(n, device=device)), p)
    apply(_rotate((rand() * 4).floor() * (math.pi / 2)), p)
    apply(_shift(rand(2) / 2 - 0.25), p)
    zoom = torch.exp2(randn() * 0.2)
    apply(_scale(zoom, zoom), p)
    p_rotate = 1 - (1 - p) ** 0.5  # two rotations: P(at least one) = p
    apply(_rotate((rand() * 2 - 1) * math.pi), p_rotate)
    stretch = torch.exp2(randn() * 0.2)
    apply(_scale(stretch, 1 / stretch), p)
    apply(_rotate((rand() * 2 - 1) * math.pi), p_rotate)
    apply(_shift(randn(2) * 0.25), p)
    return maps


def sample_colour_maps(
    n: int, p: float | Tensor, device: torch.device | str = "cpu"
) -> Float[Tensor, "N 4 4"]:
    """Maps of homogeneous RGB: brightness, contrast, luma flip, hue, saturation."""
    rand, randn = _draws(n, device)
    unit = torch.eye(4, device=device)
    one = F.pad(unit[3:, 3:], (3, 0, 3, 0))  # the homogeneous coordinate stays
    rgb = unit - one
    along = F.pad(torch.full((3, 3), 1 / 3, device=device), (0, 1, 0, 1))  # the axis of the greys
    maps = unit.repeat(n, 1, 1)

    def apply(step: Tensor) -> None:
        nonlocal maps
        maps = torch.where((rand() < p)[:, None, None], step, unit) @ maps

    bright = (randn() * 0.2)[:, None, None] * (rgb.sum(1, keepdim=True) * unit[3])
    apply(unit + bright)
    apply(rgb * torch.exp2(randn() * 0.5)[:, None, None] + one)
    apply(unit - 2 * along * (rand() * 2).floor()[:, None, None])
    apply(_hue((rand() * 2 - 1) * math.pi))
    apply(along + (rgb - along) * torch.exp2(randn())[:, None, None] + one)
    return maps


def _draws(n: int, device: torch.device | str) -> tuple[Callable[..., Tensor], ...]:
    """rand and randn of [N *shape]."""
    return (
        lambda *shape: torch.rand(n, *shape, device=device),
        lambda *shape: torch.randn(n, *shape, device=device),
    )


def _scale(x: Tensor, y: Tensor) -> Tensor:
    return torch.diag_embed(torch.stack([x, y, torch.ones_like(y)], 1))


def _shift(offset: Tensor) -> Tensor:
    """[N 2] -> [N 3 3]."""
    return torch.eye(3, device=offset.device) + F.pad(offset[:, :, None], (2, 0, 0, 1))


def _rotate(angle: Tensor) -> Tensor:
    cos, sin, zero = torch.cos(angle), torch.sin(angle), torch.zeros_like(angle)
    rows = [cos, -sin, zero, sin, cos, zero, zero, zero, torch.ones_like(angle)]
    return torch.stack(rows, 1).reshape(-1, 3, 3)


def _hue(angle: Tensor) -> Tensor:
    """Rotation about the grey axis (Rodrigues' formula)."""
    a, b = torch.cos(angle), torch.sin(angle) / math.sqrt(3)
    c = (1 - a) / 3
    x, y, z = a + c, c - b, c + b
    zero, one = torch.zeros_like(angle), torch.ones_like(angle)
    rows = [x, y, z, zero, z, x, y, zero, y, z, x, zero, zero, zero, zero, one]
    return torch.stack(rows, 1).reshape(-1, 4, 4)
