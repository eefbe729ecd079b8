"""What every later method needs to know of a generator's latent spaces, computed once and stored.

Legend: N samples, D w_dim, K principal components, I input channels of a layer, H W image.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from models.cache import cache_folder
from models.checkpoints.bundled import find_for_generator
from models.errors import AssetError
from models.files import atomically
from models.stylegan2.generator import Generator, weights_hash

FORMAT = "style-refinery statistics 1"

CHUNK = 1000
"""Samples drawn at a time."""

ANCHOR_SAMPLES = 100_000
"""Draws for the anchors of the style space where nothing else is asked for: LSAP's number."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Statistics of W, of the style space and of the picture of the mean code; float32, on the CPU.

    Attributes:
        latent_avg: the generator's tracked mean of W, or `w_mean` where it has none.
        w_mean: mean of the samples.
        w_std: root mean squared distance of a sample from `w_mean`, the projector's sigma
            (sqrt(D) times the standard deviation of one coordinate, if they were equal).
        w_component: principal directions of W, unit rows, largest variance first; each row's entry
            of largest magnitude is positive.
        w_component_std: standard deviation of the samples along each direction.
        style_mean, style_std: [I] per layer of `Generator.layers()`, of every affine's output.
        style_anchor: [I] per layer, mean of L2-normalised styles: LSAP's mu_l (arXiv 2209.12746),
            not normalised again. LSAP itself uses the 3x3 layers and the last ToRGB only.
        average_image: rendering of `latent_avg` with the stored noise, about [-1, 1].
        generator_hash: `weights_hash` of the generator.
        samples, anchor_samples, seed: how the samples were drawn.
    """

    latent_avg: Float[Tensor, " D"]
    w_mean: Float[Tensor, " D"]
    w_std: float
    w_component: Float[Tensor, "K D"]
    w_component_std: Float[Tensor, " K"]
    style_mean: tuple[Tensor, ...]
    style_std: tuple[Tensor, ...]
    style_anchor: tuple[Tensor, ...]
    average_image: Float[Tensor, "3 H W"]
    generator_hash: str
    samples: int
    anchor_samples: int
    seed: int


@torch.no_grad()
def compute_statistics(
    generator: Generator,
    samples: int = 10_000,
    seed: int = 0,
    *,
    anchor_samples: int | None = None,
) -> Statistics:
    """Draw W once and gather everything. z comes from the CPU: a device changes only rounding.

    A conditional generator is sampled with uniformly random labels.

    Args:
        samples: draws of W for everything but the anchors.
        anchor_samples: draws for `style_anchor` (LSAP uses 100,000), the first `samples` of them
            being the same; None means `samples`.

    Raises:
        ValueError: fewer than two samples, or fewer anchor samples than samples.
    """
    anchor_samples = samples if anchor_samples is None else anchor_samples
    if samples < 2 or anchor_samples < samples:
        raise ValueError(
            f"statistics: expected 2 <= samples <= anchor_samples, found samples={samples}, "
            f"anchor_samples={anchor_samples}"
        )
    kept: list[Tensor] = []
    layers = generator.layers()
    anchors = [torch.zeros(layer.weight.shape[2], dtype=torch.float64) for _, layer, _ in layers]
    sums = [torch.zeros(2, len(anchor), dtype=torch.float64) for anchor in anchors]
    # The variance is summed about the first chunk's mean, where nothing cancels.
    centres: list[Tensor] | None = None
    for w, count in _draw(generator, samples, anchor_samples, seed):
        kept.append(w[:count].cpu().double())
        styles = generator.styles(w[:, None].expand(-1, generator.num_ws, -1))
        centres = [s.mean(0).cpu().double() for s in styles] if centres is None else centres
        for index, style in enumerate(styles):
            anchors[index] += F.normalize(style, dim=1).cpu().double().sum(0)
            deviation = style[:count].cpu().double() - centres[index]
            sums[index] += torch.stack([deviation.sum(0), deviation.square().sum(0)])
    assert centres is not None
    offsets = [total[0] / samples for total in sums]
    variances = [total[1] / samples - o.square() for total, o in zip(sums, offsets, strict=True)]
    w = torch.cat(kept)
    mean = w.mean(0)
    component, component_std = _principal_components(w - mean)
    latent_avg = generator.latent_avg.detach().cpu().double()
    if not latent_avg.isfinite().all():
        latent_avg = mean
    return Statistics(
        latent_avg=latent_avg.float(),
        w_mean=mean.float(),
        w_std=float((w - mean).square().sum(1).mean().sqrt()),
        w_component=component.float(),
        w_component_std=component_std.float(),
        style_mean=tuple((c + o).float() for c, o in zip(centres, offsets, strict=True)),
        style_std=tuple(v.clamp(min=0).sqrt().float() for v in variances),
        style_anchor=tuple((anchor / anchor_samples).float() for anchor in anchors),
        average_image=_render(generator, latent_avg),
        generator_hash=weights_hash(generator),
        samples=samples,
        anchor_samples=anchor_samples,
        seed=seed,
    )


def _draw(
    generator: Generator, samples: int, total: int, seed: int
) -> Iterator[tuple[Float[Tensor, "N D"], int]]:
    """Chunks of w, and how many of each chunk belong to the first `samples`."""
    rng = torch.Generator().manual_seed(seed)
    device = generator.latent_avg.device
    for start in range(0, total, CHUNK):
        n = min(CHUNK, total - start)
        z = torch.randn(n, generator.z_dim, generator=rng).to(device)
        c = None
        if generator.c_dim:
            labels = torch.randint(generator.c_dim, (n,), generator=rng)
            c = F.one_hot(labels, generator.c_dim).float().to(device)
        yield generator.mapping(z, c)[:, 0], min(max(samples - start, 0), n)


def _principal_components(deviation: Float[Tensor, "N D"]) -> tuple[Tensor, Tensor]:
    """Eigenvectors of the (biased) covariance as rows, and standard deviations, largest first."""
    eigenvalues, vectors = torch.linalg.eigh(deviation.T @ deviation / len(deviation))
    rows = vectors.T.flip(0)
    largest = rows.gather(1, rows.abs().argmax(1, keepdim=True))
    return rows * largest.sign(), eigenvalues.flip(0).clamp(min=0).sqrt()


def _render(generator: Generator, w: Tensor) -> Float[Tensor, "3 H W"]:
    w_plus = w.to(generator.latent_avg)[None, None].expand(1, generator.num_ws, -1)
    return generator.synthesis(w_plus)[0].float().cpu().contiguous()


TENSORS = ("latent_avg", "w_mean", "w_component", "w_component_std", "average_image")
LAYERED = ("style_mean", "style_std", "style_anchor")


def save_statistics(statistics: Statistics, path: str | Path) -> Path:
    """Write one safetensors file, atomically; the hash and the scalars stand in its metadata."""
    path = Path(path)
    tensors = {name: getattr(statistics, name).contiguous() for name in TENSORS}
    for name in LAYERED:
        for index, value in enumerate(getattr(statistics, name)):
            tensors[f"{name}.{index}"] = value.contiguous()
    scalars = {
        "w_std": statistics.w_std,
        "layers": len(statistics.style_mean),
        "samples": statistics.samples,
        "anchor_samples": statistics.anchor_samples,
        "seed": statistics.seed,
    }
    metadata = {
        "format": FORMAT,
        "generator_hash": statistics.generator_hash,
        "scalars": json.dumps(scalars),
    }
    with atomically(path) as file:
        file.write(save(tensors, metadata))
    return path


def load_statistics(path: str | Path) -> Statistics:
    """Read what `save_statistics` wrote.

    Raises:
        AssetError: missing, or not such a file.
    """
    path = Path(path)
    if not path.is_file():
        raise AssetError(
            f"statistics {path}: no such file; make it with models.statistics.compute_statistics "
            f"and save_statistics"
        )
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if metadata.get("format") != FORMAT:
            raise AssetError(
                f"statistics {path}: expected format {FORMAT!r}, found {metadata.get('format')!r}"
            )
        scalars = json.loads(metadata["scalars"])
        layers = scalars.pop("layers")
        layered = {name: tuple(tensors[f"{name}.{i}"] for i in range(layers)) for name in LAYERED}
        plain = {name: tensors[name] for name in TENSORS}
        return Statistics(**plain, **layered, **scalars, generator_hash=metadata["generator_hash"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise AssetError(f"statistics {path}: cannot read: {error!r}") from error


_computed: dict[str, Statistics] = {}


def statistics_for(generator: Generator) -> Statistics:
    """The generator's statistics: bundled under its hash, else from the cache, else computed.

    What is computed goes into `<cache>/statistics/<hash>.safetensors`, so that the actors of a run
    and later runs find it; two that compute at the same time write the same values.
    The values are moved nowhere: they are on the CPU whatever the generator's device.

    Raises:
        AssetError: the bundled file belongs to another generator.
    """
    digest = weights_hash(generator)
    if digest not in _computed:
        path = find_for_generator(digest, "statistics.safetensors")
        found = load_statistics(path) if path else _cached(generator, digest)
        if found.generator_hash != digest:
            raise AssetError(
                f"statistics {path}: made for generator {found.generator_hash}, expected {digest}; "
                f"compute them again for the bundled generator"
            )
        _computed[digest] = found
    return _computed[digest]


def _cached(generator: Generator, digest: str) -> Statistics:
    """From the cache, or computed and put there. A cache that cannot be used is no error."""
    path = cache_folder() / "statistics" / f"{digest}.safetensors"
    if path.is_file():
        try:
            found = load_statistics(path)
            if (found.generator_hash, found.anchor_samples) == (digest, ANCHOR_SAMPLES):
                return found
        except AssetError as error:
            logger.warning("%s; it is computed again", error)
    found = compute_statistics(generator, anchor_samples=ANCHOR_SAMPLES)
    try:
        save_statistics(found, path)
    except OSError as error:
        logger.warning("the generator's statistics cannot be kept for the next start: %s", error)
    return found
