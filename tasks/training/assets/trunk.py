"""Train the perceptual trunk by distilling a larger network: one plain, resumable `fit(config)`.

The teacher is SqueezeNet v1.1 (ImageNet features, MIT), read from a file and never shipped. The
student learns, on pairs of a picture and a distorted copy, (a) the teacher's channel-normalised
features, through 1x1 heads that exist in training only, and (b) the teacher's perceptual distance.

Legend: N batch, C channels, H W image.
"""

import copy
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors.torch import save
from scipy.stats import spearmanr
from torch import Tensor, nn

from models.errors import ConfigError
from models.losses.trunk import PerceptualTrunk, tap_distance, unit_normalise
from models.settings import Count, NotNegative, Positive, Several
from tasks.training.blocks import card_settings, descend, settle
from tasks.training.data import load_pictures
from tasks.training.distortions import Distorter
from tasks.training.squeezenet import SqueezeNet
from tasks.training.trainer import Objective, TrainingConfig, draw, to_images

HEADS = {1: (0,), 2: (1,), 3: (2,), 4: (3, 4, 5, 6)}
"""Teacher taps (by place in `tasks.training.squeezenet.TAPS`) that each scale of the student
regresses."""
SIZES = (64, 64, 64, 64, 32, 48, 96, 128)
"""Sides of training pictures, px; one is drawn for every step."""
DISTORTED = 1500
"""Pictures whose principal components the distortions know."""


@dataclass(frozen=True, kw_only=True)
class FitTrunkConfig(TrainingConfig):
    """Settings of one training run. Every pair counts as two images shown."""

    teacher: str
    """safetensors file of SqueezeNet v1.1 features in torchvision's names (Caffe input scaling)."""
    data_large: tuple[str, ...] = ()
    """Parquet files read at 128 px, for steps at 96 and 128 px; without them `data` is enlarged."""
    images: Count = 45_000
    batch: Several = 16
    """Pictures of a step, half of them distorted copies of the other half."""
    learning_rate: Positive = 2e-3
    feature_weight: NotNegative = 1.0
    distance_weight: NotNegative = 1.0
    checkpoint_images: Count = 4_000

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.validation:
            raise ConfigError(
                "validation: expected files of held-out pictures, for the card's scores"
            )


class Student(nn.Module):
    """The trunk, and what training alone needs: heads to the teacher's features, and how much
    larger our distance is than the teacher's."""

    def __init__(self, teacher: SqueezeNet) -> None:
        super().__init__()
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


