"""What the adaptation benchmark measures of one domain, against pictures that it never saw.

Legend: K codes, M held-out portraits, T taps, C channels, H W image.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from models.adaptation.domain import Domain, add_domains, without_noise
from models.inversion.base import Inversion
from models.losses.frechet import frechet_distance
from models.losses.identity import Identity
from models.losses.sface import SFace
from models.losses.trunk import PerceptualTrunk, unit_normalise
from models.stylegan2.generator import Generator
from tasks.training.squeezenet import SqueezeNet

CODES, PSI = 192, 0.7
"""Codes that are rendered in every domain, and their truncation."""
PAIRED = 96
"""Of them, those whose pairwise similarities are compared."""
SQUEEZE_TAP = 2
"""SqueezeNet's tap for the Frechet distance: the last fire module at an eighth of the input, 256
channels. Deeper ones have more channels than twenty held-out pictures can tell apart."""


class Eye:
    """A network that scores: "trunk", our own, whose activations the loss sees too, or
    "squeezenet", SqueezeNet v1.1 of ImageNet, which no loss sees.

    Args:
        network: our trunk, or the teacher.
    """

    def __init__(self, network: PerceptualTrunk | SqueezeNet) -> None:
        self.network = network
        self.name = "squeezenet" if isinstance(network, SqueezeNet) else "trunk"

    @torch.no_grad()
    def taps(self, images: Float[Tensor, "K 3 H W"]) -> list[Tensor]:
        """Channel-normalised activations, finest first; SqueezeNet sees pictures twice as large."""
        if isinstance(self.network, SqueezeNet):
            return self.network(F.interpolate(images, scale_factor=2.0, mode="bilinear"))
        return [unit_normalise(tap) for tap in self.network(images)]

    @torch.no_grad()
    def features(self, images: Float[Tensor, "K 3 H W"]) -> Float[Tensor, "K C"]:
        """What the Frechet distance is taken of: activations averaged over places."""
        found = []
        for part in images.split(32):
            if isinstance(self.network, SqueezeNet):
                found.append(self.taps(part)[SQUEEZE_TAP].mean((2, 3)))
            else:
                taps = self.network(part)[-2:]  # as models.losses.frechet
                found.append(torch.cat([tap.mean((2, 3)) for tap in taps], 1))
        return torch.cat(found)

    def similarities(self, images: Float[Tensor, "K 3 H W"]) -> Float[Tensor, "K K"]:
        """Mean cosine over places and taps of every two pictures: 1 - perceptual distance / 2."""
        parts = [self.taps(part) for part in images.split(32)]
        total = torch.zeros(len(images), len(images))
        for index in range(len(parts[0])):
            tap = torch.cat([taps[index] for taps in parts])
            flat = tap.flatten(1)
            total += flat @ flat.T / (tap.shape[2] * tap.shape[3]) / len(parts[0])
        return total


@dataclass(frozen=True, kw_only=True)
class Source:
    """The unadapted generator's pictures and what every eye makes of them."""

    w_plus: Float[Tensor, "K L D"]
    images: Float[Tensor, "K 3 H W"]
    features: Mapping[str, Float[Tensor, "K C"]]
    similarities: Mapping[str, Float[Tensor, "K K"]]


def make_source(generator: Generator, eyes: Sequence[Eye], codes: int = CODES) -> Source:
    """Fixed codes of a fixed truncation, rendered."""
    z = torch.randn(codes, generator.z_dim, generator=torch.Generator().manual_seed(2_024))
    with torch.no_grad():
        w_plus = generator.mapping(z, truncation_psi=PSI)
    images = render(generator, w_plus, None)
    return Source(
        w_plus=w_plus,
        images=images,
        features={eye.name: eye.features(images) for eye in eyes},
        similarities={eye.name: eye.similarities(images[:PAIRED]) for eye in eyes},
    )


@torch.no_grad()
def render(
    generator: Generator, w_plus: Float[Tensor, "K L D"], domain: Domain | None
) -> Float[Tensor, "K 3 H W"]:
    """Clamped pictures of codes without noise, in a domain where one is given."""
    mixes = [[(domain, 1.0)] if domain else []]
    parts = [add_domains(without_noise(part, generator), mixes) for part in w_plus.split(32)]
    return torch.cat([part.render(generator).clamp(-1, 1) for part in parts])


