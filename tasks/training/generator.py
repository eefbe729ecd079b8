"""Train a StyleGAN2 generator: one plain `fit(config)` that runs in a bare Python process.

Non-saturating loss, lazy R1, lazy path-length regularisation, EMA, adaptive discriminator
augmentation (StyleGAN2, arXiv 1912.04958; ADA, arXiv 2006.06676), or R3GAN's relativistic loss with
R1 and R2 (arXiv 2501.05441); a second discriminator where asked (arXiv 2112.09130). One batch of
fakes serves the losses of all networks, which are updated together: a pass of each fewer a step.

Legend: N batch, H W image.
"""

# torch keeps its fused list operations behind names with an underscore.
# pyright: reportPrivateImportUsage=false

import json
import logging
import math
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from models.adaptation.adversary import discriminator_loss, generator_loss
from models.losses.frechet import FrechetFeatures, frechet_distance
from models.pictures import save_grid
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
from tasks.training.replay import Replayed
from tasks.training.trainer import use_device

logger = logging.getLogger(__name__)

ADA_INTERVAL = 4
"""Steps between two moves of the augmentation's strength."""


def fit(config: FitGeneratorConfig) -> Path:
    """Train until `config.images` were shown; resumes from `<out>/checkpoint.pt`.

    Returns:
        The path of the last checkpoint.

    Raises:
        AssetError: no pictures, or a checkpoint of another architecture.
    """
    use_device(config.device, config.threads)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / "checkpoint.pt"
    pictures = load_pictures(config.data, config.resolution)
    state = _start(config, checkpoint)
    training = GeneratorTraining(state, config, pictures)
    journal = _Journal(config, pictures, state.images) if is_main_process() else None
    started, is_last = time.monotonic(), state.images >= config.images
    while not is_last:
        losses = training.step()
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
            "ada_p": round(float(state.ada_p), 4),
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


