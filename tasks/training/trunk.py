"""Train the perceptual trunk by distilling a larger network: one plain, resumable `fit(config)`.

The teacher is SqueezeNet v1.1 (ImageNet features, MIT), read from a file and never shipped. The
student learns, on pairs of a picture and a distorted copy, (a) the teacher's channel-normalised
features, through 1x1 heads that exist in training only, and (b) the teacher's perceptual distance.

Legend: N batch, C channels, H W image.
"""

import hashlib
import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from safetensors.torch import load_file, save
from torch import Tensor, nn

from models.errors import AssetError
from models.files import atomically
from models.losses.torchvision_shim import ensure_torchvision
from models.losses.trunk import PerceptualTrunk, tap_distance, unit_normalise
from models.settings import Count, NotNegative, Positive
from tasks.training.data import load_pictures
from tasks.training.distortions import Distorter
from tasks.training.trainer import BudgetConfig

logger = logging.getLogger(__name__)

TEACHER_TAPS = (1, 4, 7, 9, 10, 11, 12)
"""Modules of SqueezeNet v1.1 whose outputs LPIPS compares."""
TEACHER_MEAN = (103.939, 116.779, 123.68)
"""Caffe's mean of blue, green, red in 0..255."""
HEADS = {1: (0,), 2: (1,), 3: (2,), 4: (3, 4, 5, 6)}
"""Teacher taps (by place in TEACHER_TAPS) that each scale of the student regresses."""
SIZES = (64, 64, 64, 64, 32, 48, 96, 128)
"""Sides of training pictures, px; one is drawn for every step."""


@dataclass(frozen=True, kw_only=True)
class FitTrunkConfig(BudgetConfig):
    """Settings of one training run. Every pair counts as two images shown."""

    validation: tuple[str, ...]
    """Parquet files of held-out pictures, for the scores only."""
    teacher: str
    """safetensors file of SqueezeNet v1.1 features in torchvision's names (Caffe input scaling)."""
    data_large: tuple[str, ...] = ()
    """Parquet files read at 128 px, for steps at 96 and 128 px; without them `data` is enlarged."""
    images: Count = 45_000
    batch: Count = 8
    """Pairs per step at 64 px; larger pictures come in smaller batches."""
    learning_rate: Positive = 2e-3
    feature_weight: NotNegative = 1.0
    distance_weight: NotNegative = 1.0
    checkpoint_images: Count = 4_000


class Teacher(nn.Module):
    """SqueezeNet v1.1 up to its last fire module, on pictures in [-1, 1].

    Raises:
        AssetError: the file is missing or holds another network.
    """

    mean: Tensor

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        ensure_torchvision()
        from torchvision.models import squeezenet1_1

        if not Path(path).is_file():
            raise AssetError(
                f"trunk teacher: {path} is missing; give the SqueezeNet v1.1 features as "
                f"safetensors in torchvision's names"
            )
        net = squeezenet1_1(weights=None)
        try:
            state = {k.removeprefix("features."): v for k, v in load_file(path).items()}
            net.features.load_state_dict(state)
        except RuntimeError as error:
            raise AssetError(f"trunk teacher: {path} is not SqueezeNet v1.1: {error}") from error
        self.layers = net.features
        self.register_buffer("mean", torch.tensor(TEACHER_MEAN)[:, None, None])
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "N 3 H W"]) -> list[Tensor]:
        """Unit-normalised features of the seven taps, finest first."""
        x = (images.flip(1) + 1) * 127.5 - self.mean
        taps = []
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index in TEACHER_TAPS:
                taps.append(x * torch.rsqrt(x.square().sum(1, keepdim=True) + 1e-10))
        return taps


