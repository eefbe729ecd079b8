"""Train a StyleGAN2 generator: one plain `fit(config)` that runs in a bare Python process.

Non-saturating loss, lazy R1, lazy path-length regularisation, EMA, adaptive discriminator
augmentation (StyleGAN2, arXiv 1912.04958; ADA, arXiv 2006.06676). One batch of fakes serves the
losses of both networks, which are updated together: a pass of each network fewer a step.

Legend: N batch, H W image.
"""

import json
import logging
import math
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from models.losses.frechet import FrechetFeatures, frechet_distance
from models.stylegan2.augment import adjusted_strength, augment
from models.stylegan2.discriminator import Discriminator
from models.stylegan2.generator import Generator
from tasks.training.data import load_pictures
from tasks.training.distributed import (
    average,
    average_gradients,
    is_main_process,
    rank,
    world_size,
)
from tasks.training.generator_state import FitGeneratorConfig, GeneratorState
from tasks.training.grids import save_grid

logger = logging.getLogger(__name__)


def fit(config: FitGeneratorConfig) -> Path:
    """Train until `config.images` were shown; resumes from `<out>/checkpoint.pt`.

    Returns:
        The path of the last checkpoint.

    Raises:
        AssetError: no pictures, or a checkpoint of another architecture.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / "checkpoint.pt"
    pictures = load_pictures(config.data, config.resolution)
    state = _start(config, checkpoint)
    journal = _Journal(config, pictures, state.images) if is_main_process() else None
    started, is_last = time.monotonic(), state.images >= config.images
    while not is_last:
        losses = training_step(state, config, pictures)
        is_late = time.monotonic() - started > config.time_limit_s
        is_last = is_late or state.images >= config.images
        if journal is not None:
            journal.note(state, losses, is_last)
    return checkpoint


def _start(config: FitGeneratorConfig, checkpoint: Path) -> GeneratorState:
    """Fresh, resumed or grown."""
    torch.manual_seed(config.seed)
    state = GeneratorState(config)
    if checkpoint.exists():
        state.load(checkpoint, config.device)
        logger.info("resumed %s at %d images", checkpoint, state.images)
    elif config.grow_from:
        state.grow(Path(config.grow_from))
        logger.info("grew from %s at %d images", config.grow_from, state.images)
    if rank() > 0:
        # Equal weights everywhere, but every process draws its own pictures and codes.
        torch.manual_seed(config.seed + 1_000_003 * rank() + state.images)
    return state


class _Journal:
    """Checkpoints, sample grids, Frechet distances and the progress line, when they are due."""

    def __init__(
        self, config: FitGeneratorConfig, pictures: UInt8[Tensor, "M 3 H W"], first: int
    ) -> None:
        self.config, self.out, self.first = config, Path(config.out), first
        self.started = time.monotonic()
        self.losses: dict[str, Tensor] = {}
        self.frechet = _Frechet(config, pictures) if config.frechet_images else None

    def note(self, state: GeneratorState, losses: dict[str, Tensor], is_last: bool) -> None:
        self.losses |= losses
        if is_last or self._is_due(state, self.config.checkpoint_images):
            state.save(self.out / "checkpoint.pt", self.config)
            save_samples(state.ema, self.out / f"samples-{state.images:08d}.png")
            if self.frechet is not None:
                self.losses["frechet_trunk_distance"] = self.frechet.distance(state.ema)
        if is_last or self._is_due(state, self.config.log_images):
            self._write_line(state)
            self.losses.clear()

    def _is_due(self, state: GeneratorState, interval: int) -> bool:
        before = state.images - self.config.batch * world_size()
        return state.images // interval != before // interval

    def _write_line(self, state: GeneratorState) -> None:
        rate = (state.images - self.first) / (time.monotonic() - self.started)
        row: dict[str, Any] = {
            "images": state.images,
            "images_per_s": round(rate, 2),
            "eta_s": round(max(self.config.images - state.images, 0) / rate),
            "ada_p": round(state.ada_p, 4),
            **{name: round(float(value), 4) for name, value in self.losses.items()},
        }
        with (self.out / "log.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        logger.info(" ".join(f"{name}={value}" for name, value in row.items()))


class _Frechet:
    """Frechet trunk distance between samples and the training pictures, whose moments are kept."""

    def __init__(self, config: FitGeneratorConfig, pictures: UInt8[Tensor, "M 3 H W"]) -> None:
        self.config = config
        self.features = FrechetFeatures().to(config.device)
        self.real = self.features.moments(
            part.to(config.device).float().div_(127.5).sub_(1) for part in pictures.split(64)
        )

    @torch.no_grad()
    def distance(self, generator: Generator) -> Tensor:
        """From fixed seeds, with the stored noise; leaves the random state of training alone."""
        rng = torch.Generator().manual_seed(0)
        z = torch.randn(self.config.frechet_images, generator.z_dim, generator=rng)
        codes = generator.mapping(z.to(self.config.device)).split(64)
        fake = self.features.moments(generator.synthesis(w).float().clamp(-1, 1) for w in codes)
        return torch.tensor(frechet_distance(fake, self.real))


def training_step(
    state: GeneratorState, config: FitGeneratorConfig, pictures: UInt8[Tensor, "M 3 H W"]
) -> dict[str, Tensor]:
    """One update of both networks, the lazy regularisers when they are due, and of the average."""
    g, d = state.g, state.d
    g.requires_grad_(True)
    d.requires_grad_(True)
    real = augment(_draw(pictures, config.batch, config.device), state.ada_p)
    w_plus = _draw_codes(g, config)
    fake = g.synthesis(w_plus, noise="random")
    logits_fake, logits_real = d(augment(fake, state.ada_p)), d(real)
    loss_g = F.softplus(-logits_fake).mean()
    loss_d = F.softplus(logits_fake).mean() + F.softplus(-logits_real).mean()
    _set_gradients(g.parameters(), loss_g, retain_graph=True)
    _set_gradients(d.parameters(), loss_d)
    _step(state.optimizer_g)
    _step(state.optimizer_d)
    losses = {"loss_g": loss_g.detach(), "loss_d": loss_d.detach()}
    state.real_sign.append(logits_real.detach().sign().mean())

    if config.r1_interval and state.step % config.r1_interval == 0:
        penalty = _r1(d, real.detach())
        _set_gradients(d.parameters(), penalty * (config.r1_gamma / 2 * config.r1_interval))
        _step(state.optimizer_d)
        losses["r1"] = penalty.detach()
    if config.path_length_weight and state.step % config.path_length_interval == 0:
        penalty, lengths = _path_length(state, config)
        weight = config.path_length_weight * config.path_length_interval
        _set_gradients(g.parameters(), penalty * weight)
        _step(state.optimizer_g)
        losses["path_length"] = lengths.mean().detach()

    state.step += 1
    state.images += config.batch * world_size()
    _update_average(state, config)
    if config.ada_images and state.step % 4 == 0:
        overfit = float(average(torch.stack(state.real_sign).mean()))
        move = 4 * config.batch * world_size() / config.ada_images
        state.ada_p = adjusted_strength(state.ada_p, overfit, config.ada_target, move)
        state.real_sign.clear()
        losses["real_sign"] = torch.tensor(overfit)
    return losses


def _draw(pictures: UInt8[Tensor, "M 3 H W"], batch: int, device: str) -> Float[Tensor, "N 3 H W"]:
    """Random pictures with random flips, in [-1, 1]."""
    rows = torch.randint(len(pictures), (batch,))
    images = pictures[rows]
    flip = torch.rand(batch) < 0.5
    images[flip] = images[flip].flip(3)
    return images.to(device).float().div_(127.5).sub_(1)


def _draw_codes(g: Generator, config: FitGeneratorConfig) -> Float[Tensor, "N L D"]:
    """w+ of fresh samples; with style mixing, rows from a random one on are a second sample's."""
    z = torch.randn(2, config.batch, config.z_dim).to(config.device)
    w_plus = g.mapping(z[0])
    if float(torch.rand(())) < config.mixing_probability:
        cut = int(torch.randint(1, g.num_ws, ()))
        w_plus = torch.cat([w_plus[:, :cut], g.mapping(z[1])[:, cut:]], dim=1)
    return w_plus


