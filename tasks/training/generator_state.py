"""Settings and state of a generator training run: all that an exact resume needs."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from models.errors import AssetError, ConfigError
from models.files import atomically
from models.settings import Count, CountOrNone, NotNegative, Positive, Share
from models.stylegan2.discriminator import Discriminator
from models.stylegan2.generator import Generator, GeneratorArchitecture
from tasks.training.trainer import PRECISIONS, BudgetConfig
from tasks.training.vision import VisionDiscriminator


@dataclass(frozen=True, kw_only=True)
class FitGeneratorConfig(BudgetConfig):
    """Settings of one training run. Images are counted as shown to the discriminator as real.

    With several processes `batch` is that of each, and gradients are averaged.
    """

    images: Count = 1_500_000
    resolution: Count = 64
    widths: dict[int, int] = field(
        default_factory=lambda: {4: 256, 8: 256, 16: 256, 32: 128, 64: 64}
    )
    z_dim: Count = 128
    w_dim: Count = 128
    mapping_layers: Count = 4
    learning_rate: Positive = 2e-3
    """Adam's, of both networks."""
    r1_gamma: NotNegative = 2.0
    """Weight of the gradient penalty on real pictures."""
    r1_interval: Count = 16
    """Steps from one such penalty to the next, which is scaled by as many."""
    path_length_weight: NotNegative = 2.0
    path_length_interval: Count = 4
    """The same of the path length penalty."""
    mixing_probability: Share = 0.9
    """Share of the samples whose rows come from two w."""
    loss: Literal["logistic", "relativistic"] = "logistic"
    """"logistic" is StyleGAN2's non-saturating loss with R1. "relativistic" compares each fake with
    a real picture of the batch, with R1 and R2 (R3GAN, arXiv 2501.05441)."""
    vision: str | None = None
    """File of SqueezeNet v1.1's features, in torchvision's names: a second discriminator looks with
    them (vision-aided training, arXiv 2112.09130). None trains without one."""
    vision_weight: NotNegative = 1.0
    """Weight of what the second discriminator says in the generator's loss."""
    has_noise: bool = True
    """Feed noise to the 3x3 layers. Where it is off their strengths stay 0, and "const", "random"
    and "none" render alike, as in StyleGAN3; at small sizes noise becomes grain."""
    ema_half_life: Count = 10_000
    """Images after which an old weight counts half in the average that is shipped."""
    ada_target: Share = 0.6
    ada_images: CountOrNone = 200_000
    """Images in which the augmentation strength can go from 0 to 1; 0 turns augmentation off."""
    precision: Literal["float32", "bfloat16"] = "bfloat16"
    grow_from: str | None = None
    """Checkpoint of a run at half the resolution to go on from (progressive growing)."""
    checkpoint_images: Count = 10_000
    """Images between checkpoints, sample grids and Frechet distances."""
    frechet_images: CountOrNone = 2_000
    """Samples for the Frechet trunk distance to the training pictures; 0 leaves it out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch % 4 and self.batch > 4:
            raise ConfigError(
                "batch: expected a multiple of 4 (minibatch standard deviation), "
                f"found {self.batch}"
            )


class GeneratorState:
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
            module.compute_dtype = PRECISIONS[config.precision]
            module.memory_format = memory_format
        self.ema.requires_grad_(False)
        self.optimizer_g = _adam(self.g, config.learning_rate, config.path_length_interval)
        self.optimizer_d = _adam(self.d, config.learning_rate, config.r1_interval)
        self.second: VisionDiscriminator | None = None
        self.optimizer_second: torch.optim.Optimizer | None = None
        if config.vision:
            self.second = VisionDiscriminator(config.vision, PRECISIONS[config.precision])
            self.second.to(config.device)
            self.optimizer_second = _adam(self.second.heads, config.learning_rate, 0)
        self.images = 0
        self.step = 0
        # What a recorded step reads and changes, in place: tensors [] on the device.
        self.ada_p, self.real_sign, self.path_length_mean = torch.zeros(3, device=config.device)

    def save(self, path: Path, config: FitGeneratorConfig) -> None:
        saved = {
            "config": json.dumps(asdict(config)),
            "architecture": json.dumps(self.architecture.to_dict()),
            "g": self.g.state_dict(),
            "d": self.d.state_dict(),
            "g_ema": self.ema.state_dict(),
            "optimizer_g": self.optimizer_g.state_dict(),
            "optimizer_d": self.optimizer_d.state_dict(),
            "images": self.images,
            "step": self.step,
            "ada_p": self.ada_p.clone(),
            "path_length_mean": self.path_length_mean.clone(),
            "real_sign": self.real_sign.clone(),
            "rng": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        if self.second is not None and self.optimizer_second is not None:
            saved["second"] = self.second.heads.state_dict()
            saved["optimizer_second"] = self.optimizer_second.state_dict()
        with atomically(path) as file:
            torch.save(saved, file)

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
        optimizers: dict[str, torch.optim.Optimizer] = {
            "optimizer_g": self.optimizer_g,
            "optimizer_d": self.optimizer_d,
        }
        # A run may take a second discriminator on at any time.
        if self.second is not None and self.optimizer_second is not None and "second" in saved:
            self.second.heads.load_state_dict(saved["second"])
            optimizers["optimizer_second"] = self.optimizer_second
        for key, optimizer in optimizers.items():
            for group in saved[key]["param_groups"]:  # of the machine that wrote it
                group["capturable"] = _is_cuda(device)
            optimizer.load_state_dict(saved[key])
        self.images, self.step = saved["images"], saved["step"]
        for name in ("ada_p", "path_length_mean", "real_sign"):
            getattr(self, name).copy_(torch.as_tensor(saved[name]))
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
            nn.init.zeros_(module.layers()[-1][1].weight)  # the last ToRGB
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
        self.images, self.step = saved["images"], saved["step"]
        for name in ("ada_p", "path_length_mean"):
            getattr(self, name).copy_(torch.as_tensor(saved[name]))


def _is_cuda(device: str) -> bool:
    return torch.device(device).type == "cuda"


def _load_overlap(module: nn.Module, state: dict[str, Tensor]) -> None:
    unexpected = module.load_state_dict(state, strict=False).unexpected_keys
    if unexpected:
        raise AssetError(f"cannot grow: the smaller network has unknown parts {unexpected[:4]}")


def _adam(module: nn.Module, learning_rate: float, lazy_interval: int) -> torch.optim.Adam:
    # Lazy regularisation adds a step every `lazy_interval`; StyleGAN2, appendix B, keeps the pace.
    ratio = lazy_interval / (lazy_interval + 1) if lazy_interval else 1.0
    return torch.optim.Adam(
        module.parameters(),
        lr=learning_rate * ratio,
        betas=(0.0, 0.99**ratio),
        eps=1e-8,
        capturable=next(module.parameters()).is_cuda,
    )