class _State:
    """Everything that a checkpoint must hold for an exact resume."""

    def __init__(self, config: FitTrunkConfig, teacher: Teacher) -> None:
        torch.manual_seed(config.seed)
        self.trunk = PerceptualTrunk()
        with torch.no_grad():
            taps = teacher(torch.zeros(1, 3, 64, 64))
        widths = self.trunk.architecture.widths
        self.heads = nn.ModuleDict(
            {
                f"{scale}_{tap}": nn.Conv2d(widths[scale], taps[tap].shape[1], 1)
                for scale, group in HEADS.items()
                for tap in group
            }
        )
        self.log_ratio = nn.Parameter(torch.zeros(()))
        modules = [*self.trunk.parameters(), *self.heads.parameters(), self.log_ratio]
        self.optimizer = torch.optim.Adam(modules, lr=config.learning_rate, betas=(0.9, 0.98))
        self.rng = torch.Generator().manual_seed(config.seed)
        self.images = 0

    def save(self, path: Path) -> None:
        saved = {
            "trunk": self.trunk.state_dict(),
            "heads": self.heads.state_dict(),
            "log_ratio": self.log_ratio.detach(),
            "optimizer": self.optimizer.state_dict(),
            "rng": self.rng.get_state(),
            "images": self.images,
        }
        with atomically(path) as file:
            torch.save(saved, file)

    def load(self, path: Path) -> None:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        try:
            self.trunk.load_state_dict(saved["trunk"])
            self.heads.load_state_dict(saved["heads"])
        except (KeyError, RuntimeError) as error:
            raise AssetError(
                f"{path}: not a checkpoint of this trunk ({error}); choose another `out`"
            ) from error
        self.log_ratio.data.copy_(saved["log_ratio"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.rng.set_state(saved["rng"])
        self.images = saved["images"]


def fit(config: FitTrunkConfig) -> dict[str, Any]:
    """Train until `config.images` were shown, resuming from `<out>/checkpoint.pt`; score and save.

    Returns:
        The card written to `<out>/trunk.json`; empty when the time limit came first.

    Raises:
        AssetError: no pictures, no teacher, or a checkpoint of another network.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    teacher = Teacher(config.teacher)
    pictures = {64: load_pictures(config.data, 64)}
    pictures[128] = load_pictures(config.data_large, 128) if config.data_large else pictures[64]
    distorter = Distorter(to_float(pictures[64][:: max(1, len(pictures[64]) // 1500)]))
    state = _State(config, teacher)
    checkpoint = out / "checkpoint.pt"
    if checkpoint.exists():
        state.load(checkpoint)
        logger.info("resumed %s at %d images", checkpoint, state.images)
    losses: list[dict[str, float]] = []
    started, first, last_saved = time.monotonic(), state.images, state.images
    while state.images < config.images:
        losses.append(training_step(state, config, teacher, distorter, pictures))
        is_late = time.monotonic() - started > config.time_limit_s
        if state.images - last_saved >= config.checkpoint_images or is_late:
            last_saved = state.images
            state.save(checkpoint)
            rate = (state.images - first) / (time.monotonic() - started)
            row: dict[str, float] = {"images": state.images, "images_per_s": round(rate, 1)}
            for name in losses[0]:
                row[name] = round(sum(step[name] for step in losses) / len(losses), 4)
            losses.clear()
            with (out / "log.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            logger.info(" ".join(f"{name}={value}" for name, value in row.items()))
        if is_late:
            return {}
    state.save(checkpoint)
    held_out = to_float(load_pictures(config.validation, 64))
    scores = evaluate(state.trunk, teacher, distorter, held_out)
    return save_trunk(state.trunk, out, config, state.images, scores)


def training_step(
    state: _State,
    config: FitTrunkConfig,
    teacher: Teacher,
    distorter: Distorter,
    pictures: dict[int, UInt8[Tensor, "M 3 H W"]],
) -> dict[str, float]:
    """One update on pairs at one random size."""
    size = SIZES[int(torch.randint(len(SIZES), (), generator=state.rng))]
    batch = max(2, min(config.batch * 2, round(config.batch * (64 / size) ** 2)))
    clean = _draw(pictures[64 if size <= 64 else 128], batch, size, state.rng)
    both = torch.cat([clean, distorter(clean, state.rng)])
    targets = teacher(both)
    taps = state.trunk(both)
    loss_features = _feature_loss(state, taps, targets)
    ours = tap_distance(*_halves([unit_normalise(tap) for tap in taps]))
    theirs = tap_distance(*_halves(targets))
    # Ratios matter: a small difference should be as well ordered as a large one.
    gap = (ours + 2e-3).log() - (theirs + 2e-3).log() - state.log_ratio
    loss_distance = gap.square().mean()
    loss = config.feature_weight * loss_features + config.distance_weight * loss_distance
    for group in state.optimizer.param_groups:
        group["lr"] = config.learning_rate * _schedule(state.images / config.images)
    state.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    state.optimizer.step()
    state.images += 2 * batch
    return {
        "loss_features": float(loss_features.detach()),
        "loss_distance": float(loss_distance.detach()),
    }


def _feature_loss(state: _State, taps: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Mean over teacher taps of the squared difference of unit vectors, 0..4."""
    losses = []
    for scale, group in HEADS.items():
        for tap in group:
            size = targets[tap].shape[2:]
            x = F.interpolate(taps[scale], size=size, mode="bilinear", align_corners=False)
            found = unit_normalise(state.heads[f"{scale}_{tap}"](x))
            losses.append((found - targets[tap]).square().sum(1).mean())
    return torch.stack(losses).mean()


def _halves(taps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    pairs = [tap.chunk(2) for tap in taps]
    return [a for a, _ in pairs], [b for _, b in pairs]


def _schedule(progress: float) -> float:
    """Linear warm-up over 2 %, then half a cosine to zero."""
    return min(progress / 0.02 + 0.05, 1.0) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def _draw(
    pictures: UInt8[Tensor, "M 3 H W"], batch: int, size: int, rng: torch.Generator
) -> Float[Tensor, "N 3 h w"]:
    rows = torch.randint(len(pictures), (batch,), generator=rng)
    images = to_float(pictures[rows])
    flip = torch.rand(batch, generator=rng) < 0.5
    images[flip] = images[flip].flip(3)
    if images.shape[2] == size:
        return images
    mode = "area" if size < images.shape[2] else "bilinear"
    return F.interpolate(images, size=(size, size), mode=mode)


def to_float(pictures: UInt8[Tensor, "N 3 H W"]) -> Float[Tensor, "N 3 H W"]:
    """0..255 to [-1, 1]."""
    return pictures.float().div_(127.5).sub_(1)


@torch.no_grad()
def evaluate(
    trunk: PerceptualTrunk,
    teacher: Teacher,
    distorter: Distorter,
    held_out: Float[Tensor, "M 3 H W"],
    seed: int = 1,
    is_detailed: bool = True,
) -> dict[str, Any]:
    """Spearman correlation with the teacher's distance on held-out pairs, ours and that of MSE.

    Returns:
        `pairs`, `spearman` and `spearman_mse` over mixed distortions; where `is_detailed` the same
        at other sizes (`at_32px`, `at_128px`, enlarged), and per kind of distortion.
    """

    def score(clean: Tensor, distorted: Tensor) -> dict[str, float]:
        columns: list[list[Tensor]] = [[], [], []]
        for a, b in zip(clean.split(32), distorted.split(32), strict=True):
            columns[0].append(tap_distance(teacher(a), teacher(b)))
            taps = [[unit_normalise(tap) for tap in trunk(x)] for x in (a, b)]
            columns[1].append(tap_distance(*taps))
            columns[2].append((a - b).square().mean((1, 2, 3)))
        theirs, ours, mse = (torch.cat(column) for column in columns)
        return {
            "spearman": round(spearman(theirs, ours), 4),
            "spearman_mse": round(spearman(theirs, mse), 4),
        }

    rng = torch.Generator().manual_seed(seed)
    clean = held_out.repeat(3, 1, 1, 1)
    scores: dict[str, Any] = {"pairs": len(clean), **score(clean, distorter(clean, rng))}
    if not is_detailed:
        return scores
    for size in (32, 128):
        resized = F.interpolate(held_out, size=(size, size), mode="bilinear", antialias=True)
        scores[f"at_{size}px"] = score(resized, distorter(resized, rng))
    scores["by_distortion"] = {
        kind: score(held_out, distorter.apply(kind, held_out, rng)) for kind in distorter.kinds
    }
    return scores


def spearman(a: Float[Tensor, " N"], b: Float[Tensor, " N"]) -> float:
    """Rank correlation (no ties expected)."""
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def save_trunk(
    trunk: PerceptualTrunk, out: Path, config: FitTrunkConfig, images: int, scores: dict[str, Any]
) -> dict[str, Any]:
    """Write `trunk.safetensors` (half precision) and its card `trunk.json`; return the card."""
    path = out / "trunk.safetensors"
    path.write_bytes(save({name: value.half() for name, value in trunk.state_dict().items()}))
    settings = asdict(config)
    for key in ("data", "data_large", "validation"):
        settings[key] = [Path(item).name for item in settings[key]]
    for key in ("out", "time_limit_s", "threads"):
        del settings[key]
    card = {
        "kind": "perceptual_trunk",
        "column": "trunk_distance",
        "architecture": trunk.architecture.to_dict(),
        "parameters": sum(p.numel() for p in trunk.parameters()),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "images_shown": images,
        "teacher": "SqueezeNet v1.1, ImageNet features from the Caffe model (MIT)",
        "settings": {**settings, "teacher": Path(config.teacher).name},
        "scores": scores,
    }
    (out / "trunk.json").write_text(json.dumps(card, indent=1) + "\n")
    logger.info("wrote %s: spearman=%s", path, scores["spearman"])
    return card
