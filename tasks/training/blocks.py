"""What every encoder's objective is built of: the frozen generator, one update, one card.

Legend: N batch, L num_ws, D w_dim, H W image.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from models.encoders.checkpoint import Kinds, SizedNetwork, load_network, save_encoder
from models.errors import AssetError
from models.statistics import Statistics, statistics_for
from models.stylegan2.generator import Generator
from tasks.training.cards import write_page
from tasks.training.distributed import average_gradients
from tasks.training.trainer import TrainingConfig

logger = logging.getLogger(__name__)

LOSS_SIZE = 256
"""Larger renders are averaged down to this before any loss, as pSp and e4e do, px."""
STEM = "input_layer.0.weight"
"""A trunk's first kernel."""


def prepared(generator: Generator, device: str, dtype: torch.dtype | None) -> Generator:
    """The frozen generator in the layout that trains fastest here.

    Measured at 64 px and batch 16 in bfloat16 on a CPU: implicit and channels-last take 5.0 ms a
    picture forward and backward, the automatic choice 6.5.
    """
    generator.to(device).requires_grad_(False)
    generator.compute_dtype = dtype
    if generator.resolution <= 64 or dtype is not None:
        generator.form, generator.memory_format = "implicit", torch.channels_last
    return generator


def for_losses(images: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N 3 h w"]:
    """Renders at the size of the losses: averaged down to LOSS_SIZE where they are larger."""
    return images if images.shape[2] <= LOSS_SIZE else F.adaptive_avg_pool2d(images, LOSS_SIZE)


def descend(
    loss: Tensor, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """One update of some parameters; gradients are averaged over processes where there are any."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    average_gradients(list(parameters))
    optimizer.step()


def settle(module: nn.Module) -> None:
    """Give kernels and matrices the half-precision values that their file will hold."""
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if tensor.ndim > 1 and tensor.is_floating_point():
                tensor.copy_(tensor.half())


def card_settings(config: TrainingConfig, files: Sequence[str]) -> dict[str, Any]:
    """A run's settings for its card: file names only, since a machine's paths tell nobody anything.

    Args:
        files: further fields that hold a path or None.
    """
    settings = {k: v for k, v in asdict(config).items() if k not in ("out", "time_limit_s")}
    for name in ("data", "validation"):
        settings[name] = [Path(path).name for path in settings[name]]
    for name in files:
        settings[name] = settings[name] and Path(settings[name]).name
    return settings


def save_with_page(network: SizedNetwork, path: Path, card: Mapping[str, Any]) -> Path:
    """The finished weights with their card, and the page about them."""
    path = save_encoder(network, path, card)
    write_page(path)
    return path


def started_from(path: str | None) -> dict[str, Any]:
    """For a card: the file that a run went on from, how long that one had been trained, and what
    it went on from itself.

    Empty without a file, or where it has no card.
    """
    card = Path(path).with_suffix(".json") if path else None
    if card is None or not card.is_file():
        return {}
    made = json.loads(card.read_text()).get("provenance", {})
    known = ("images_shown", "pairs_shown", "started_from")
    before = {"file": Path(str(path)).name, "method": made.get("method", "")}
    return {"started_from": before | {name: made[name] for name in known if name in made}}


def starting_network(path: str, kinds: Kinds, generator_hash: str) -> tuple[Any, dict[str, Any]]:
    """The network that a run starts from, and its card; told where it is of another generator.

    Raises:
        AssetError: missing, damaged, or of none of these kinds.
    """
    try:
        network, _, card = load_network(path, kinds)
    except AssetError as error:
        raise AssetError(f"start_from: {error}") from error
    if card.get("generator_hash") != generator_hash:
        logger.warning("start_from %s: it was trained with another generator", path)
    return network, card


def begin_as(network: Any, found: nn.Module, path: str) -> None:
    """Take over a network of the same kind.

    Raises:
        AssetError: of other sizes.
    """
    try:
        network.begin_as(found)
    except ValueError as error:
        raise AssetError(f"start_from {path}: {error}; choose another file or its sizes") from error


def adopt(module: nn.Module, state: Mapping[str, Tensor], path: str) -> int:
    """Copy every tensor whose name and shape agree; the others stay as they are. A stem that sees
    more channels than the file's begins as that one: the further channels have no say.

    Returns:
        How many tensors were taken.

    Raises:
        AssetError: none of the trunk's kernels agrees.
    """
    own, found = module.state_dict(), dict(state)
    missing = own[STEM].shape[1] - found[STEM].shape[1]
    if missing > 0:
        found[STEM] = F.pad(found[STEM], (0, 0, 0, 0, 0, missing))
    fitting = {k: v for k, v in found.items() if k in own and own[k].shape == v.shape}
    if not any(name.startswith("body.") and value.ndim > 1 for name, value in fitting.items()):
        raise AssetError(
            f"start_from {path}: no kernel of its trunk fits this run's; choose a file of the same "
            "width and units"
        )
    module.load_state_dict(fitting, strict=False)
    logger.info("%s: %d of %d tensors taken", path, len(fitting), len(own))
    return len(fitting)


def example_edit(generator: Generator) -> Float[Tensor, " D"]:
    """What the grids' edited column adds to every row: 2 standard deviations along the first
    principal direction of W, which needs no labels."""
    found = statistics_for(generator)
    return 2 * found.w_component_std[0] * found.w_component[0]


def random_edits(
    statistics: Statistics, count: int, directions: int = 16, most: float = 3.0
) -> Float[Tensor, "N D"]:
    """Moves along leading principal directions of W, up to `most` standard deviations each way."""
    which = torch.randint(min(directions, len(statistics.w_component)), (count,))
    size = most * (2 * torch.rand(count) - 1) * statistics.w_component_std[which]
    return size[:, None] * statistics.w_component[which]


def rounded_scores(scores: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 5) for name, value in scores.items()}
