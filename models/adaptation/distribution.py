"""The distribution of a perceptual trunk's activations, compared with that of a set of pictures.

It needs no CLIP, and ten pictures are enough: every place of every picture is a sample. Activations
are projected on random lines, and on a line two distributions differ by their sorted values: the
sliced Wasserstein distance, as Heitz et al. (arXiv 2006.07229) compare textures in VGG. Style is
what is left of a picture when places are shuffled, so nothing in it asks for another face.

Legend: D domains, B pictures of each, C channels, M references, S places, K lines or components,
k side of a patch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ReferenceTaps:
    """What is kept of one set of references: samples of their activations, scale by scale.

    Attributes:
        places: [C S] by scale, from all pictures.
        spread: by scale, the mean standard deviation of a channel: the unit of its distances.
    """

    places: tuple[Float[Tensor, "C S"], ...]
    spread: tuple[float, ...]

    @staticmethod
    def of(taps: Sequence[Float[Tensor, "M C h w"]], limit: int = 4_096) -> "ReferenceTaps":
        """Every place of every picture, evenly thinned to `limit` a scale."""
        places, spread = [], []
        for tap in taps:
            flat = tap.detach().permute(1, 0, 2, 3).flatten(1)
            step = -(-flat.shape[1] // limit)
            places.append(flat[:, ::step].contiguous())
            spread.append(float(flat.var(1).mean().sqrt().clamp(min=1e-6)))
        return ReferenceTaps(places=tuple(places), spread=tuple(spread))

    def sample(self, scale: int, rng: torch.Generator, most: int = 1_024) -> Float[Tensor, "C S"]:
        """Some of the places of a scale, drawn anew each time: sorting all of them costs more than
        the networks do."""
        found = self.places[scale]
        if found.shape[1] <= most:
            return found
        chosen = torch.randint(found.shape[1], (most,), generator=rng)
        return found[:, chosen.to(found.device)]


PLACE = 0.3
"""Reach of the place among activations of norm 1, see `placed`."""


def placed(taps: Sequence[Float[Tensor, "B C h w"]]) -> list[Float[Tensor, "B D h w"]]:
    """Activations with their place, (y, x) in [-PLACE, PLACE], as further channels: on aligned
    faces noses are then compared with noses, a highlight belongs where the references have it."""
    found = []
    for tap in taps:
        n, _, h, w = tap.shape
        y = torch.linspace(-PLACE, PLACE, h, device=tap.device)[:, None].expand(h, w)
        x = torch.linspace(-PLACE, PLACE, w, device=tap.device)[None].expand(h, w)
        found.append(torch.cat([tap, torch.stack([y, x]).expand(n, 2, h, w)], 1))
    return found


@torch.no_grad()
def recoloured(
    images: Float[Tensor, "M 3 H W"], like: Float[Tensor, "K 3 H W"]
) -> Float[Tensor, "M 3 H W"]:
    """Pictures under the affine map of colours that gives all their pixels together the mean and
    covariance of those of `like`: their strokes and lines in its colours (the colour matching of
    Gatys et al., arXiv 1611.07865)."""
    sides = []
    for given in (images, like):
        flat = given.transpose(0, 1).flatten(1).double()
        values, vectors = torch.linalg.eigh(torch.cov(flat) + 1e-6 * torch.eye(3).to(flat))
        sides.append((flat.mean(1), vectors, values.sqrt()))
    (mean, vectors, std), (own_mean, own_vectors, own_std) = sides
    whitened = (vectors / std) @ vectors.T
    matrix = ((own_vectors * own_std) @ own_vectors.T @ whitened).to(images)
    moved = torch.einsum("ij,njhw->nihw", matrix, images - mean.to(images)[:, None, None])
    return (moved + own_mean.to(images)[:, None, None]).clamp(-1, 1)


PATCH, WAVES = 5, 24
"""Side of a patch, px; principal components of patches that are compared."""


@dataclass(frozen=True, kw_only=True)
class PatchBasis:
    """What patches of 5x5 px of a set of pictures are made of: lines and strokes as they are, with
    no network in between (sliced distances of patches compare textures: Elnekave and Weiss,
    arXiv 2203.14672).

    Attributes:
        kernels: by scale (full size, half), the principal components of patches without their mean
            colour, each divided by the root of its standard deviation: as they come, slow shades
            outweigh every line.
    """

    kernels: tuple[Float[Tensor, "K 3 k k"], ...]

    @staticmethod
    @torch.no_grad()
    def of(images: Float[Tensor, "M 3 H W"]) -> "PatchBasis":
        kernels = []
        for scaled in _halved(images):
            flat = F.unfold(scaled, PATCH).transpose(0, 1).flatten(1).double()  # [3 k k, places]
            flat = flat - flat.unflatten(0, (3, -1)).mean(1).repeat_interleave(PATCH**2, 0)
            values, vectors = torch.linalg.eigh(flat @ flat.T / flat.shape[1])
            values, vectors = values[-WAVES:].clamp(min=1e-8), vectors[:, -WAVES:]
            kernel = (vectors * values**-0.25).T.unflatten(1, (3, PATCH, PATCH)).float()
            kernels.append(kernel - kernel.mean((2, 3), keepdim=True))
        return PatchBasis(kernels=tuple(kernels))

    def taps(self, images: Float[Tensor, "B 3 H W"]) -> list[Float[Tensor, "B K h w"]]:
        """The components of every patch of a picture, by scale; differentiable."""
        return [
            F.conv2d(scaled, kernel)
            for scaled, kernel in zip(_halved(images), self.kernels, strict=True)
        ]


def _halved(images: Float[Tensor, "B 3 H W"]) -> list[Float[Tensor, "B 3 _ _"]]:
    return [images, F.avg_pool2d(images, 2)]


def sliced_distance(
    taps: Sequence[Float[Tensor, "_ C h w"]],
    references: Sequence[ReferenceTaps],
    rng: torch.Generator,
    *,
    lines: int = 32,
    places: int = 256,
    weights: Sequence[float] | None = None,
) -> Float[Tensor, "D B"]:
    """Mean over scales and lines of the squared difference of sorted projections, by picture.

    The values of a domain's B pictures are sorted together; a picture's loss is the mean over its
    own values, so the mean over pictures is the distance of the sets. Lines and places are drawn
    anew at each step and are the same for all domains.

    Args:
        taps: activations of D B pictures, a domain's pictures next to each other.
        references: one for each domain.
        rng: where lines and places come from.
        lines: K, projections of each scale.
        places: S, of each picture at most.
        weights: of the scales; None for equal ones.
    """
    d = len(references)
    shares = weights if weights is not None else [1.0] * len(taps)
    total = taps[0].new_zeros(d, len(taps[0]) // d)
    for scale, (tap, share) in enumerate(zip(taps, shares, strict=True)):
        c, size = tap.shape[1], tap.shape[2] * tap.shape[3]
        line = F.normalize(torch.randn(lines, c, generator=rng), dim=1).to(tap)
        chosen = torch.randperm(size, generator=rng)[:places].to(tap.device)
        values = line @ tap.flatten(2)[:, :, chosen]  # [D B, K, S]
        if not share:
            continue
        s = values.shape[2]
        values = values.unflatten(0, (d, -1)).permute(0, 2, 1, 3).flatten(2)  # [D K (B S)]
        ranked, order = values.sort(2)
        wanted = torch.stack(
            [_quantiles(line @ r.sample(scale, rng), ranked.shape[2]) for r in references]
        )
        unit = torch.tensor([r.spread[scale] for r in references]).to(tap)[:, None, None]
        error = ((ranked - wanted) / unit).square()
        own = torch.zeros_like(error).scatter(2, order, error)  # back to the picture it is of
        total = total + share / sum(shares) * own.unflatten(2, (-1, s)).mean((1, 3))
    return total


def _quantiles(values: Float[Tensor, "K S"], count: int) -> Float[Tensor, "K _"]:
    """`count` evenly spaced quantiles of every row, by linear interpolation of the sorted row."""
    ranked = values.sort(1).values
    at = (torch.arange(count, device=values.device) + 0.5) / count * ranked.shape[1] - 0.5
    at = at.clamp(0, ranked.shape[1] - 1)
    low = at.floor().long()
    high = (low + 1).clamp(max=ranked.shape[1] - 1)
    return ranked[:, low].lerp(ranked[:, high], (at - low).to(values))
