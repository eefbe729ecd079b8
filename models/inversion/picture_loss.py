"""The loss of every method that compares renders with pictures, and what one may set of it.

Legend: N batch, A active rows of it, H W image.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from models.errors import ConfigError
from models.losses.perceptual import load_perceptual
from models.settings import NotNegative, check_fields


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """Weights of the loss and the name of its network."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    mse_weight: NotNegative = 1.0
    """Weight of the mean squared error on [-1, 1]."""
    perceptual_weight: NotNegative = 1.0
    """Weight of the perceptual distance."""
    perceptual: str = "auto"
    """Its name: "auto" (LPIPS where its weights are at hand, else ours), "refinery" (ours),
    "lpips-alex", "lpips-vgg", "lpips-squeeze", or "none"."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.mse_weight and not self.has_perceptual:
            raise ConfigError(
                "mse_weight and perceptual_weight must not both be 0: nothing to minimise"
            )

    @property
    def has_perceptual(self) -> bool:
        """Whether the perceptual distance counts."""
        return bool(self.perceptual_weight) and self.perceptual != "none"


class PictureLoss:
    """MSE on [-1, 1] and a perceptual distance, per picture.

    Attributes:
        perceptual: the network, or None where it has no weight.
    """

    def __init__(self, settings: LossSettings) -> None:
        self.settings = settings
        self.perceptual = load_perceptual(settings.perceptual) if settings.has_perceptual else None

    def hashes(self) -> dict[str, str]:
        """As `Method.hashes`."""
        return {} if self.perceptual is None else {self.perceptual.name: self.perceptual.hash}

    def to(self, device: torch.device) -> None:
        if self.perceptual is not None:
            self.perceptual.to(device)

    def features(self, targets: Float[Tensor, "N 3 H W"]) -> list[Tensor]:
        """What the loss compares with; empty without a perceptual distance."""
        if self.perceptual is None:
            return []
        with torch.no_grad():
            return self.perceptual.features(targets)

    def __call__(
        self,
        images: Float[Tensor, "A 3 H W"],
        targets: Float[Tensor, "A 3 H W"],
        features: list[Tensor],
    ) -> tuple[Float[Tensor, " A"], Float[Tensor, " A"]]:
        """The loss of renders against targets, whose perceptual features are given, and the
        perceptual distance in it (0 without one)."""
        loss = self.settings.mse_weight * (images - targets).square().flatten(1).mean(1)
        if self.perceptual is None:
            return loss, torch.zeros_like(loss)
        distance = self.perceptual.compare(self.perceptual.features(images), features)
        return loss + self.settings.perceptual_weight * distance, distance