class GeneratorTraining:
    """The updates of one run, in pieces of fixed shape that a GPU replays as CUDA graphs.

    Args:
        pictures: the training set as bytes; it moves to the device as a whole.
    """

    def __init__(
        self, state: GeneratorState, config: FitGeneratorConfig, pictures: UInt8[Tensor, "M 3 H W"]
    ) -> None:
        self.state, self.config = state, config
        self.pictures = pictures.to(config.device)
        is_recorded = self.pictures.is_cuda and world_size() == 1
        self.both = Replayed(self._update_both, is_recorded)
        self.gradient_penalty = Replayed(self._update_gradient_penalty, is_recorded)
        self.path_length = Replayed(self._update_path_length, is_recorded)
        self.augmentation = Replayed(self._update_augmentation, is_recorded)
        state.g.requires_grad_(True)
        state.d.requires_grad_(True)

    def step(self) -> dict[str, Tensor]:
        """One update of both networks, the lazy regularisers when they are due, and of the average.

        Returns:
            Losses by name, valid until the next step.
        """
        state, config = self.state, self.config
        losses = self.both()
        if config.r1_interval and state.step % config.r1_interval == 0:
            losses = losses | self.gradient_penalty()
        if config.path_length_weight and state.step % config.path_length_interval == 0:
            losses = losses | self.path_length()
        state.step += 1
        state.images += config.batch * world_size()
        _update_average(state, config)
        if config.ada_images and state.step % ADA_INTERVAL == 0:
            losses = losses | self.augmentation()
        return losses

    # ------------------------------------------------------------------ the pieces

    def _update_both(self) -> dict[str, Tensor]:
        state, config = self.state, self.config
        g, d = state.g, state.d
        real = self._real()
        fake = self._augmented(g.synthesis(self._codes(config.batch), noise=self._noise))
        logits_fake, logits_real = d(fake), d(real)
        if config.loss == "logistic":
            loss_g = F.softplus(-logits_fake).mean()
            loss_d = F.softplus(logits_fake).mean() + F.softplus(-logits_real).mean()
            told_apart = logits_real
        else:
            told_apart = logits_real - logits_fake
            loss_g, loss_d = F.softplus(told_apart).mean(), F.softplus(-told_apart).mean()
        found = {"loss_g": loss_g.detach(), "loss_d": loss_d.detach()}
        if state.second is not None and state.optimizer_second is not None:
            seen_fake, seen_real = state.second(fake), state.second(real)
            loss_second = discriminator_loss(seen_real, seen_fake)
            loss_g = loss_g + config.vision_weight * generator_loss(seen_fake).mean()
            _set_gradients(state.second.heads.parameters(), loss_second, retain_graph=True)
            found["loss_second"] = loss_second.detach()
        _set_gradients(g.parameters(), loss_g, retain_graph=True)
        _set_gradients(d.parameters(), loss_d)
        for optimizer in (state.optimizer_g, state.optimizer_d, state.optimizer_second):
            if optimizer is not None:
                _step(optimizer)
        state.real_sign.add_(told_apart.detach().sign().mean() / ADA_INTERVAL)
        return found

    def _update_gradient_penalty(self) -> dict[str, Tensor]:
        """Lazy R1, and for the relativistic loss R2 too."""
        state, config = self.state, self.config
        found = {"r1": _squared_gradient(state.d, self._real())}
        if config.loss == "relativistic":
            with torch.no_grad():
                fake = state.g.synthesis(self._codes(config.batch), noise=self._noise)
            found["r2"] = _squared_gradient(state.d, self._augmented(fake))
        penalty = torch.stack(list(found.values())).sum()
        _set_gradients(state.d.parameters(), penalty * (config.r1_gamma / 2 * config.r1_interval))
        _step(state.optimizer_d)
        return {name: value.detach() for name, value in found.items()}

    def _update_path_length(self) -> dict[str, Tensor]:
        """Path-length penalty on half a batch (StyleGAN2, equation 4), with its moving average."""
        state, config = self.state, self.config
        w_plus = self._codes(max(config.batch // 2, 1))
        image = state.g.synthesis(w_plus, noise=self._noise)
        noise = torch.randn_like(image) / math.sqrt(image.shape[2] * image.shape[3])
        (gradient,) = torch.autograd.grad((image * noise).sum(), w_plus, create_graph=True)
        lengths = gradient.square().sum(2).mean(1).sqrt()
        mean = state.path_length_mean
        mean.lerp_(lengths.detach().mean(), 0.01)
        penalty = (lengths - mean.clone()).square().mean()
        weight = config.path_length_weight * config.path_length_interval
        _set_gradients(state.g.parameters(), penalty * weight)
        _step(state.optimizer_g)
        return {"path_length": lengths.mean().detach()}

    def _update_augmentation(self) -> dict[str, Tensor]:
        state, config = self.state, self.config
        overfit = average(state.real_sign)
        move = ADA_INTERVAL * config.batch * world_size() / config.ada_images
        state.ada_p.copy_(adjusted_strength(state.ada_p, overfit, config.ada_target, move))
        found = {"real_sign": overfit.clone()}
        state.real_sign.zero_()
        return found

    # ------------------------------------------------------------------ what they draw

    @property
    def _noise(self) -> Literal["random", "none"]:
        return "random" if self.config.has_noise else "none"

    def _augmented(self, images: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N 3 H W"]:
        return augment(images, self.state.ada_p if self.config.ada_images else 0.0)

    def _real(self) -> Float[Tensor, "N 3 H W"]:
        """Random pictures with random flips, in [-1, 1], augmented."""
        batch, device = self.config.batch, self.pictures.device
        images = self.pictures[torch.randint(len(self.pictures), (batch,), device=device)]
        is_flipped = torch.rand(batch, device=device)[:, None, None, None] < 0.5
        images = torch.where(is_flipped, images.flip(3), images)
        return self._augmented(images.float().div_(127.5).sub_(1))

    def _codes(self, count: int) -> Float[Tensor, "N L D"]:
        """w+ of fresh samples; with style mixing, rows from a random one on are a second one's."""
        g, device = self.state.g, self.pictures.device
        z = torch.randn(2 * count, g.z_dim, device=device)
        w_plus, other = g.mapping(z).chunk(2)
        cut = torch.rand(count, 1, device=device) * (g.num_ws - 1)
        is_mixed = torch.rand(count, 1, device=device) < self.config.mixing_probability
        is_other = is_mixed & (torch.arange(g.num_ws, device=device) > cut)
        return torch.where(is_other[:, :, None], other, w_plus)


def _squared_gradient(d: Discriminator, images: Float[Tensor, "N 3 H W"]) -> Tensor:
    """R1 or R2: squared gradient of the logits at (augmented) images, mean over the batch."""
    images = images.detach().requires_grad_(True)
    (gradient,) = torch.autograd.grad(d(images).sum(), images, create_graph=True)
    return gradient.square().sum(dim=(1, 2, 3)).mean()


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
    torch._foreach_lerp_(list(state.ema.parameters()), list(state.g.parameters()), 1 - keep)


@torch.no_grad()
def save_samples(generator: Generator, path: Path) -> None:
    """A PNG grid of 6 x 10 samples from fixed seeds, with the stored noise."""
    z = torch.randn(60, generator.z_dim, generator=torch.Generator().manual_seed(1))
    w_plus = generator.mapping(z.to(generator.input.input.device))
    images = [generator.synthesis(part).float().cpu() for part in w_plus.split(16)]
    save_grid(torch.cat(images), path, columns=10)
