"""SeFa: directions in closed form from the generator's own weights (arXiv 2007.06600).

A direction of W that the affines of some layers amplify most changes the picture most: the
eigenvectors of A^T A, largest eigenvalue first, where the rows of A are the layers' modulation
weights, each style channel's row scaled to norm 1 as the published code does (that code leaves the
eigenvectors in the order of its solver).

Legend: D w_dim, S style channels of the chosen layers.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float64
from torch import Tensor

from models.editing.direction import Direction
from models.editing.ganspace import spread_along
from models.errors import ConfigError
from models.statistics import Statistics
from models.stylegan2.generator import Generator, weights_hash


def sefa_factors(
    generator: Generator, layers: Sequence[int]
) -> tuple[Float64[Tensor, "D D"], Float64[Tensor, " D"]]:
    """Eigenvectors as rows and their eigenvalues, largest first. Each row's entry of largest
    magnitude is positive, so that the sign does not depend on the solver.

    Args:
        layers: rows of w+. Row i < L - 1 stands for the 3x3 layer that reads it, the last row for
            the last ToRGB.

    Raises:
        ConfigError: no layer, a row that the generator has not, or one named twice.
    """
    known = range(generator.num_ws)
    if not layers or len(set(layers)) < len(layers) or not set(layers) <= set(known):
        raise ConfigError(
            f"sefa: expected different layers in 0..{generator.num_ws - 1}, got {list(layers)}"
        )
    last = generator.layers()[-1][1]
    affines = [
        (generator.conv(row).conv if row < generator.num_convs else last).modulation
        for row in layers
    ]
    weights = torch.cat([a.weight.detach().cpu().double() for a in affines])  # [S D]
    weights = weights / weights.norm(dim=1, keepdim=True).clamp(min=1e-12)
    eigenvalues, vectors = torch.linalg.eigh(weights.T @ weights)
    rows = vectors.T.flip(0)
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    return rows * largest.sign(), eigenvalues.flip(0)


def sefa_directions(
    generator: Generator,
    statistics: Statistics,
    layers: Sequence[int],
    count: int = 5,
    prefix: str = "sefa",
) -> list[Direction]:
    """The `count` directions that the layers amplify most; they move these layers' rows.

    A strength of 1 is a standard deviation of W along the vector. The published code steps by the
    length of the vector itself: its distance t is our t / unit.

    Raises:
        ConfigError: as `sefa_factors`, or more directions than W has.
    """
    if not 1 <= count <= generator.w_dim:
        raise ConfigError(f"sefa: expected a count in 1..{generator.w_dim}, got {count}")
    vectors, eigenvalues = sefa_factors(generator, layers)
    digest = weights_hash(generator)
    return [
        Direction(
            name=f"{prefix}-{index}",
            vector=vectors[index].float(),
            unit=spread_along(statistics, vectors[index].float()),
            generator_hash=digest,
            layers=tuple(sorted(layers)),
            card={
                "what": f"eigenvector {index} of the modulation weights of layers "
                f"{sorted(layers)} (SeFa, arXiv 2007.06600)",
                "eigenvalue": round(float(eigenvalues[index]), 6),
            },
        )
        for index in range(count)
    ]
