"""Train an e4e encoder: one plain, resumable `fit(config)` that runs in a bare Python process.

Losses and schedule of e4e (arXiv 2102.02766): MSE + perceptual + identity on the render, a penalty
on the offsets, a latent discriminator, and offsets that open row by row. Two additions for short
runs: a learning rate that falls at the end, and, as an option, pictures drawn from the generator,
whose codes are known and need no render. The published schedule (300,000 steps) is scaled to the
budget.

Legend: N batch, Y synthetic pictures of it, L num_ws, D w_dim, S open offsets, H W image.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from models.checkpoints.load import load_generator
from models.encoders.checkpoint import build_encoder, load_encoder, save_encoder
from models.encoders.e4e import Encoder4Editing
from models.encoders.latent_discriminator import CodePool, LatentDiscriminator
from models.encoders.psp import EncoderArchitecture
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
    settle,
)
from tasks.training.losses import PictureLosses, code_distance, delta_penalty
from tasks.training.schedules import annealed, open_offsets
from tasks.training.trainer import PRECISIONS, Objective, TrainingConfig, set_up, train

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FitEncoderConfig(TrainingConfig):
    """Settings of one e4e training run. The defaults suit a 64 px generator on a CPU."""

    generator: str
    """A bundled name or a checkpoint file; it stays as it is."""

    width: int = 24
    """Channels of the first stage, 64 in the published encoder."""
    units: tuple[int, int, int, int] = (2, 2, 2, 2)
    """Residual units of the stages, (3, 4, 14, 3) in the published encoder."""
    head_width: int = 64
    """Channels inside the style heads, 512 in the published encoder."""
    stem_stride: int = 2
    """1 in the published encoder; 2 saves the convolutions at full size."""
    start_from: str | None = None
    """Encoder file of the same sizes whose weights the run starts from, for example one that was
    trained with an earlier state of the generator."""

    learning_rate: float = 3e-3
    """Ranger's; 1e-4 as published, for 2.4 million pictures."""
    anneal: float = 0.4
    """Share of the run, at its end, in which the rate falls to 0 along a cosine; 0 as published."""
    open_start: float = 20 / 300
    """Share of the run after which the first offset opens (step 20,000 of 300,000)."""
    open_end: float = 52 / 300
    """Share of the run after which the last offset opens; the others at equal distances between."""

    mse_weight: float = 1.0
    perceptual_weight: float = 0.8
    perceptual: str = "auto"
    """Name for `load_perceptual`, or "none"."""
    identity: str | None = None
    """File of ArcFace weights for the identity loss."""
    identity_weight: float = 0.1
    delta_weight: float = 2e-4
    """Of the summed norms of the offsets."""
    adversarial_weight: float = 0.1
    """Of the latent discriminator's verdict on the codes; 0 trains without it."""
    discriminator_learning_rate: float = 2e-4
    """Adam's; 2e-5 as published, for a run about ten times as long."""
    r1_gamma: float = 10.0
    r1_interval: int = 16
    pool: int = 50
    """Codes in each replay pool of the latent discriminator."""

    synthetic_fraction: float = 0.0
    """Share of each batch that is drawn from the generator: learned by its code, not rendered. It
    costs real pictures: at 8,000 shown (32 px) a share of 0.25 raised the held-out MSE by 16 %."""
    code_weight: float = 0.5
    """Of their squared code error, in units of the spread of W."""

    terms: str = "as the training data's"
    """For the card: on what terms the weights may be used."""

    def __post_init__(self) -> None:
        TrainingConfig.__post_init__(self)
        if not self.learning_rate > 0:
            raise ConfigError(f"learning_rate must be > 0, got {self.learning_rate}")
        if not 0 <= self.open_start <= self.open_end <= 1:
            raise ConfigError(
                f"open_start and open_end: expected 0 <= open_start <= open_end <= 1, "
                f"got {self.open_start} and {self.open_end}"
            )
        for name in ("anneal", "synthetic_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be in 0..1, got {getattr(self, name)}")
        if self.batch - self.num_synthetic < 2:
            raise ConfigError(
                f"batch {self.batch} with synthetic_fraction {self.synthetic_fraction} leaves "
                f"{self.batch - self.num_synthetic} real pictures, expected at least 2"
            )

    @property
    def num_synthetic(self) -> int:
        """Generated pictures of each batch."""
        return round(self.batch * self.synthetic_fraction)


