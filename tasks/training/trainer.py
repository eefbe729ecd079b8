"""The loop that every encoder training shares: draw, step, log, validate, checkpoint, resume.

What is trained is an `Objective`; the loop knows nothing of its networks. A run continues exactly
where its last checkpoint stood: weights, optimisers, replay pools and random numbers.

Legend: M pictures held in memory, N batch, H W image.
"""

import json
import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Self

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from models.errors import AssetError, ConfigError
from models.files import atomically
from models.pictures import save_grid
from models.settings import Count, CountOrNone, NotNegative, Share, check_fields
from tasks.training.data import load_pictures
from tasks.training.distributed import is_main_process
from tasks.training.views import disturb

logger = logging.getLogger(__name__)

PRECISIONS: dict[str, torch.dtype | None] = {"float32": None, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """Settings of every training: what it reads and writes, for how long, on what device."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    data: tuple[str, ...]
    """Parquet files with an `image` column; pictures are resized to the network's resolution."""
    out: str
    """Folder for checkpoint, log, grids and the finished weights."""
    images: Count
    """Budget: stop after so many pictures shown. Schedules are shares of it."""
    batch: Count = 16
    threads: CountOrNone = 0
    """CPU threads; 0 keeps torch's choice."""
    seed: int = 0
    checkpoint_images: Count = 20_000
    """Checkpoint and validate after so many pictures."""
    time_limit_s: NotNegative = math.inf
    """Write a checkpoint and return after so many seconds; run again to go on."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the convolutions while training."""
    device: str = "cpu"
    log_images: Count = 1_000

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(BudgetConfig):
    """Settings of the loop, part of every encoder's config."""

    images: Count = 120_000
    validation: tuple[str, ...] = ()
    """Parquet files with pictures that are never trained on; empty skips validation."""
    validation_last: CountOrNone = 0
    """Instead of `validation`: so many pictures at the end of `data` that are never trained on.
    Where the files are sorted, by age say, the last are not like the rest."""
    disturbed: Share = 0.0
    """Share of the pictures shown that are moved, turned, scaled and recoloured a little; a few
    thousand pictures are otherwise known by heart after some ten passes."""
    validation_images: Count = 128
    """Pictures of `validation` that are scored on the way; the end scores all of them."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.validation_last and self.validation:
            raise ConfigError(
                f"validation_last: expected 0, or pictures of `data` where `validation` is empty; "
                f"got {self.validation_last} with {len(self.validation)} files of validation"
            )


class Stateful(Protocol):
    """Anything that a checkpoint can hold: modules, optimisers, pools."""

    def state_dict(self) -> Any: ...
    def load_state_dict(self, state: Any, /) -> Any: ...


class Objective(ABC):
    """What one training run optimises.

    Attributes:
        dtype: of the convolutions; None for float32.
        resolution: size of the pictures it takes, px.
        parts: everything that a resumed run must find again, by name.
        identity: JSON-ready values that a checkpoint must agree with to be resumed (architecture,
            generator).
        needs_pictures: False for an objective that makes what it learns from itself: no file is
            read, `step` and `score` get no pictures, and there is no grid.
    """

    needs_pictures: ClassVar[bool] = True

    resolution: int
    parts: Mapping[str, Stateful]
    identity: Mapping[str, Any]

    def __init__(self, config: Any) -> None:
        self.config, self.dtype = config, PRECISIONS[config.precision]

    @classmethod
    def fit(cls, config: Any) -> Path:
        """Train until `config.images` were shown, resuming from `<out>/checkpoint.pt`.

        Returns:
            What `export` has written, or the checkpoint where the time limit came first.

        Raises:
            AssetError: what it starts from, its pictures or their labels are missing, or the
                checkpoint is another run's.
        """
        set_up(config)
        return train(cls.of(config), config)

    @classmethod
    def of(cls, config: Any) -> Self:
        """The objective of a run's settings."""
        return cls(config)

    def autocast(self) -> torch.autocast:
        """The run's precision, for what computes with the network."""
        kind = torch.device(self.config.device).type
        return torch.autocast(kind, self.dtype, enabled=self.dtype is not None)

    @abstractmethod
    def step(self, pictures: Float[Tensor, "N 3 H W"], shown: int) -> dict[str, Tensor]:
        """One update from pictures in [-1, 1] after `shown` pictures; losses to log, by name."""

    @abstractmethod
    def score(self, pictures: Float[Tensor, "N 3 H W"]) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Metrics [N] by name, and the columns of a grid (the reconstruction first).

        Draws no random numbers and leaves the networks in training mode.
        """

    @abstractmethod
    def settle(self) -> None:
        """Give the networks the exact values that `export` writes; the last scores are theirs."""

    @abstractmethod
    def export(self, scores: Mapping[str, float], shown: int) -> Path:
        """Write the finished weights with their card."""


def train(objective: Objective, config: TrainingConfig) -> Path:
    """Run an objective to its budget, resuming from `<out>/checkpoint.pt` where there is one.

    Returns:
        The path of the exported weights, or of the checkpoint where the time limit came first.

    Raises:
        AssetError: no pictures, or a checkpoint of another run.
    """
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = out / "checkpoint.pt"
    pictures = held_out = torch.empty(0, 3, objective.resolution, objective.resolution).byte()
    if objective.needs_pictures:
        pictures, held_out = _pictures(config, objective.resolution)
        pictures = pictures.to(config.device)
    shown = 0
    if checkpoint.exists():
        shown = load_checkpoint(checkpoint, objective)
        logger.info("resumed %s at %d images", checkpoint, shown)
    progress = _Progress(out, config, shown)
    while shown < config.images:
        images = draw(pictures, config.batch, config.device)
        losses = objective.step(disturb(images, config.disturbed), shown)
        before, shown = shown, shown + config.batch
        progress.add(losses, shown)
        if not is_main_process():
            continue
        if _crossed(before, shown, config.log_images):
            progress.log(shown)
        is_late = progress.seconds > config.time_limit_s
        if is_late or _crossed(before, shown, config.checkpoint_images):
            save_checkpoint(checkpoint, objective, config, shown)
            if held_out is not None:
                scores = validate(objective, held_out[: config.validation_images], config, shown)
                progress.log_scores(scores, shown)
        if is_late:
            return checkpoint
    if not is_main_process():
        return checkpoint
    save_checkpoint(checkpoint, objective, config, shown)
    objective.settle()
    scores = {} if held_out is None else validate(objective, held_out, config, shown)
    progress.log_scores(scores, shown)
    return objective.export(scores, shown)


def set_up(config: TrainingConfig) -> None:
    """Device, threads and seed; call it before the networks are built."""
    use_device(config.device, config.threads)
    torch.manual_seed(config.seed)
    is_slow = config.device == "cpu" and not has_bfloat16_instructions()
    if config.precision == "bfloat16" and is_slow:
        logger.warning(
            "precision = bfloat16: this CPU has no instructions for it (AVX-512 BF16 or AMX) and "
            "emulates them; set precision = float32, which was ten times as fast on such a one"
        )


def use_device(device: str, threads: int) -> None:
    """What a training process asks of its machine; shapes are fixed, and TF32 is exact enough."""
    if threads:
        torch.set_num_threads(threads)
    if torch.device(device).type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True


def has_bfloat16_instructions() -> bool:
    """Whether this CPU computes in bfloat16 or emulates it."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def draw(pictures: UInt8[Tensor, "M 3 H W"], batch: int, device: str) -> Float[Tensor, "N 3 H W"]:
    """Random pictures with random flips, in [-1, 1], channels last; none where there are none."""
    if not len(pictures):
        return to_images(pictures, device)
    rows = torch.randint(len(pictures), (batch,), device=pictures.device)
    images = pictures[rows]
    is_flipped = torch.rand(batch, 1, 1, 1, device=pictures.device) < 0.5
    return to_images(torch.where(is_flipped, images.flip(3), images), device)


def to_images(pictures: UInt8[Tensor, "N 3 H W"], device: str) -> Float[Tensor, "N 3 H W"]:
    """0..255 to [-1, 1], channels last."""
    images = pictures.to(device).float().div_(127.5).sub_(1)
    return images.contiguous(memory_format=torch.channels_last)


def validate(
    objective: Objective, pictures: UInt8[Tensor, "M 3 H W"], config: TrainingConfig, shown: int
) -> dict[str, float]:
    """Mean metrics over held-out pictures, and a grid of the first of them as a PNG."""
    found: dict[str, list[Tensor]] = {}
    grid = torch.empty(0)
    for part in pictures.split(32):
        images = to_images(part, config.device)
        metrics, results = objective.score(images)
        for name, values in metrics.items():
            found.setdefault(name, []).append(values.float().cpu())
        if len(part) and not grid.numel():
            grid = torch.stack([images, *results], 1)[:24].float().cpu()  # [24 columns 3 H W]
    if grid.numel():
        path = Path(config.out) / f"validation-{shown:08d}.png"
        save_grid(grid.flatten(0, 1), path, columns=4 * grid.shape[1])
    return {name: float(torch.cat(values).mean()) for name, values in found.items()}


def save_checkpoint(path: Path, objective: Objective, config: TrainingConfig, shown: int) -> None:
    """Write everything an exact resume needs, atomically."""
    saved = {
        "config": json.dumps(asdict(config)),
        "identity": json.dumps(objective.identity, sort_keys=True),
        "parts": {name: part.state_dict() for name, part in objective.parts.items()},
        "images": shown,
        "rng": torch.get_rng_state(),
        "rng_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    with atomically(path) as file:
        torch.save(saved, file)


def load_checkpoint(path: Path, objective: Objective) -> int:
    """Put a checkpoint's state into the objective; the number of pictures shown so far.

    Raises:
        AssetError: it belongs to another architecture or generator; the message names the settings.
    """
    saved = torch.load(path, map_location="cpu", weights_only=True)
    before, now = json.loads(saved["identity"]), dict(objective.identity)
    now = json.loads(json.dumps(now))
    different = sorted(key for key in before | now if before.get(key) != now.get(key))
    if different:
        raise AssetError(
            f"{path}: it cannot be resumed, these settings differ: "
            + "; ".join(f"{k} was {before.get(k)}, is {now.get(k)}" for k in different)
            + ". Choose another `out` or the old settings"
        )
    for name, part in objective.parts.items():
        part.load_state_dict(saved["parts"][name])
    torch.set_rng_state(saved["rng"])
    if saved["rng_cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(saved["rng_cuda"])
    return int(saved["images"])


def _pictures(config: TrainingConfig, resolution: int) -> tuple[Tensor, Tensor | None]:
    """[M 3 H W] to train on, and those to validate with, as bytes."""
    pictures = load_pictures(config.data, resolution)
    if config.validation:
        return pictures, load_pictures(config.validation, resolution)
    last = config.validation_last
    if not last:
        return pictures, None
    if last >= len(pictures):
        raise ConfigError(f"validation_last: {last} of {len(pictures)} pictures leave none")
    return pictures[:-last], pictures[-last:]


class _Progress:
    """Rates and averaged losses, as a log line and as a row of log.jsonl."""

    def __init__(self, out: Path, config: TrainingConfig, shown: int) -> None:
        self.path, self.config = out / "log.jsonl", config
        self.started, self.first = time.monotonic(), shown
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def add(self, losses: Mapping[str, Tensor], shown: int) -> None:
        for name, value in losses.items():
            value = value.detach().float().mean()
            self.sums[name] = self.sums.get(name, torch.zeros_like(value)) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def log(self, shown: int) -> None:
        rate = (shown - self.first) / max(self.seconds, 1e-9)
        losses = {name: float(total) / self.counts[name] for name, total in self.sums.items()}
        bad = [name for name, value in losses.items() if not math.isfinite(value)]
        if bad:
            raise FloatingPointError(
                f"training diverged: {', '.join(bad)} not finite at {shown} images; lower the "
                "learning rate and resume from the last checkpoint"
            )
        self._write(
            {
                "images": shown,
                "images_per_s": round(rate, 1),
                "eta_s": round((self.config.images - shown) / max(rate, 1e-9)),
                **{name: _short(value) for name, value in losses.items()},
            }
        )
        self.sums.clear()
        self.counts.clear()

    def log_scores(self, scores: Mapping[str, float], shown: int) -> None:
        if scores:
            row = {f"validation_{name}": _short(value) for name, value in scores.items()}
            self._write({"images": shown, **row})

    def _write(self, row: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        logger.info(" ".join(f"{name}={value}" for name, value in row.items()))


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _crossed(before: int, after: int, interval: int) -> bool:
    return before // interval != after // interval
