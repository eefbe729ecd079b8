"""Descent on tensors of a whole batch at once, every row as if it were alone.

Loss, best value, stop and failure are per picture; a row that is done costs nothing any more.

Legend: N batch, A active rows of it, C H W image.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from models.inversion.base import Inversion
from models.losses.perceptual import load_perceptual
from models.optim import RowAdam
from models.stylegan2.residual import LowRank


class PictureLoss:
    """MSE on [-1, 1] and a perceptual distance, per picture.

    Args:
        perceptual: name for `load_perceptual`, or "none".
    """

    def __init__(self, mse_weight: float, perceptual_weight: float, perceptual: str) -> None:
        self.mse_weight, self.perceptual_weight = mse_weight, perceptual_weight
        self.perceptual = None
        if perceptual_weight and perceptual != "none":
            self.perceptual = load_perceptual(perceptual)

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
    ) -> Float[Tensor, " A"]:
        """The loss of renders against targets, whose perceptual features are given."""
        loss = self.mse_weight * (images - targets).square().flatten(1).mean(1)
        if self.perceptual is not None:
            distance = self.perceptual.compare(self.perceptual.features(images), features)
            loss = loss + self.perceptual_weight * distance
        return loss


class SearchSettings(Protocol):
    """What every method that searches lets one set."""

    @property
    def steps(self) -> int: ...
    @property
    def mse_weight(self) -> float: ...
    @property
    def perceptual_weight(self) -> float: ...
    @property
    def perceptual(self) -> str: ...
    @property
    def stop_loss(self) -> float: ...
    @property
    def patience(self) -> int: ...


class RowSearch(ABC):
    """The state of one batch: what is active, what is optimised, what was best.

    Args:
        name: the method's, for the reasons of failures.
        settings: steps, stops and patience.
        picture_loss: weights and networks of `loss`.
        images: targets in [-1, 1].
        start: the doors to start from; its failed rows are left alone.
        tensors: [N ...] each, what is optimised.
    """

    def __init__(
        self,
        name: str,
        settings: SearchSettings,
        picture_loss: PictureLoss,
        images: Float[Tensor, "N 3 H W"],
        start: Inversion,
        tensors: Sequence[Float[Tensor, "N ..."]],
    ) -> None:
        self.name, self.settings, self.picture_loss = name, settings, picture_loss
        self.start, self.images = start, images
        self.targets, self.target_features = images, picture_loss.features(images)
        self.adam = RowAdam([t.clone() for t in tensors])
        self.best = [t.clone() for t in self.adam.tensors]
        self.best_loss = torch.full((len(images),), math.inf, device=images.device)
        self.best_step = torch.zeros(len(images), dtype=torch.long, device=images.device)
        self.failures = dict(start.failures)
        self.rows = torch.arange(len(images), device=images.device)
        self._shrink(torch.tensor([i not in self.failures for i in range(len(images))]))

    # ------------------------------------------------------------------ what a method gives

    @abstractmethod
    def rate(self, step: int) -> float:
        """Adam's rate of the update `step`, 0-based."""

    @abstractmethod
    def loss(self, tensors: list[Tensor]) -> Float[Tensor, " A"]:
        """The loss that ranks, of the active rows."""

    def perturbed(self, tensors: list[Tensor], step: int) -> list[Tensor]:
        """What is rendered at a step in place of the tensors themselves."""
        return tensors

    def penalty(self, tensors: list[Tensor]) -> Float[Tensor, " A"] | float:
        """What is minimised beside the loss and does not rank."""
        return 0.0

    def tidy(self) -> None:  # noqa: B027 - most searches have nothing to put in order
        """Put the tensors in order after an update, in place."""

    # ------------------------------------------------------------------ the search

    def descend(self) -> None:
        """Every update; the best tensors of every row are then in `best`."""
        steps = self.settings.steps
        for step in range(steps):
            if not len(self.rows):
                break
            self._step(step)
        if len(self.rows):
            with torch.no_grad():
                loss = self.loss(self.adam.tensors)
            self._keep_best(loss, self.adam.tensors, steps)
            self._fail(~loss.isfinite(), f"loss is not finite after {steps} steps")

    def given(self, maps: tuple[Tensor, ...] | None) -> list[Tensor] | None:
        """The active rows of the start's noise maps."""
        return None if maps is None else [m[self.rows] for m in maps]

    def _step(self, step: int) -> None:
        tensors = [t.detach().requires_grad_() for t in self.adam.tensors]
        rendered = self.perturbed(tensors, step)
        loss = self.loss(rendered)
        total = loss + self.penalty(rendered)
        gradients = torch.autograd.grad(total.sum(), tensors)
        loss = loss.detach()
        self._keep_best(loss, [t.detach() for t in rendered], step)
        is_finite = torch.stack([g.isfinite().flatten(1).all(1) for g in gradients]).all(0)
        is_bad_loss = ~total.detach().isfinite()
        self.adam.step(gradients, self.rate(step))
        self.tidy()
        is_lost = is_bad_loss | ~is_finite
        is_done = self._is_done(loss, step)
        if bool((is_lost | is_done).any()):
            self._fail(is_bad_loss, f"loss is not finite at step {step}", should_shrink=False)
            self._fail(
                ~is_finite & ~is_bad_loss,
                f"gradient is not finite at step {step}",
                should_shrink=False,
            )
            self._shrink(~(is_lost | is_done))

    def _is_done(self, loss: Tensor, step: int) -> Bool[Tensor, " A"]:
        settings = self.settings
        is_done = loss <= settings.stop_loss if settings.stop_loss else loss < -math.inf
        if settings.patience:
            is_done = is_done | (step - self.best_step[self.rows] >= settings.patience)
        return is_done

    def _keep_best(self, loss: Tensor, tensors: list[Tensor], step: int) -> None:
        is_better = loss < self.best_loss[self.rows]  # False for a loss that is not a number
        rows = self.rows[is_better]
        self.best_loss[rows] = loss[is_better]
        self.best_step[rows] = step
        for best, tensor in zip(self.best, tensors, strict=True):
            best[rows] = tensor[is_better]

    def _fail(self, is_failed: Bool[Tensor, " A"], reason: str, should_shrink: bool = True) -> None:
        for row in self.rows[is_failed].tolist():
            self.failures[row] = f"{self.name}: {reason}"
        if should_shrink:
            self._shrink(~is_failed)

    def _shrink(self, keep: Bool[Tensor, " A"]) -> None:
        """Go on with some of the active rows: the others cost nothing any more."""
        keep = keep.to(self.rows.device)
        if not bool(keep.all()):
            self.adam.keep(keep)
        self.rows: Int[Tensor, " A"] = self.rows[keep]
        self.targets = self.images[self.rows]
        self.target_features = [f[keep] for f in self.target_features]
        start = self.start
        self.features = start.features and {k: f[self.rows] for k, f in start.features.items()}
        self.residual = start.residual and {
            k: LowRank(u=r.u[self.rows], v=r.v[self.rows]) for k, r in start.residual.items()
        }
