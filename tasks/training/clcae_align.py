"""CLCAE, stage 1: align pictures and codes of a generator (arXiv 2211.11448).

Pairs come from the generator, drawn anew for every step: no picture file is read. `images` counts
pairs. Validation asks, among held-out pairs, whether a picture's nearest code is its own.

Legend: N batch, D w_dim, H W image.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from models.encoders.checkpoint import ENCODERS
from models.encoders.contrastive import (
    TOWERS,
    ContrastiveArchitecture,
    ContrastiveTowers,
    info_nce,
)
from models.optim import Ranger
from models.settings import Count, Positive, Several, Share
from models.stylegan2.generator import Generator
from tasks.training.blocks import adopt, descend, for_losses, starting_network
from tasks.training.network import NetworkConfig, NetworkObjective

HELD_OUT_SEED = 20_221
"""Of the pairs that validate; training draws from the run's own seed."""


@dataclass(frozen=True, kw_only=True)
class FitClcaeAlignConfig(NetworkConfig):
    """Settings of one alignment run.

    `start_from` takes an encoder: trunk and head of the image tower begin with its weights where
    name and shape agree; an e4e encoder's first head already finds w.
    """

    data: tuple[str, ...] = ()
    """Not read: every pair is drawn from the generator."""
    images: Count = 100_000
    """Budget: stop after so many pairs, 100,000 different ones in the publication."""
    batch: Several = 256
    """Pairs of a step: each is told apart from batch - 1 others."""
    held_out: Several = 256
    """Pairs that validate."""

    layers: Count = 3
    """Of the latent tower."""
    hidden: Count = 256
    """Width inside its feed-forward parts, 1024 in the published tower."""

    optimiser: Literal["adam", "ranger"] = "adam"
    """"adam" as the paper, "ranger" as the released code."""
    learning_rate: Positive = 1e-3
    """1e-4 as published, for a run many times as long."""
    anneal: Share = 0.5
    """Share of the run, at its end, in which the rate falls to 0 along a cosine."""
    balance: Share = 0.5
    """Share of the pictures' side of the loss."""

    terms: str = "as the generator's"
    """For the card: on what terms the weights may be used."""


class AlignObjective(NetworkObjective[FitClcaeAlignConfig]):
    """Both towers and their optimiser."""

    needs_pictures = False

    unit = "pairs"

    def __init__(self, config: FitClcaeAlignConfig, generator: Generator) -> None:
        super().__init__(config, generator)
        self.average = for_losses(self.statistics.average_image[None])[0].to(config.device)
        self.architecture = self.sized(ContrastiveArchitecture)
        towers = ContrastiveTowers(self.architecture)
        if config.start_from:
            kinds = {**ENCODERS, **TOWERS}
            found, _ = starting_network(config.start_from, kinds, self.generator_hash)
            image = found.image if isinstance(found, ContrastiveTowers) else found
            adopt(towers.image, image.state_dict(), config.start_from)
        make = Ranger if config.optimiser == "ranger" else torch.optim.Adam
        self.trains(towers, make, optimiser=config.optimiser)
        rng = torch.Generator().manual_seed(HELD_OUT_SEED)
        z = torch.randn(config.held_out, generator.z_dim, generator=rng)
        self.held_out = self._pairs(z, "const")

    def step(self, pictures: Float[Tensor, "0 3 H W"], shown: int) -> dict[str, Tensor]:
        """One update from fresh pairs; `pictures` is empty."""
        self.set_rate(shown)
        z = torch.randn(self.config.batch, self.generator.z_dim)
        images, codes = self._embed(*self._pairs(z, "random"))
        loss = info_nce(images, codes, self.network.scale, balance=self.config.balance)
        descend(loss.mean(), list(self.network.parameters()), self.optimizer)
        return {
            "align": loss,
            "top1": _top1(images, codes),
            "temperature": 1 / self.network.scale,
        }

    @torch.no_grad()
    def score(self, pictures: Float[Tensor, "0 3 H W"]) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Loss and accuracy of retrieval among the held-out pairs; `pictures` is empty."""
        self.network.eval()
        images, codes = self._embed(*self.held_out)
        loss = info_nce(images, codes, self.network.scale, balance=self.config.balance)
        self.network.train()
        return {
            "align": loss,
            "top1_code_of_picture": _top1(images, codes),
            "top1_picture_of_code": _top1(codes, images),
        }, []

    def export(self, scores: Mapping[str, float], shown: int) -> Path:
        method = "CLCAE, contrastive alignment (arXiv 2211.11448), tasks.training.clcae_align"
        return self.write("clcae-align", method, scores, shown)

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
        with self.autocast():
            pictures = pictures.contiguous(memory_format=torch.channels_last)
            images = self.network.embed_pictures(pictures, self.average)
        return images, self.network.embed_codes(offsets)


fit = AlignObjective.fit


def _top1(queries: Float[Tensor, "N D"], keys: Float[Tensor, "N D"]) -> Float[Tensor, " N"]:
    """1 where the nearest key is the query's own."""
    with torch.no_grad():
        own = torch.arange(len(queries), device=queries.device)
        return ((queries @ keys.T).argmax(1) == own).float()
