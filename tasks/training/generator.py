"""Train a StyleGAN2 generator: one plain `fit(config)` that runs in a bare Python process.

Non-saturating loss, lazy R1, lazy path-length regularisation, EMA, adaptive discriminator
augmentation (StyleGAN2, arXiv 1912.04958; ADA, arXiv 2006.06676). One batch of fakes serves the losses of
both networks, which are updated together: a generator pass and a discriminator pass fewer a step.

Legend: N batch, H W image.
"""

import json
import logging
import math
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from models.errors import AssetError, ConfigError
from models.stylegan2.augment import adjusted_strength, augment
from models.stylegan2.discriminator import Discriminator
from models.stylegan2.generator import Generator, GeneratorArchitecture
from tasks.training.data import load_pictures
from tasks.training.distributed import average_gradients, is_main_process
from tasks.training.grids import save_grid

logger = logging.getLogger(__name__)

DTYPES = {"float32": None, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class FitGeneratorConfig:
    """Settings of one training run. Images are counted as shown to the discriminator as real."""

    __pydantic_config__ = {"extra": "forbid"}

    data: tuple[str, ...]
    """Parquet files with an `image` column; every picture is resized to `resolution`."""
    out: str
    """Folder for checkpoint, log and sample grids."""
    images: int = 1_500_000
    """Stop after so many images shown, over all phases."""
    resolution: int = 64
    widths: dict[int, int] = field(
        default_factory=lambda: {4: 256, 8: 256, 16: 256, 32: 128, 64: 64}
    )
    z_dim: int = 128
    w_dim: int = 128
    mapping_layers: int = 4
    batch: int = 16
    learning_rate: float = 2e-3
    r1_gamma: float = 2.0
    r1_interval: int = 16
    path_length_weight: float = 2.0
    path_length_interval: int = 4
    mixing_probability: float = 0.9
    ema_half_life: int = 10_000
    """Images after which an old weight counts half in the average that is shipped."""
    ada_target: float = 0.6
    ada_images: int = 200_000
    """Images in which the augmentation strength can go from 0 to 1; 0 turns augmentation off."""
    precision: str = "bfloat16"
    device: str = "cpu"
    threads: int = 0
    """CPU threads; 0 keeps torch's choice."""
    seed: int = 0
    grow_from: str | None = None
    """Checkpoint of a run at half the resolution to go on from (progressive growing)."""
    checkpoint_images: int = 10_000
    log_images: int = 1_000
    time_limit_s: float = math.inf
    """Write a checkpoint and return after so many seconds; run again to go on."""

    def __post_init__(self) -> None:
        if self.precision not in DTYPES:
            raise ConfigError(
                f"precision: expected one of {sorted(DTYPES)}, found {self.precision!r}"
            )
        if self.batch % 4 and self.batch > 4:
            raise ConfigError(
                f"batch: expected a multiple of 4 (minibatch standard deviation), found {self.batch}"
            )


class _State:
    """Everything that a checkpoint must hold for an exact resume."""

    def __init__(self, config: FitGeneratorConfig) -> None:
        widths = {k: v for k, v in config.widths.items() if k <= config.resolution}
        self.architecture = GeneratorArchitecture(
            resolution=config.resolution,
            widths=widths,
            z_dim=config.z_dim,
            w_dim=config.w_dim,
            mapping_layers=config.mapping_layers,
        )
        self.g = Generator(self.architecture)
        self.d = Discriminator(config.resolution, widths)
        self.ema = Generator(self.architecture)
        self.ema.load_state_dict(self.g.state_dict())
        memory_format = torch.channels_last
        for module in (self.g, self.d, self.ema):
            module.to(config.device)
            module.compute_dtype = DTYPES[config.precision]
            module.memory_format = memory_format
        self.ema.requires_grad_(False)
        self.optimizer_g = _adam(self.g, config.learning_rate, config.path_length_interval)
        self.optimizer_d = _adam(self.d, config.learning_rate, config.r1_interval)
        self.images = 0
        self.step = 0
        self.ada_p = 0.0
        self.path_length_mean = torch.zeros((), device=config.device)
        self.real_sign: list[Tensor] = []

    def save(self, path: Path, config: FitGeneratorConfig) -> None:
        temporary = path.with_suffix(".tmp")
        torch.save(
            {
                "config": json.dumps(asdict(config)),
                "architecture": json.dumps(self.architecture.to_dict()),
                "g": self.g.state_dict(),
                "d": self.d.state_dict(),
                "g_ema": self.ema.state_dict(),
                "optimizer_g": self.optimizer_g.state_dict(),
                "optimizer_d": self.optimizer_d.state_dict(),
                "images": self.images,
                "step": self.step,
                "ada_p": self.ada_p,
                "path_length_mean": self.path_length_mean,
                "real_sign": self.real_sign,
                "rng": torch.get_rng_state(),
                "rng_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            },
            temporary,
        )
        os.replace(temporary, path)

    def load(self, path: Path, device: str) -> None:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if json.loads(saved["architecture"]) != self.architecture.to_dict():
            raise AssetError(
                f"{path}: the checkpoint was trained with another architecture "
                f"({saved['architecture']}); choose another `out` or the settings it was made with"
            )
        self.g.load_state_dict(saved["g"])
        self.d.load_state_dict(saved["d"])
        self.ema.load_state_dict(saved["g_ema"])
        self.optimizer_g.load_state_dict(saved["optimizer_g"])
        self.optimizer_d.load_state_dict(saved["optimizer_d"])
        self.images, self.step, self.ada_p = saved["images"], saved["step"], saved["ada_p"]
        self.path_length_mean = saved["path_length_mean"].to(device)
        self.real_sign = [sign.to(device) for sign in saved["real_sign"]]
        torch.set_rng_state(saved["rng"])
        if saved["rng_cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(saved["rng_cuda"])

    def grow(self, path: Path) -> None:
        """Start from a run at half the resolution: shared layers are copied, the image is kept.

        The new ToRGB starts at zero, so the first image is the old one, upsampled.
        """
        saved = torch.load(path, map_location="cpu", weights_only=True)
        for module, key in ((self.g, "g"), (self.ema, "g_ema")):
            _load_overlap(module, saved[key])
            nn.init.zeros_(module.to_rgbs[-1].conv.weight)
        # The old blocks move one place down; the old from-RGB is dropped.
        shifted: dict[str, Tensor] = {}
        for name, value in saved["d"].items():
            if name.startswith("convs."):
                index, rest = name.removeprefix("convs.").split(".", 1)
                if index != "0":
                    shifted[f"convs.{int(index) + 1}.{rest}"] = value
            else:
                shifted[name] = value
        _load_overlap(self.d, shifted)
        self.images, self.step, self.ada_p = saved["images"], saved["step"], saved["ada_p"]
        self.path_length_mean = saved["path_length_mean"].to(self.path_length_mean.device)


def _load_overlap(module: nn.Module, state: dict[str, Tensor]) -> None:
    unexpected = module.load_state_dict(state, strict=False).unexpected_keys
    if unexpected:
        raise AssetError(f"cannot grow: the smaller network has unknown parts {unexpected[:4]}")


def _adam(module: nn.Module, learning_rate: float, lazy_interval: int) -> torch.optim.Adam:
    # Lazy regularisation adds one step every `lazy_interval`; StyleGAN2, appendix B, keeps the pace.
    ratio = lazy_interval / (lazy_interval + 1) if lazy_interval else 1.0
    return torch.optim.Adam(
        module.parameters(), lr=learning_rate * ratio, betas=(0.0, 0.99**ratio), eps=1e-8
    )


def fit(config: FitGeneratorConfig) -> Path:
    """Train until `config.images` were shown, resuming from `<out>/checkpoint.pt` where there is one.

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
    torch.manual_seed(config.seed)
    state = _State(config)
    if checkpoint.exists():
        state.load(checkpoint, config.device)
        logger.info("resumed %s at %d images", checkpoint, state.images)
    elif config.grow_from:
        state.grow(Path(config.grow_from))
        logger.info("grew from %s at %d images", config.grow_from, state.images)
    started, first = time.monotonic(), state.images
    losses: dict[str, Tensor] = {}
    while state.images < config.images:
        losses |= training_step(state, config, pictures)
        if _crossed(state.images, config.batch, config.log_images) and is_main_process():
            _log_progress(out, state, config, losses, time.monotonic() - started, first)
        is_late = time.monotonic() - started > config.time_limit_s
        is_due = _crossed(state.images, config.batch, config.checkpoint_images)
        if (is_due or is_late) and is_main_process():
            state.save(checkpoint, config)
            save_samples(state.ema, out / f"samples-{state.images:08d}.png")
        if is_late:
            return checkpoint
    if is_main_process():
        state.save(checkpoint, config)
        save_samples(state.ema, out / f"samples-{state.images:08d}.png")
    return checkpoint


def training_step(
    state: _State, config: FitGeneratorConfig, pictures: UInt8[Tensor, "M 3 H W"]
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
    state.images += config.batch
    _update_average(state, config)
    if config.ada_images and state.step % 4 == 0:
        overfit = float(torch.stack(state.real_sign).mean())
        move = 4 * config.batch / config.ada_images
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
    """w+ of fresh samples; with style mixing, rows from a random one on come from a second sample."""
    z = torch.randn(2, config.batch, config.z_dim).to(config.device)
    w_plus = g.mapping(z[0])
    if float(torch.rand(())) < config.mixing_probability:
        cut = int(torch.randint(1, g.num_ws, ()))
        w_plus = torch.cat([w_plus[:, :cut], g.mapping(z[1])[:, cut:]], dim=1)
    return w_plus


def _r1(d: Discriminator, real: Float[Tensor, "N 3 H W"]) -> Tensor:
    """R1: the squared gradient of the logits at the (augmented) real images, mean over the batch."""
    real = real.requires_grad_(True)
    (gradient,) = torch.autograd.grad(d(real).sum(), real, create_graph=True)
    return gradient.square().sum(dim=(1, 2, 3)).mean()


def _path_length(state: _State, config: FitGeneratorConfig) -> tuple[Tensor, Tensor]:
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
def _update_average(state: _State, config: FitGeneratorConfig) -> None:
    # Early on, average over the last twentieth of the run only (ADA's ramp-up 0.05).
    half_life = min(config.ema_half_life, state.images * 0.05)
    keep = 0.5 ** (config.batch / max(half_life, 1e-8))
    for average, current in zip(state.ema.parameters(), state.g.parameters(), strict=True):
        average.lerp_(current, 1 - keep)


def _crossed(images: int, batch: int, interval: int) -> bool:
    return images // interval != (images - batch) // interval


def _log_progress(
    out: Path,
    state: _State,
    config: FitGeneratorConfig,
    losses: dict[str, Tensor],
    seconds: float,
    first: int,
) -> None:
    rate = (state.images - first) / seconds
    row: dict[str, Any] = {
        "images": state.images,
        "images_per_s": round(rate, 2),
        "eta_s": round((config.images - state.images) / rate),
        "ada_p": round(state.ada_p, 4),
        **{name: round(float(value), 4) for name, value in losses.items()},
    }
    with (out / "log.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    logger.info(" ".join(f"{name}={value}" for name, value in row.items()))


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