def score_pictures(
    images: Float[Tensor, "K 3 H W"],
    source: Source,
    held_out: Float[Tensor, "M 3 H W"] | None,
    eyes: Sequence[Eye],
    identity: Identity | SFace | None = None,
) -> dict[str, float]:
    """Scores of the source's own codes in a domain.

    By eye the Frechet distance to the held-out portraits over that of the source pictures, the
    correlation of all pairwise similarities with the source's (content), and the mean distance of
    two pictures over the source's (diversity); `colour_share` and, with a network, `identity`.
    """
    found = {} if held_out is None else frechet_ratios(images, source, held_out, eyes)
    for eye in eyes:
        before, after = source.similarities[eye.name], eye.similarities(images[:PAIRED])
        pair = compare_pairs(before, after)
        found[f"content_{eye.name}"], found[f"diversity_{eye.name}"] = pair
    found["colour_share"] = colour_map_share(source.images, images)
    if identity is not None:
        found["identity"] = mean_identity(source.images[:PAIRED], images[:PAIRED], identity)
    return found


def frechet_ratios(
    images: Float[Tensor, "K 3 H W"],
    source: Source,
    held_out: Float[Tensor, "M 3 H W"],
    eyes: Sequence[Eye],
) -> dict[str, float]:
    """`frechet_<eye>`: distance to the held-out portraits over that of the source pictures."""
    found = {}
    for eye in eyes:
        wanted = eye.features(held_out)
        plain = frechet_distance(source.features[eye.name], wanted)
        found[f"frechet_{eye.name}"] = frechet_distance(eye.features(images), wanted) / plain
    return found


def colour_map_share(before: Float[Tensor, "K 3 H W"], after: Float[Tensor, "K 3 H W"]) -> float:
    """Share of the squared change of all pixels that the best quadratic map of colours explains,
    one for all pictures and places: 1 for a regrade, 0 where no colour tells what became of it."""
    given = before.permute(0, 2, 3, 1).flatten(0, 2).double()
    found = after.permute(0, 2, 3, 1).flatten(0, 2).double()
    pairs = [given[:, i] * given[:, j] for i in range(3) for j in range(i, 3)]
    terms = torch.stack([torch.ones_like(pairs[0]), *given.T, *pairs], 1)
    left = found - terms @ torch.linalg.lstsq(terms, found).solution
    return 1 - float(left.square().sum() / (found - given).square().sum())


@torch.no_grad()
def mean_identity(
    before: Float[Tensor, "K 3 H W"],
    after: Float[Tensor, "K 3 H W"],
    identity: Identity | SFace,
) -> float:
    """Mean similarity of each person before and after."""
    pairs = zip(before.split(32), after.split(32), strict=True)
    return float(torch.cat([identity(a, b) for a, b in pairs]).mean())


def compare_pairs(before: Float[Tensor, "K K"], after: Float[Tensor, "K K"]) -> tuple[float, float]:
    """Correlation of the similarities of all pairs, and the ratio of their mean distances."""
    rows, columns = torch.triu_indices(len(before), len(before), 1)
    a, b = before[rows, columns], after[rows, columns]
    correlation = torch.corrcoef(torch.stack([a, b]))[0, 1]
    return float(correlation), float((1 - b).mean() / (1 - a).mean())


def rendering_ratio(generator: Generator, domain: Domain, batch: int, repeats: int = 25) -> float:
    """Speed of rendering in a domain over plain rendering: median over alternating pairs."""
    plain = Inversion(w_plus=generator.latent_avg.expand(batch, generator.num_ws, -1).clone())
    adapted = add_domains(plain, [[(domain, 1.0)]])
    ratios = []
    with torch.inference_mode():
        for repeat in range(repeats + 2):
            times = []
            for inversion in (plain, adapted):
                started = time.perf_counter()
                inversion.render(generator)
                times.append(time.perf_counter() - started)
            if repeat >= 2:  # the first two warm up
                ratios.append(times[0] / times[1])
    return statistics.median(ratios)