def _r1(d: Discriminator, real: Float[Tensor, "N 3 H W"]) -> Tensor:
    """R1: squared gradient of the logits at the (augmented) real images, mean over the batch."""
    real = real.requires_grad_(True)
    (gradient,) = torch.autograd.grad(d(real).sum(), real, create_graph=True)
    return gradient.square().sum(dim=(1, 2, 3)).mean()


def _path_length(state: GeneratorState, config: FitGeneratorConfig) -> tuple[Tensor, Tensor]:
    """Path-length penalty on half a batch (StyleGAN2, equation 4), with its moving average."""
    half = replace(config, batch=max(config.batch // 2, 1))
    w_plus = _draw_codes(state.g, half)
    image = state.g.synthesis(w_plus, noise="random")
    noise = torch.randn_like(image) / math.sqrt(image.shape[2] * image.shape[3])
    (gradient,) = torch.autograd.grad((image * noise).sum(), w_plus, create_graph=True)
    lengths = gradient.square().sum(2).mean(1).sqrt()
    state.path_length_mean = state.path_length_mean.lerp(lengths.detach().mean(), 0.01)
    return (lengths - state.path_length_mean).square().mean(), lengths


def _set_gradients(
    parameters: Iterable[nn.Parameter], loss: Tensor, retain_graph: bool = False
) -> None:
    parameters = list(parameters)
    gradients = torch.autograd.grad(loss, parameters, retain_graph=retain_graph, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            gradient = gradient.nan_to_num(0.0, posinf=1e5, neginf=-1e5)
        parameter.grad = gradient
    average_gradients(parameters)


def _step(optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def _update_average(state: GeneratorState, config: FitGeneratorConfig) -> None:
    # Early on, average over the last twentieth of the run only (ADA's ramp-up 0.05).
    half_life = min(config.ema_half_life, state.images * 0.05)
    keep = 0.5 ** (config.batch * world_size() / max(half_life, 1e-8))
    for kept, current in zip(state.ema.parameters(), state.g.parameters(), strict=True):
        kept.lerp_(current, 1 - keep)


@torch.no_grad()
def save_samples(
    generator: Generator,
    path: Path,
    rows: int = 6,
    columns: int = 10,
    seed: int = 1,
    truncation_psi: float = 1.0,
) -> None:
    """A PNG grid of samples from fixed seeds, with the stored noise."""
    rng = torch.Generator().manual_seed(seed)
    z = torch.randn(rows * columns, generator.z_dim, generator=rng)
    device = generator.input.input.device
    w_plus = generator.mapping(z.to(device), truncation_psi=truncation_psi)
    images = [generator.synthesis(part).float().cpu() for part in w_plus.split(16)]
    save_grid(torch.cat(images), path, columns)
