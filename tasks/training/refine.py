"""Train RefineStyle's token network in two stages (on a frozen encoder) or in one.

Losses of the family (Style Transformer, HyperStyle, e4e): MSE + 0.8 perceptual + 0.1 identity on
the refined render, and a penalty on the size of the residual. RefineStyle's own values are not
public (arXiv 2410.06104); what is chosen here is said in docs/methods.md.

Legend: N batch, L num_ws, D w_dim, H W image.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from models.encoders.checkpoint import ENCODERS, load_encoder
from models.encoders.token_network import (
    TOKEN_NETWORKS,
    Grouping,
    Refinement,
    TokenArchitecture,
    TokenNetwork,
)
from models.errors import ConfigError
from models.inversion.base import SampleRng
from models.inversion.e4e import E4e, E4eConfig
from models.optim import Ranger
from models.settings import Count, NotNegative, Share
from models.stylegan2.generator import Generator
from models.stylegan2.residual import Residual
from models.stylegan2.tokens import Factorization, kernel_channels, relative_energy
from tasks.training.blocks import (
    adopt,
    begin_as,
    descend,
    example_edit,
    for_losses,
    starting_network,
)
from tasks.training.losses import delta_penalty
from tasks.training.network import InverterConfig, InverterObjective

logger = logging.getLogger(__name__)

BETAS = (0.95, 0.99)
"""Ranger's, published with 0.999: RAdam's rectification then holds the rate down for most of a
short run (at a third of it after 500 updates); with 0.99 it is at three quarters after 200."""


@dataclass(frozen=True, kw_only=True)
class FitRefineConfig(InverterConfig):
    """Settings of one run of `refinery train refine`. The defaults suit a 64 px generator.

    `start_from` takes a network of this kind, of the same sizes and as many `iterations` or fewer,
    or an encoder, whose trunk it takes.
    """

    stages: Literal["two", "one"] = "two"
    """"two" learns tokens alone, for the codes of a frozen encoder; "one" learns codes and tokens
    in one network."""
    first_stage: str | None = None
    """Encoder file (e4e, lsap, psp) whose codes the two-stage form refines; without it, the bundled
    e4e of the generator."""
    factorization: Factorization = "shared"
    """How two token sets become a kernel: "shared", "per_tap" or "conv_lora"."""
    rank: Count = 4
    """Tokens of each set ("per_tap": for each tap of the kernel)."""
    layers: tuple[int, ...] = ()
    """Indices of the refined 3x3 layers, 0 at 4x4 px; none stands for all."""
    grouping: Grouping = "resolution"
    """Which tokens attend to each other: "resolution", "layer" or "pq"."""
    token_width: Count = 128
    """Width of the tokens inside the blocks."""
    heads: Count = 4
    """Attention heads."""
    feed_forward: Count = 256
    """Hidden width of the blocks' feed-forward layers."""
    depth: Count = 1
    """Blocks of each group."""
    iterations: Count = 1
    """Passes for each batch, of the two-stage form: each sees the render of the one before, and
    adds to its tokens; the loss is the sum over them, and reaches the tokens of all passes before.
    The published network makes one."""
    head_width: Count = 32
    """Channels inside the style heads of the one-stage form."""
    anneal: Share = 0.5
    token_start: Share = 0.1
    """Gain of the tokens at the start of a one-stage run, so that the codes learn first."""
    token_warm_up: Share = 0.1
    """Share of a one-stage run after which that gain has grown to 1."""

    token_weight: NotNegative = 1e-4
    """Of the residual's mean square relative to the modulated kernel's; keeps edits stable."""
    delta_weight: NotNegative = 0.03
    """Of the mean norm of the offsets in units of W's spread, in the one-stage form."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stages == "one" and self.first_stage is not None:
            raise ConfigError('first_stage: stages = "one" has none; leave it out or choose "two"')
        if self.stages == "one" and self.iterations > 1:
            raise ConfigError(
                f'iterations: stages = "one" makes one pass, got {self.iterations}; leave it out '
                'or choose "two"'
            )


class RefineObjective(InverterObjective[FitRefineConfig]):
    """The token network, its optimiser and the frozen first stage."""

    paths = (*InverterObjective.paths, "first_stage")

    def __init__(self, config: FitRefineConfig, generator: Generator) -> None:
        super().__init__(config, generator)
        self.spread, self.edit = self.statistics.w_std, example_edit(generator)
        self.first: E4e | None = None
        if config.stages == "two":
            self.first = E4e(generator, E4eConfig(checkpoint=config.first_stage))
        self.architecture = self.sized(
            TokenArchitecture, channels=tuple(kernel_channels(generator))
        )
        network = TokenNetwork(self.architecture)
        first_stage = self.first and self.first.hashes()["e4e"]
        if config.start_from:
            self._start_from(config.start_from, network, first_stage)
        self.trains(network, partial(Ranger, betas=BETAS), first_stage=first_stage)

    def _start_from(self, path: str, network: TokenNetwork, first_stage: str | None) -> None:
        """Begin as a network of this kind, or with an encoder's trunk."""
        if Path(path).suffix != ".safetensors":
            official = load_encoder(path, self.generator.num_ws, self.generator.w_dim).encoder
            adopt(network.trunk, official.state_dict(), path)
            return
        kinds = {**ENCODERS, **TOKEN_NETWORKS}
        found, card = starting_network(path, kinds, self.generator_hash)
        if not isinstance(found, TokenNetwork):
            adopt(network.trunk, found.state_dict(), path)
            return
        begin_as(network, found, path)
        if card.get("first_stage_sha256") != first_stage:
            logger.warning("start_from %s: it was trained on the codes of another encoder", path)

    # ------------------------------------------------------------------ one update

    def step(self, pictures: Float[Tensor, "N 3 H W"], shown: int) -> dict[str, Tensor]:
        config, share = self.config, self.set_rate(shown)
        self.network.token_gain = self._token_gain(share)
        total, logged = torch.zeros((), device=pictures.device), {}
        for w_plus, found, renders in self._passes(pictures):
            table = self.losses(renders, pictures)
            energy = relative_energy(self.generator, w_plus, found.residual)
            total = total + self.losses.total(table) + config.token_weight * energy.mean()
            logged = {**{k: v.detach() for k, v in table.items()}, "energy": energy}
            if found.deltas is not None:
                logged["delta"] = delta_penalty(found.deltas, self.generator.num_ws, self.spread)
                total = total + config.delta_weight * logged["delta"].mean()
        descend(total, list(self.network.parameters()), self.optimizer)
        return logged

    def _token_gain(self, share: float) -> float:
        config = self.config
        if config.stages == "two" or share >= config.token_warm_up:
            return 1.0
        return config.token_start + (1 - config.token_start) * share / config.token_warm_up

    def _passes(
        self, pictures: Float[Tensor, "N 3 H W"]
    ) -> Iterator[tuple[Float[Tensor, "N L D"], Refinement, Float[Tensor, "N 3 H W"]]]:
        """Codes, what is written for them, and their render, after each pass."""
        first, found = self._first_stage(pictures), None
        seen = first and first[1]
        for _ in range(self.config.iterations):
            with self.autocast():
                found = self.network(pictures, seen, found)
            w_plus = first[0] if first else self.generator.latent_avg + found.offsets()
            renders = self._render(w_plus, found.residual)
            yield w_plus, found, renders
            seen = renders.detach().float()

    def _render(
        self, w_plus: Float[Tensor, "N L D"], residual: Residual | None = None
    ) -> Float[Tensor, "N 3 H W"]:
        """At the losses' size, with the stored noise: it is what refined pictures have."""
        return for_losses(self.generator.synthesis(w_plus, "const", None, residual))

    @torch.no_grad()
    def _first_stage(
        self, pictures: Float[Tensor, "N 3 H W"]
    ) -> tuple[Float[Tensor, "N L D"], Float[Tensor, "N 3 H W"]] | None:
        """Codes of the frozen encoder and their render, at the pictures' size."""
        if self.first is None:
            return None
        rng = SampleRng([0] * len(pictures))
        w_plus = self.first.invert(pictures, None, rng).w_plus
        return w_plus, for_losses(self.generator.synthesis(w_plus)).float()

    # ------------------------------------------------------------------ scores and export

    @torch.no_grad()
    def score(self, pictures: Float[Tensor, "N 3 H W"]) -> tuple[dict[str, Tensor], list[Tensor]]:
        self.network.eval()
        gain, self.network.token_gain = self.network.token_gain, 1.0
        *before, (w_plus, found, renders) = self._passes(pictures)
        residual, plain = found.residual, self._render(w_plus)
        edited = self._render(w_plus + self.edit.to(w_plus), residual)
        self.network.token_gain = gain
        self.network.train()
        scores = self.losses.scores(renders, pictures)
        unrefined = self.losses(plain, pictures)
        scores["first_mse"] = (plain - pictures).square().mean((1, 2, 3))
        if "perceptual" in unrefined:
            scores[f"first_{self.losses.perceptual_name}"] = unrefined["perceptual"]
        for index, (_, _, earlier) in enumerate(before):
            scores[f"mse_pass_{index + 1}"] = (earlier - pictures).square().mean((1, 2, 3))
        scores["energy"] = relative_energy(self.generator, w_plus, residual)
        return scores, [renders, plain, edited]

    def settle(self) -> None:
        self.network.token_gain = 1.0
        super().settle()

    def export(self, scores: Mapping[str, float], shown: int) -> Path:
        return self.write(
            "refine" if self.config.stages == "two" else "refine_one_stage",
            "refine (arXiv 2410.06104), tasks.training.refine",
            scores,
            shown,
            first_stage_sha256=self.identity["first_stage"],
        )


fit = RefineObjective.fit
