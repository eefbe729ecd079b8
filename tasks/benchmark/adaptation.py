"""What the adaptation benchmark measures of one domain, against pictures that it never saw.

Legend: K codes, M held-out portraits, T taps, C channels, H W image.
"""

import hashlib
import io
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from models.adaptation.domain import Domain, add_domains
from models.errors import ConfigError
from models.inversion.base import Inversion
from models.losses.frechet import frechet_distance
from models.losses.trunk import PerceptualTrunk, unit_normalise
from models.stylegan2.generator import Generator
from tasks.training.trunk import Teacher

CODES, PSI = 192, 0.7
"""Codes that are rendered in every domain, and their truncation."""
PAIRED = 96
"""Of them, those whose pairwise similarities are compared."""
SQUEEZE_TAP = 2
"""SqueezeNet's tap for the Frechet distance: the last fire module at an eighth of the input, 256
channels. Deeper ones have more channels than twenty held-out pictures can tell apart."""


@dataclass(frozen=True, kw_only=True)
class Portraits:
    """One style, split by the hash of the identifier.

    Attributes:
        training: encoded pictures by identifier, sorted.
        held_out: pictures in [-1, 1] that no domain is adapted to.
    """

    training: Mapping[str, bytes]
    held_out: Float[Tensor, "M 3 H W"]


def is_held_out(identifier: str) -> bool:
    """One portrait in five, the same on every machine."""
    return int(hashlib.sha256(identifier.encode()).hexdigest(), 16) % 5 == 0


def read_portraits(path: str, resolution: int) -> dict[str, Portraits]:
    """Portraits by style from a Parquet file with columns `id`, `image` and `style`.

    Raises:
        ConfigError: no such file or column, or a style with fewer than two held-out pictures.
    """
    try:
        rows = pq.read_table(path, columns=["id", "image", "style"]).to_pylist()
    except (OSError, KeyError, ValueError) as error:
        raise ConfigError(
            f"portraits {path}: expected a Parquet file with columns id, image, style ({error})"
        ) from error
    found = {}
    for style in sorted({row["style"] for row in rows}):
        own = sorted((r for r in rows if r["style"] == style), key=lambda r: r["id"])
        held_out = [_picture(r["image"], resolution) for r in own if is_held_out(r["id"])]
        if len(held_out) < 2:
            raise ConfigError(f"portraits {path}: style {style} has fewer than 2 held out")
        found[style] = Portraits(
            training={r["id"]: _bytes(r["image"]) for r in own if not is_held_out(r["id"])},
            held_out=torch.stack(held_out),
        )
    return found


def _bytes(value: Any) -> bytes:
    return value["bytes"] if isinstance(value, dict) else value


def _picture(value: Any, resolution: int) -> Float[Tensor, "3 H W"]:
    image = Image.open(io.BytesIO(_bytes(value))).convert("RGB")
    if image.size != (resolution, resolution):
        image = image.resize((resolution, resolution), Image.Resampling.BOX)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


class Eye:
    """A network that scores: "trunk", our own, whose activations the loss sees too, or
    "squeezenet", SqueezeNet v1.1 of ImageNet, which no loss sees.

    Args:
        network: our trunk, or the teacher.
    """

    def __init__(self, network: PerceptualTrunk | Teacher) -> None:
        self.network = network
        self.name = "squeezenet" if isinstance(network, Teacher) else "trunk"

    @torch.no_grad()
    def taps(self, images: Float[Tensor, "K 3 H W"]) -> list[Tensor]:
        """Channel-normalised activations, finest first; SqueezeNet sees pictures twice as large."""
        if isinstance(self.network, Teacher):
            return self.network(F.interpolate(images, scale_factor=2.0, mode="bilinear"))
        return [unit_normalise(tap) for tap in self.network(images)]

    @torch.no_grad()
    def features(self, images: Float[Tensor, "K 3 H W"]) -> Float[Tensor, "K C"]:
        """What the Frechet distance is taken of: activations averaged over places."""
        found = []
        for part in images.split(32):
            if isinstance(self.network, Teacher):
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
    """Clamped pictures of codes, in a domain where one is given."""
    mixes = [[(domain, 1.0)] if domain else []]
    parts = [add_domains(Inversion(w_plus=part), mixes) for part in w_plus.split(32)]
    return torch.cat([part.render(generator).clamp(-1, 1) for part in parts])


def score_pictures(
    images: Float[Tensor, "K 3 H W"],
    source: Source,
    held_out: Float[Tensor, "M 3 H W"],
    eyes: Sequence[Eye],
    *,
    is_paired: bool = True,
) -> dict[str, float]:
    """Frechet distance to the held-out portraits over that of the source pictures; of pictures that
    are the source's own codes also the correlation of all pairwise similarities with the source's
    (content) and the mean distance of two pictures over the source's (diversity). By eye."""
    found = {}
    for eye in eyes:
        wanted, name = eye.features(held_out), eye.name
        plain = frechet_distance(source.features[name], wanted)
        found[f"frechet_{name}"] = frechet_distance(eye.features(images), wanted) / plain
        if not is_paired:
            continue
        before, after = source.similarities[name], eye.similarities(images[:PAIRED])
        found[f"content_{name}"], found[f"diversity_{name}"] = compare_pairs(before, after)
    return found


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


def write_references(portraits: Portraits, count: int | None, folder: Path) -> Path:
    """The first `count` training pictures of a style as files (None: all); the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    chosen = list(portraits.training.items())[:count]
    for identifier, data in chosen:
        (folder / f"{identifier}.png").write_bytes(data)
    return folder
