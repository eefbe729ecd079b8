"""Frechet distance between two sets of pictures, in features of the perceptual trunk.

It has the formula of FID in another network, so its values are not FID and are called "Frechet
trunk distance".

Legend: N pictures, D features, n rows of a factor.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from models.checkpoints.bundled import asset_path
from models.losses.trunk import load_trunk
from models.stylegan2.generator import weights_hash


@dataclass(frozen=True, kw_only=True)
class FeatureMoments:
    """Mean and scatter of a set of features, float64; all that the distance needs of it.

    Attributes:
        count: pictures.
        mean: their mean.
        scatter: sum of outer products of the deviations from the mean.
    """

    count: int
    mean: Float[Tensor, " D"]
    scatter: Float[Tensor, "D D"]

    @staticmethod
    def of(features: Float[Tensor, "N D"]) -> "FeatureMoments":
        x = features.double()
        mean = x.mean(0)
        deviation = x - mean
        return FeatureMoments(count=len(x), mean=mean, scatter=deviation.T @ deviation)

    def merged(self, other: "FeatureMoments") -> "FeatureMoments":
        """The moments of both sets together (Chan's update: no cancellation)."""
        count = self.count + other.count
        step = other.mean - self.mean
        scatter = self.scatter + other.scatter
        return FeatureMoments(
            count=count,
            mean=self.mean + step * (other.count / count),
            scatter=scatter + torch.outer(step, step) * (self.count * other.count / count),
        )


class FrechetFeatures(nn.Module):
    """Activations of the bundled trunk averaged over places, its two coarsest scales joined (96 +
    128): the features of the "Frechet trunk distance"."""

    name = "frechet_trunk_distance"

    def __init__(self) -> None:
        super().__init__()
        self.trunk = load_trunk(asset_path("trunk", "trunk.safetensors"))[0]
        self.hash = weights_hash(self.trunk)

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N D"]:
        """Features of pictures in [-1, 1], 32 px or more on each side."""
        return torch.cat([tap.mean((2, 3)) for tap in self.trunk(images)[-2:]], 1)

    def moments(self, batches: Iterable[Tensor]) -> FeatureMoments:
        """Moments of a stream of batches [N 3 H W]; memory does not grow with their number.

        Raises:
            ValueError: no picture at all.
        """
        total: FeatureMoments | None = None
        for images in batches:
            part = FeatureMoments.of(self(images))
            total = part if total is None else total.merged(part)
        if total is None:
            raise ValueError("Frechet distance: expected at least two pictures, found none")
        return total


def frechet_distance(
    a: Float[Tensor, "N D"] | FeatureMoments,
    b: Float[Tensor, "M K"] | FeatureMoments,
    is_unbiased: bool = True,
) -> float:
    """Squared Frechet distance of two Gaussians: |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)).

    tr (S_a S_b)^(1/2) is the sum of the singular values of F_a F_b^T for any factors S = F^T F, so
    no square root of a product is formed and singular covariances (fewer pictures than features)
    are as good as others. For features the factors come from a QR decomposition of the data, for
    moments from the eigenvalues of the scatter.

    Args:
        a, b: features of one length (D = K), or moments of a stream.
        is_unbiased: covariances divided by N - 1 (TTUR, rosinality); False divides by N (NVIDIA).

    Raises:
        ValueError: fewer than two pictures on a side, or features of different length.
    """
    sides = []
    for name, value in (("first", a), ("second", b)):
        count, mean, factor = _factor(value)
        if count < 2:
            raise ValueError(
                f"Frechet distance: expected at least two pictures, found {count} ({name} set)"
            )
        sides.append((mean, factor / (count - int(is_unbiased)) ** 0.5))
    (mean_a, factor_a), (mean_b, factor_b) = sides
    if mean_a.shape != mean_b.shape:
        raise ValueError(
            f"Frechet distance: expected features of one length, found {len(mean_a)} and "
            f"{len(mean_b)}: were they made by different trunks?"
        )
    cross = torch.linalg.svdvals(factor_a @ factor_b.T).sum()
    traces = factor_a.square().sum() + factor_b.square().sum()
    distance = (mean_a - mean_b).square().sum() + traces - 2 * cross
    return max(float(distance), 0.0)


def _factor(
    value: Tensor | FeatureMoments,
) -> tuple[int, Float[Tensor, " D"], Float[Tensor, "n D"]]:
    """Count, mean, and F with F^T F = scatter."""
    if isinstance(value, FeatureMoments):
        eigenvalues, vectors = torch.linalg.eigh(value.scatter)
        factor = eigenvalues.clamp(min=0).sqrt()[:, None] * vectors.T
        return value.count, value.mean, factor
    x = value.double()
    mean = x.mean(0)
    return len(x), mean, torch.linalg.qr(x - mean, mode="r").R
