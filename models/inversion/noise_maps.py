"""Noise maps as optimisation variables: where they start, and what keeps them noise.

Legend: N batch, A active rows of it, h w size of a map.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from models.inversion.base import Inversion, SampleRng
from models.stylegan2.generator import Generator


def noise_penalty(maps: list[Tensor], num_rows: int) -> Float[Tensor, " A"]:
    """How far noise maps [A 1 h w] are from white: squared autocorrelation at one pixel's shift.

    Summed over maps and over their pyramids of 2x2 means down to 8 px (stylegan2-ada's projector),
    for each picture by itself.
    """
    total = torch.zeros(num_rows, device=maps[0].device) if maps else torch.zeros(())
    for noise in maps:
        level = noise
        while True:
            for axis in (2, 3):
                shifted = torch.roll(level, 1, axis)
                total = total + (level * shifted).flatten(1).mean(1).square()
            if level.shape[2] <= 8:
                break
            level = F.avg_pool2d(level, 2)
    return total


def normalise(noise: Float[Tensor, "A 1 h w"]) -> None:
    """Zero mean and unit variance of every map, in place."""
    noise -= noise.mean(dim=(1, 2, 3), keepdim=True)
    noise *= noise.square().mean(dim=(1, 2, 3), keepdim=True).rsqrt()


def starting_maps(
    generator: Generator,
    start: Inversion,
    is_from_average: bool,
    rng: SampleRng,
    device: torch.device,
) -> list[Float[Tensor, "N 1 h w"]]:
    """Maps to optimise from: those of the start, else white noise (a search from the mean code) or
    the stored ones (the refinement of codes that were found with them)."""
    if start.noise is not None:
        return [m.float() for m in start.noise]
    stored = [getattr(generator.noises, f"noise_{i}") for i in range(generator.num_convs)]
    if is_from_average:
        return [rng.randn(*m.shape[1:], device=device) for m in stored]
    return [m.to(device).float().expand(len(start), -1, -1, -1) for m in stored]
