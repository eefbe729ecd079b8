"""StyleCLIP's global directions: a pair of texts as a direction of style space (arXiv 2103.17249,
section 6).

Each style channel of the 3x3 layers is moved up and down on some codes; the mean direction in which
CLIP's embedding of the picture then moves is the channel's relevance vector. Its product with the
direction between two texts says how much of the channel the text asks for; what is below a
threshold is left out. The relevance depends on the generator and on CLIP alone and is kept.

Legend: N codes, L num_ws, D w_dim, E embedding, S style channels of all layers, I of one layer,
C channels of the 3x3 layers.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from models.cache import cache_folder
from models.editing.direction import Direction
from models.errors import ConfigError
from models.files import atomically
from models.losses.clip_direction import Embeds
from models.statistics import Statistics
from models.stylegan2.generator import Generator, weights_hash

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Relevance:
    """How CLIP's embedding of a picture moves with each style channel.

    Attributes:
        vectors: unit rows, in layer order; zero for the ToRGBs' channels, which are not moved, and
            for channels that change nothing.
        channels: style channels of each layer of `Generator.layers()`.
    """

    vectors: Float[Tensor, "S E"]
    channels: tuple[int, ...]


def style_channels(generator: Generator) -> tuple[int, ...]:
    """Style channels of each layer of `Generator.layers()`."""
    return tuple(layer.weight.shape[2] for _, layer, _ in generator.layers())


@torch.no_grad()
def channel_relevance(
    generator: Generator,
    clip: Embeds,
    statistics: Statistics,
    *,
    samples: int = 32,
    strength: float = 5.0,
    batch: int = 64,
    on_progress: Callable[[int, int], None] | None = None,
) -> Relevance:
    """Move every channel of the 3x3 layers by +-`strength` standard deviations.

    Per code, the unit difference of the two unit embeddings; their mean over the codes, of norm 1.
    Codes are drawn without truncation, rendered with the stored noise.

    Args:
        samples: codes; the published 100.
        batch: pictures at a time; it changes no result beyond rounding.
        on_progress: called with (channels done, all).
    """
    draws = torch.Generator().manual_seed(0)
    z = torch.randn(samples, generator.z_dim, generator=draws).to(generator.latent_avg)
    c = None
    if generator.c_dim:
        labels = torch.randint(generator.c_dim, (samples,), generator=draws)
        c = F.one_hot(labels, generator.c_dim).to(z)
    w_plus = generator.mapping(z, c)
    channels = style_channels(generator)
    is_moved = [not name.startswith("to_rgb") for name, _, _ in generator.layers()]
    total = sum(count for count, moves in zip(channels, is_moved, strict=True) if moves)
    rows: list[Tensor] = []
    done = 0
    for index, count in enumerate(channels):
        if not is_moved[index]:
            rows.append(torch.zeros(count, rows[0].shape[1]))
            continue
        steps = strength * statistics.style_std[index]
        # As many channels at a time as fill a batch with all their codes, moved both ways.
        for some in torch.arange(count).split(max(1, batch // (2 * samples))):
            rows.append(_moves(generator, clip, w_plus, index, some, steps[some], batch))
            done += len(some)
            if on_progress is not None:
                on_progress(done, total)
    return Relevance(vectors=torch.cat(rows), channels=channels)


def _moves(
    generator: Generator,
    clip: Embeds,
    w_plus: Float[Tensor, "N L D"],
    index: int,
    channels: Int[Tensor, " C"],
    steps: Float[Tensor, " C"],
    batch: int,
) -> Float[Tensor, "C E"]:
    """The mean direction of the embedding when one channel of a layer moves, for some channels."""
    # One row for each pair of a channel and a code.
    shifts = torch.zeros(len(channels), style_channels(generator)[index])
    shifts[torch.arange(len(channels)), channels] = steps
    shifts = shifts.repeat_interleave(len(w_plus), 0).to(w_plus)
    codes = w_plus.repeat(len(channels), 1, 1)
    units = []
    for at in range(0, len(codes), max(1, batch // 2)):
        rows = slice(at, at + max(1, batch // 2))
        both = torch.cat([shifts[rows], -shifts[rows]])
        images = generator.synthesis(codes[rows].repeat(2, 1, 1), style_shift={index: both})
        up, down = clip.images(images.clamp(-1, 1)).float().cpu().chunk(2)
        units.append(F.normalize(up - down, dim=1))
    each = torch.cat(units).unflatten(0, (len(channels), len(w_plus)))
    return F.normalize(each.mean(1), dim=1)


def cached_relevance(
    generator: Generator,
    clip: Embeds,
    statistics: Statistics,
    *,
    samples: int = 32,
    strength: float = 5.0,
    on_progress: Callable[[int, int], None] | None = None,
) -> Relevance:
    """`channel_relevance`, from `<cache>/relevance` where it was computed before.

    The file's name holds the hashes of generator and CLIP and the settings. A cache that cannot be
    used is no error.
    """
    name = f"{weights_hash(generator)[:24]}-{clip.hash[:24]}-{samples}-{strength:g}.safetensors"
    path = cache_folder() / "relevance" / name
    channels = style_channels(generator)
    if path.is_file():
        try:
            vectors = load_file(path)["vectors"]
            if len(vectors) == sum(channels) and vectors.isfinite().all():
                return Relevance(vectors=vectors, channels=channels)
            logger.warning("%s does not fit the generator; it is computed again", path)
        except (OSError, SafetensorError, KeyError) as error:
            logger.warning("%s cannot be read (%s); it is computed again", path, error)
    found = channel_relevance(
        generator, clip, statistics, samples=samples, strength=strength, on_progress=on_progress
    )
    try:
        with atomically(path) as file:
            file.write(save({"vectors": found.vectors.contiguous()}))
    except OSError as error:
        logger.warning("the channels' relevance cannot be kept for the next time: %s", error)
    return found


def style_text_direction(
    name: str,
    relevance: Relevance,
    change: Float[Tensor, " E"],
    statistics: Statistics,
    *,
    count: int = 40,
    beta: float | None = None,
    card: Mapping[str, Any] | None = None,
) -> Direction:
    """The style channels whose relevance goes along with a text, each by its own deviation.

    A strength of 1 moves the most relevant channel by one standard deviation, the others by less in
    the proportion of their relevance: StyleCLIP's alpha.

    Args:
        change: between two texts (`text_direction`).
        count: channels that move, the most relevant ones, where no threshold is given.
        beta: instead, channels whose relevance is at least this much (StyleCLIP's threshold; 0.1 to
            0.2 for OpenAI's ViT-B/32).
        card: more for the direction's card.

    Raises:
        ConfigError: a count below 1, or no channel reaches the threshold.
    """
    along = relevance.vectors.double() @ change.double()  # [S]
    size = along.abs()
    if beta is None and not 1 <= count <= int((size > 0).sum()):
        raise ConfigError(f"{name}: expected a count in 1..{int((size > 0).sum())}, got {count}")
    limit = float(size.topk(count).values[-1]) if beta is None else beta
    is_kept = (size >= limit) & (size > 0)
    if not is_kept.any():
        raise ConfigError(
            f"{name}: no style channel has a relevance of {beta} for the texts, the largest is "
            f"{float(size.max()):.3f}; lower beta"
        )
    relative = torch.where(is_kept, along, torch.zeros_like(along)) / size.max()
    moves = relative * torch.cat(statistics.style_std).double()
    unit = float(moves.norm())
    return Direction(
        name=name,
        vector=(moves / unit).float(),
        unit=unit,
        generator_hash=statistics.generator_hash,
        channels=relevance.channels,
        card={
            "what": "style channels whose change goes along with a text (StyleCLIP's global "
            "direction, arXiv 2103.17249)",
            "channels": int(is_kept.sum()),
            "beta": round(limit, 4),
            "largest_relevance": round(float(size.max()), 4),
            **(card or {}),
        },
    )