def fit(config: FitEncoderConfig) -> Path:
    """Train until `config.images` were shown, resuming from `<out>/checkpoint.pt`.

    Returns:
        `<out>/e4e.safetensors` (half precision, its card `e4e.json` beside it), or the checkpoint
        where the time limit came first.

    Raises:
        AssetError: no generator, no pictures, or a checkpoint of another run.
    """
    set_up(config)
    return train(E4eObjective(config, load_generator(config.generator)), config)


class E4eObjective(Objective):
    """Encoder, latent discriminator, their optimisers and pools."""

    def __init__(self, config: FitEncoderConfig, generator: Generator) -> None:
        self.config, self.dtype = config, PRECISIONS[config.precision]
        self.generator_hash = weights_hash(generator)
        self.spread = statistics_for(generator).w_std
        self.generator = prepared(generator, config.device, self.dtype)
        self.resolution = min(generator.resolution, LOSS_SIZE)
        self.architecture = EncoderArchitecture(
            num_ws=generator.num_ws,
            w_dim=generator.w_dim,
            input_size=self.resolution,
            width=config.width,
            units=config.units,
            head_width=config.head_width,
            stem_stride=config.stem_stride,
        )
        encoder = build_encoder(self.architecture)
        assert isinstance(encoder, Encoder4Editing)
        if config.start_from:
            _start_from(encoder, config.start_from)
        self.encoder = encoder.to(config.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = Ranger(self.encoder.parameters(), lr=config.learning_rate)
        self.discriminator = LatentDiscriminator(generator.w_dim).to(config.device)
        self.optimizer_d = torch.optim.Adam(
            self.discriminator.parameters(), lr=config.discriminator_learning_rate
        )
        self.pool_real, self.pool_fake = CodePool(config.pool), CodePool(config.pool)
        self.losses = PictureLosses(
            {
                "mse": config.mse_weight,
                "perceptual": config.perceptual_weight,
                "identity": config.identity_weight,
            },
            config.perceptual,
            config.identity,
            config.device,
            self.dtype,
        )
        self.parts = {
            "encoder": self.encoder,
            "optimizer": self.optimizer,
            "discriminator": self.discriminator,
            "optimizer_d": self.optimizer_d,
            "pool_real": self.pool_real,
            "pool_fake": self.pool_fake,
        }
        self.identity = {
            "architecture": self.architecture.to_dict(),
            "generator_hash": self.generator_hash,
            "batch": config.batch,
        }

    # ------------------------------------------------------------------ one update

    def step(self, pictures: Float[Tensor, "N 3 H W"], shown: int) -> dict[str, Tensor]:
        share = shown / self.config.images
        self.encoder.stage = open_offsets(
            share, self.architecture.num_ws, self.config.open_start, self.config.open_end
        )
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * annealed(share, self.config.anneal)
        num_synthetic = self.config.num_synthetic
        real = pictures[num_synthetic:]
        known, drawn = self._draw(num_synthetic)
        w, deltas = self._encode(torch.cat([drawn, real]) if num_synthetic else real)
        w_plus = absolute_codes(w, deltas, self.generator)
        table = self.losses(self._render(w_plus[num_synthetic:], "random"), real)
        total = self.losses.total(table)
        logged = {name: value.detach() for name, value in table.items()}
        if num_synthetic:
            code = code_distance(w_plus[:num_synthetic], known, self.spread)
            total = total + self.config.code_weight * code.mean()
            logged["code"] = code
        if self.encoder.stage:
            logged["delta"] = delta_penalty(deltas)
            total = total + self.config.delta_weight * logged["delta"].mean()
        codes = w_plus[:, : self.encoder.stage + 1]
        if self.config.adversarial_weight:
            self.discriminator.requires_grad_(False)
            adversarial = F.softplus(-self.discriminator(codes.flatten(0, 1))).mean()
            self.discriminator.requires_grad_(True)
            total = total + self.config.adversarial_weight * adversarial
            logged["adversarial"] = adversarial
        descend(total, list(self.encoder.parameters()), self.optimizer)
        if self.config.adversarial_weight:
            logged |= self._discriminator_step(codes.detach(), shown // self.config.batch)
        logged["rows"] = torch.tensor(float(self.encoder.stage + 1))
        return logged

    def _discriminator_step(self, codes: Float[Tensor, "N S D"], step: int) -> dict[str, Tensor]:
        """One update of the latent discriminator on one open row of every picture."""
        n, rows, _ = codes.shape
        fake = self.pool_fake.query(codes[torch.arange(n), torch.randint(rows, (n,))])
        with torch.no_grad():
            drawn = self.generator.mapping(self._noise(n))[:, 0]
        real = self.pool_real.query(drawn)
        verdict = self.discriminator(torch.cat([fake, real]))
        loss = F.softplus(verdict[:n]).mean() + F.softplus(-verdict[n:]).mean()
        total, logged = loss, {"discriminator": loss}
        if self.config.r1_interval and step % self.config.r1_interval == 0:
            real.requires_grad_(True)
            (gradient,) = torch.autograd.grad(
                self.discriminator(real).sum(), real, create_graph=True
            )
            penalty = gradient.square().sum(1).mean()
            total = total + self.config.r1_gamma / 2 * self.config.r1_interval * penalty
            logged["r1"] = penalty
        descend(total, list(self.discriminator.parameters()), self.optimizer_d)
        return logged

    @torch.no_grad()
    def _draw(self, count: int) -> tuple[Float[Tensor, "Y L D"], Float[Tensor, "Y 3 H W"]]:
        """Codes of the mapping network and their pictures, as a picture file would hold them."""
        if not count:
            return torch.empty(0), torch.empty(0)
        w_plus = self.generator.mapping(self._noise(count))
        return w_plus, self._render(w_plus, "random").clamp(-1, 1)

    def _noise(self, count: int) -> Float[Tensor, "Y Z"]:
        return torch.randn(count, self.generator.z_dim).to(self.config.device)

    def _encode(
        self, pictures: Float[Tensor, "N 3 H W"]
    ) -> tuple[Float[Tensor, "N D"], Float[Tensor, "N S D"]]:
        with torch.autocast(pictures.device.type, self.dtype, enabled=self.dtype is not None):
            return self.encoder.split(pictures.contiguous(memory_format=torch.channels_last))

    def _render(self, w_plus: Tensor, noise: Any) -> Float[Tensor, "N 3 H W"]:
        return for_losses(self.generator.synthesis(w_plus, noise))

    # ------------------------------------------------------------------ scores and export

    @torch.no_grad()
    def score(self, pictures: Float[Tensor, "N 3 H W"]) -> tuple[dict[str, Tensor], list[Tensor]]:
        self.encoder.eval()
        w_plus = absolute_codes(*self._encode(pictures), self.generator)
        renders = self._render(w_plus, "const")
        self.encoder.train()
        scores = self.losses(renders, pictures)
        if "perceptual" in scores:
            scores[self.losses.perceptual_name] = scores.pop("perceptual")
        offsets = (w_plus - w_plus[:, :1]).square().sum(2).sqrt().mean(1)
        scores["offset_norm"] = offsets / self.spread
        return scores, [renders]

    def settle(self) -> None:
        self.encoder.stage = self.architecture.num_ws - 1
        self.dtype = self.losses.dtype = self.generator.compute_dtype = None
        settle(self.encoder)

    def export(self, scores: Mapping[str, float], shown: int) -> Path:
        config = self.config
        card = {
            "kind": "e4e",
            "generator_hash": self.generator_hash,
            "terms": config.terms,
            "provenance": {
                "method": "e4e (arXiv 2102.02766), tasks.training.encoder",
                "generator": Path(config.generator).stem,
                "images_shown": shown,
                "perceptual": self.losses.perceptual_name,
                "settings": card_settings(config, ("generator", "identity", "start_from")),
            },
            "scores": rounded_scores(scores),
        }
        return save_encoder(self.encoder, Path(config.out) / "e4e.safetensors", card)


def absolute_codes(
    w: Float[Tensor, "N D"], deltas: Float[Tensor, "N S D"], generator: Generator
) -> Float[Tensor, "N L D"]:
    """latent_avg + w on every row, plus the open offsets on rows 1..S."""
    rest = generator.num_ws - 1 - deltas.shape[1]
    offsets = F.pad(deltas, (0, 0, 1, rest))
    return generator.latent_avg + w[:, None] + offsets


def _start_from(encoder: Encoder4Editing, path: str) -> None:
    arch = encoder.architecture
    loaded = load_encoder(path, arch.num_ws, arch.w_dim).encoder
    if loaded.architecture != arch:
        raise AssetError(
            f"start_from {path}: its sizes are {loaded.architecture.to_dict()}, this run's are "
            f"{arch.to_dict()}: choose another file or the same width, units and head_width"
        )
    encoder.load_state_dict(loaded.state_dict())