class TrunkObjective(Objective):
    """The student and its optimiser, on pairs that it draws itself at several sizes."""

    needs_pictures = False
    resolution = 64

    def __init__(self, config: FitTrunkConfig) -> None:
        super().__init__(config)
        self.pictures = {64: load_pictures(config.data, 64)}
        large = config.data_large
        self.pictures[128] = load_pictures(large, 128) if large else self.pictures[64]
        some = self.pictures[64][:: max(1, len(self.pictures[64]) // DISTORTED)]
        self.distorter = Distorter(to_images(some, "cpu"))
        self.held_out = to_images(load_pictures(config.validation, 64), "cpu")
        self.teacher = SqueezeNet(config.teacher).to(config.device)
        self.student = Student(self.teacher).to(config.device)
        self.optimizer = torch.optim.Adam(
            self.student.parameters(), lr=config.learning_rate, betas=(0.9, 0.98)
        )
        self.parts = {"student": self.student, "optimizer": self.optimizer}
        architecture = self.student.trunk.architecture.to_dict()
        self.identity = {"architecture": architecture, "batch": config.batch}

    def step(self, pictures: Float[Tensor, "0 3 H W"], shown: int) -> dict[str, Tensor]:
        """One update on pairs at one random size; `pictures` is empty."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * _schedule(shown / config.images)
        size = SIZES[int(torch.randint(len(SIZES), ()))]
        clean = draw(self.pictures[64 if size <= 64 else 128], config.batch // 2, "cpu")
        if clean.shape[2] != size:
            mode = "area" if size < clean.shape[2] else "bilinear"
            clean = F.interpolate(clean, size=(size, size), mode=mode)
        distorted = self.distorter(clean, torch.default_generator)
        both = torch.cat([clean, distorted]).to(config.device)
        targets = self.teacher(both)
        with self.autocast():
            taps = [tap.float() for tap in self.student.trunk(both)]
        ours = tap_distance(*_halves([unit_normalise(tap) for tap in taps]))
        theirs = tap_distance(*_halves(targets))
        # Ratios matter: a small difference should be as well ordered as a large one.
        gap = (ours + 2e-3).log() - (theirs + 2e-3).log() - self.student.log_ratio
        losses = {"features": self._features(taps, targets), "distance": gap.square().mean()}
        total = config.feature_weight * losses["features"]
        total = total + config.distance_weight * losses["distance"]
        descend(total, list(self.student.parameters()), self.optimizer)
        return losses

    @torch.no_grad()
    def score(self, pictures: Float[Tensor, "0 3 H W"]) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Rank correlations on pairs of the first held-out pictures; no grid."""
        found = self._evaluated(self.held_out[: self.config.validation_images], is_detailed=False)
        return {k: torch.tensor([v]) for k, v in found.items() if k != "pairs"}, []

    def settle(self) -> None:
        settle(self.student.trunk)

    def export(self, scores: Mapping[str, float], shown: int) -> Path:
        """Write `trunk.safetensors` (half precision) and its card `trunk.json`, with the scores of
        all held-out pictures."""
        config, trunk = self.config, self.student.trunk
        path = Path(config.out) / "trunk.safetensors"
        path.write_bytes(save({name: value.half() for name, value in trunk.state_dict().items()}))
        settings = card_settings(config, ("teacher",))
        settings["data_large"] = [Path(item).name for item in config.data_large]
        card = {
            "kind": "perceptual_trunk",
            "column": "trunk_distance",
            "architecture": trunk.architecture.to_dict(),
            "parameters": sum(p.numel() for p in trunk.parameters()),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "images_shown": shown,
            "teacher": "SqueezeNet v1.1, ImageNet features from the Caffe model (MIT)",
            "settings": settings,
            "scores": self._evaluated(self.held_out),
        }
        path.with_suffix(".json").write_text(json.dumps(card, indent=1) + "\n")
        return path

    def _evaluated(self, held_out: Tensor, is_detailed: bool = True) -> dict[str, Any]:
        """On the CPU, where the distortions are."""
        trunk, teacher = copy.deepcopy(self.student.trunk).cpu(), copy.deepcopy(self.teacher).cpu()
        return evaluate(trunk, teacher, self.distorter, held_out, is_detailed=is_detailed)

    def _features(self, taps: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
        """Mean over teacher taps of the squared difference of unit vectors, 0..4."""
        losses = []
        for scale, group in HEADS.items():
            for tap in group:
                size = targets[tap].shape[2:]
                x = F.interpolate(taps[scale], size=size, mode="bilinear", align_corners=False)
                found = unit_normalise(self.student.heads[f"{scale}_{tap}"](x))
                losses.append((found - targets[tap]).square().sum(1).mean())
        return torch.stack(losses).mean()


fit = TrunkObjective.fit


def _halves(taps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    pairs = [tap.chunk(2) for tap in taps]
    return [a for a, _ in pairs], [b for _, b in pairs]


def _schedule(progress: float) -> float:
    """Linear warm-up over 2 %, then half a cosine to zero."""
    return min(progress / 0.02 + 0.05, 1.0) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


@torch.no_grad()
def evaluate(
    trunk: PerceptualTrunk,
    teacher: SqueezeNet,
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
            "spearman": _spearman(theirs, ours),
            "spearman_mse": _spearman(theirs, mse),
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


def _spearman(a: Float[Tensor, " N"], b: Float[Tensor, " N"]) -> float:
    found: Any = spearmanr(a, b)
    return round(float(found.statistic), 4)
