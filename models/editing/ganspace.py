"""GANSpace: principal components of W as directions (arXiv 2004.02546).

What a component means is found by looking: each moves a range of rows of w+, and a name is given to
what is seen.

Legend: K principal components, D w_dim.
"""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from models.editing.direction import Direction
from models.errors import ConfigError
from models.statistics import Statistics


def spread_along(statistics: Statistics, vector: Float[Tensor, " D"]) -> float:
    """Standard deviation of mapped codes along a vector, from the principal components of W.

    Raises:
        ValueError: the vector has another size than W.
    """
    if vector.shape != statistics.w_mean.shape:
        raise ValueError(
            f"expected a vector of {len(statistics.w_mean)} numbers, found {list(vector.shape)}"
        )
    unit = vector.double() / vector.double().norm()
    along = statistics.w_component.double() @ unit
    return float((along * statistics.w_component_std.double()).norm())


def ganspace_direction(
    statistics: Statistics,
    component: int,
    *,
    name: str | None = None,
    layers: Sequence[int] | None = None,
    is_set: bool = False,
) -> Direction:
    """One principal component of W; a strength of 1 is a standard deviation of W along it.

    Args:
        component: 0 is the one of largest variance.
        name: of what it was seen to change; by default "component-<number>".
        layers: rows of w+ that move, None for all.
        is_set: the semantics of the published edits: a strength is what row 0 becomes, not what is
            added. delta = (strength - <w_0 - mean, v> / sigma) sigma v on the rows of the range.

    Raises:
        ConfigError: there is no such component or row.
    """
    count = len(statistics.w_component)
    if not 0 <= component < count:
        raise ConfigError(f"ganspace: expected a component in 0..{count - 1}, got {component}")
    vector, mean = statistics.w_component[component].clone(), statistics.w_mean
    variance = statistics.w_component_std.double().square()
    return Direction(
        name=name or f"component-{component}",
        vector=vector,
        unit=float(statistics.w_component_std[component]),
        generator_hash=statistics.generator_hash,
        layers=None if layers is None else tuple(layers),
        origin=float(mean.double() @ vector.double()) if is_set else None,
        card={
            "what": f"principal component {component} of W (GANSpace, arXiv 2004.02546)",
            "share_of_variance": round(float(variance[component] / variance.sum()), 6),
            "fitted_on": f"{statistics.samples} samples of W, seed {statistics.seed}",
        },
    )
