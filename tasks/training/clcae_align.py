"""CLCAE, stage 1: align pictures and codes of a generator (arXiv 2211.11448).

Pairs come from the generator, drawn anew for every step: no picture file is read. `images` counts
pairs. Validation asks, among held-out pairs, whether a picture's nearest code is its own.

Legend: N batch, D w_dim, H W image.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from models.checkpoints.load import load_generator
from models.encoders.checkpoint import ENCODERS, load_network
from models.encoders.contrastive import (
    TOWERS,
    ContrastiveArchitecture,
    ContrastiveTowers,
    info_nce,
)
from models.errors import AssetError, ConfigError
from models.optim import Ranger
from models.statistics import statistics_for
from models.stylegan2.generator import Generator, weights_hash
from tasks.training.blocks import (
    LOSS_SIZE,
    card_settings,
    descend,
    for_losses,
    prepared,
    rounded_scores,
    save_with_page,
    settle,
    started_from,
)
from tasks.training.schedules import annealed
from tasks.training.trainer import PRECISIONS, Objective, TrainingConfig, set_up, train

logger = logging.getLogger(__name__)

HELD_OUT_SEED = 20_221
"""Of the pairs that validate; training draws from the run's own seed."""


@dataclass(frozen=True, kw_only=True)
class FitClcaeAlignConfig(TrainingConfig):
    """Settings of one alignment run. The defaults suit a 64 px generator on a CPU."""

    generator: str
    """A bundled name or a checkpoint file; it stays as it is."""

    data: tuple[str, ...] = ()
    """Not read: every pair is drawn from the generator."""
    images: int = 100_000
    """Budget: stop after so many pairs, 100,000 different ones in the publication."""
    batch: int = 256
    """Pairs of a step: each is told apart from batch - 1 others."""
    held_out: int = 256
    """Pairs that validate."""

    width: int = 24
    """Channels of the first stage, 64 in the published tower."""
    units: tuple[int, int, int, int] = (2, 2, 2, 2)
    """Residual units of the stages, (3, 4, 14, 3) in the published tower."""
    head_width: int = 64
    """Channels inside the style head, 512 in the published tower."""
    stem_stride: int = 2
    """1 in the published tower; 2 saves the convolutions at full size."""
    layers: int = 3
    """Of the latent tower."""
    hidden: int = 256
    """Width inside its feed-forward parts, 1024 in the published tower."""

    start_from: str | None = None
    """Encoder file whose weights the image tower's trunk and head start from, where name and shape
    agree: an e4e encoder's first head already finds w."""

    optimiser: str = "adam"
    """"adam" as the paper, "ranger" as the released code."""
    learning_rate: float = 1e-3
    """1e-4 as published, for a run many times as long."""
    anneal: float = 0.5
    """Share of the run, at its end, in which the rate falls to 0 along a cosine."""
    balance: float = 0.5
    """Share of the pictures' side of the loss."""

    terms: str = "as the generator's"
    """For the card: on what terms the weights may be used."""

    def __post_init__(self) -> None:
        TrainingConfig.__post_init__(self)
        if self.optimiser not in ("adam", "ranger"):
            raise ConfigError(f'optimiser: expected "adam" or "ranger", found {self.optimiser!r}')
        if not self.learning_rate > 0:
            raise ConfigError(f"learning_rate must be > 0, got {self.learning_rate}")
        for name in ("anneal", "balance"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be in 0..1, got {getattr(self, name)}")
        for name in ("batch", "held_out"):
            if getattr(self, name) < 2:
                raise ConfigError(
                    f"{name} must be >= 2, got {getattr(self, name)}: one pair has no negatives"
                )


def fit(config: FitClcaeAlignConfig) -> Path:
    """Train until `config.images` pairs were shown, resuming from `<out>/checkpoint.pt`.

    Returns:
        `<out>/clcae-align.safetensors` (half precision, its card beside it), or the checkpoint
        where the time limit came first.

    Raises:
        AssetError: no generator, or a checkpoint of another run.
    """
    set_up(config)
    return train(AlignObjective(config, load_generator(config.generator)), config)


def encoder_state(path: str) -> dict[str, Tensor]:
    """Tensors of an encoder's file, or of the image tower of an aligned pair of towers.

    Raises:
        AssetError: missing, damaged, or another kind of network.
    """
    module, _, _ = load_network(path, {**ENCODERS, **TOWERS})
    return (module.image if isinstance(module, ContrastiveTowers) else module).state_dict()


def adopt(module: nn.Module, state: Mapping[str, Tensor], path: str) -> None:
    """Copy every tensor whose name and shape agree; the others stay as they are.

    Raises:
        AssetError: none of the trunk's kernels agrees.
    """
    own = module.state_dict()
    fitting = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
    if not any(name.startswith("body.") and value.ndim > 1 for name, value in fitting.items()):
        raise AssetError(
            f"start_from {path}: no kernel of its trunk fits this run's; choose a file of the same "
            "width and units"
        )
    module.load_state_dict(fitting, strict=False)
    logger.info("%s: %d of %d tensors taken", path, len(fitting), len(own))


class AlignObjective(Objective):
    """Both towers and their optimiser."""

    needs_pictures = False

    def __init__(self, config: FitClcaeAlignConfig, generator: Generator) -> None:
        self.config, self.dtype = config, PRECISIONS[config.precision]
        self.generator_hash = weights_hash(generator)
        average = statistics_for(generator).average_image
        self.generator = prepared(generator, config.device, self.dtype)
        self.resolution = min(generator.resolution, LOSS_SIZE)
        self.average = for_losses(average[None])[0].to(config.device)
        self.architecture = ContrastiveArchitecture(
            w_dim=generator.w_dim,
            input_size=self.resolution,
            width=config.width,
            units=config.units,
            head_width=config.head_width,
            stem_stride=config.stem_stride,
            layers=config.layers,
            hidden=config.hidden,
        )
        towers = ContrastiveTowers(self.architecture)
        if config.start_from:
            adopt(towers.image, encoder_state(config.start_from), config.start_from)
        self.towers = towers.to(config.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        make = Ranger if config.optimiser == "ranger" else torch.optim.Adam
        self.optimizer = make(self.towers.parameters(), lr=config.learning_rate)
        rng = torch.Generator().manual_seed(HELD_OUT_SEED)
        z = torch.randn(config.held_out, generator.z_dim, generator=rng)
        self.held_out = self._pairs(z, "const")
        self.parts = {"towers": self.towers, "optimizer": self.optimizer}
        self.identity = {
            "architecture": self.architecture.to_dict(),
            "generator_hash": self.generator_hash,
            "optimiser": config.optimiser,
            "batch": config.batch,
        }

    def step(self, pictures: Float[Tensor, "0 3 H W"], shown: int) -> dict[str, Tensor]:
        """One update from fresh pairs; `pictures` is empty."""
        rate = self.config.learning_rate * annealed(shown / self.config.images, self.config.anneal)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        z = torch.randn(self.config.batch, self.generator.z_dim)
        images, codes = self._embed(*self._pairs(z, "random"))
        loss = info_nce(images, codes, self.towers.scale, balance=self.config.balance)
        descend(loss.mean(), list(self.towers.parameters()), self.optimizer)
        return {
            "align": loss,
            "top1": _top1(images, codes),
            "temperature": 1 / self.towers.scale,
        }

    @torch.no_grad()
    def score(self, pictures: Float[Tensor, "0 3 H W"]) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Loss and accuracy of retrieval among the held-out pairs; `pictures` is empty."""
        self.towers.eval()
        images, codes = self._embed(*self.held_out)
        loss = info_nce(images, codes, self.towers.scale, balance=self.config.balance)
        self.towers.train()
        return {
            "align": loss,
            "top1_code_of_picture": _top1(images, codes),
            "top1_picture_of_code": _top1(codes, images),
        }, []

    def settle(self) -> None:
        self.dtype = None
        settle(self.towers)

    def export(self, scores: Mapping[str, float], shown: int) -> Path:
        config = self.config
        card = {
            "generator_hash": self.generator_hash,
            "terms": config.terms,
            "provenance": {
                "method": "CLCAE, contrastive alignment (arXiv 2211.11448), "
                "tasks.training.clcae_align",
                "generator": Path(config.generator).stem,
                "pairs_shown": shown,
                **started_from(config.start_from),
                "settings": card_settings(config, ("generator", "start_from")),
            },
            "scores": rounded_scores(scores),
        }
        return save_with_page(self.towers, Path(config.out) / "clcae-align.safetensors", card)

    # ------------------------------------------------------------------ inside

    @torch.no_grad()
    def _pairs(
        self, z: Float[Tensor, "N Z"], noise: str
    ) -> tuple[Float[Tensor, "N 3 H W"], Float[Tensor, "N D"]]:
        """Pictures as a file would hold them, and their codes minus the mean code."""
        w_plus = self.generator.mapping(z.to(self.config.device))
        parts = [self.generator.synthesis(part, noise) for part in w_plus.split(64)]  # type: ignore[arg-type]
        pictures = for_losses(torch.cat(parts)).clamp(-1, 1)
        return pictures, w_plus[:, 0] - self.generator.latent_avg

    def _embed(
        self, pictures: Float[Tensor, "N 3 H W"], offsets: Float[Tensor, "N D"]
    ) -> tuple[Float[Tensor, "N D"], Float[Tensor, "N D"]]:
        with torch.autocast(pictures.device.type, self.dtype, enabled=self.dtype is not None):
            pictures = pictures.contiguous(memory_format=torch.channels_last)
            images = self.towers.embed_pictures(pictures, self.average)
        return images, self.towers.embed_codes(offsets)


def _top1(queries: Float[Tensor, "N D"], keys: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
    """1 where the nearest key is the query's own."""
    with torch.no_grad():
        own = torch.arange(len(queries), device=queries.device)
        return ((queries @ keys.T).argmax(1) == own).float()
