"""Descent on tensors of a whole batch at once, every row as if it were alone.

Loss, best value, stop and failure are per picture; a row that is done costs nothing any more. What
becomes of a row is kept on the device, so that a step waits for no answer of a GPU.

Legend: N batch, A active rows of it, C H W image.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from models.errors import ConfigError
from models.inversion.base import Inversion
from models.inversion.picture_loss import LossSettings, PictureLoss
from models.optim import RowAdam
from models.settings import CountOrNone, NotNegative
from models.stylegan2.residual import LowRank

GOES_ON, IS_DONE, BAD_LOSS, BAD_GRADIENT = range(4)
REASONS = {BAD_LOSS: "loss", BAD_GRADIENT: "gradient"}
GPU_STEPS = 8
"""Steps of a GPU between looks at who is done: a row that is costs at most so many more."""


@dataclass(frozen=True, kw_only=True)
class SearchSettings(LossSettings):
    """What every method that searches lets one set."""

    steps: CountOrNone
    stop_loss: NotNegative = 0.0
    """A picture stops when its loss (without penalties) falls to this; 0 never stops it."""
    stop_perceptual: NotNegative = 0.0
    """A picture stops when its perceptual distance falls to this, and keeps what it was stopped at;
    0 never stops it."""
    patience: CountOrNone = 0
    """A picture stops after so many steps without a new best loss; 0 never stops it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stop_perceptual and not self.has_perceptual:
            raise ConfigError(
                f"stop_perceptual = {self.stop_perceptual} needs the perceptual distance: give "
                'perceptual_weight a value above 0 and perceptual another than "none"'
            )


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
        self.interval = GPU_STEPS if images.is_cuda else 1
        self.rows = torch.arange(len(images), device=images.device)
        self.ends = torch.zeros_like(self.rows)
        self.end_steps = torch.zeros_like(self.rows)
        self._shrink(torch.tensor([i not in self.failures for i in range(len(images))]))

    # ------------------------------------------------------------------ what a method gives

    @abstractmethod
    def rate(self, step: int) -> float:
        """Adam's rate of the update `step`, 0-based."""

    @abstractmethod
    def loss(self, tensors: list[Tensor]) -> tuple[Float[Tensor, " A"], Float[Tensor, " A"]]:
        """The loss that ranks and the perceptual distance, of the active rows."""

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
            if (step + 1) % self.interval == 0:
                self._retire()
        if not len(self.rows):
            return
        with torch.no_grad():
            loss, distance = self.loss(self.adam.tensors)
        self._keep_best(loss, distance, self.adam.tensors, steps)
        self._end(~loss.isfinite(), BAD_LOSS, steps)
        self._retire()

    def given(self, maps: tuple[Tensor, ...] | None) -> list[Tensor] | None:
        """The active rows of the start's noise maps."""
        return None if maps is None else [m[self.rows] for m in maps]

    def _step(self, step: int) -> None:
        tensors = [t.detach().requires_grad_() for t in self.adam.tensors]
        rendered = self.perturbed(tensors, step)
        loss, distance = self.loss(rendered)
        total = loss + self.penalty(rendered)
        self._keep_best(loss.detach(), distance.detach(), [t.detach() for t in rendered], step)
        self._end(~total.detach().isfinite(), BAD_LOSS, step)
        self._end(self._is_done(loss.detach(), distance.detach(), step), IS_DONE, step)
        if self.interval == 1 and all(self.ends.tolist()):
            return
        gradients = torch.autograd.grad(total.sum(), tensors)
        is_finite = torch.cat([g.flatten(1) for g in gradients], 1).isfinite().all(1)
        self._end(~is_finite, BAD_GRADIENT, step)
        self.adam.step(gradients, self.rate(step))
        self.tidy()

    def _is_done(self, loss: Tensor, distance: Tensor, step: int) -> Bool[Tensor, " A"]:
        settings = self.settings
        is_done = self._is_near(distance)
        if settings.stop_loss:
            is_done = is_done | (loss <= settings.stop_loss)
        if settings.patience:
            is_done = is_done | (step - self.best_step[self.rows] >= settings.patience)
        return is_done

    def _is_near(self, distance: Tensor) -> Bool[Tensor, " A"]:
        return distance <= (self.settings.stop_perceptual or -1.0)

    def _keep_best(
        self, loss: Tensor, distance: Tensor, tensors: Sequence[Tensor], step: int
    ) -> None:
        """A row keeps its lowest loss, but one that is near enough what it is stopped at."""
        best = self.best_loss[self.rows]
        is_kept = (loss < best) | self._is_near(distance)  # False for what is not a number
        is_kept = is_kept & (self.ends == GOES_ON)
        self.best_loss[self.rows] = torch.where(is_kept, loss, best)
        self.best_step[self.rows] = torch.where(is_kept, step, self.best_step[self.rows])
        for kept, tensor in zip(self.best, tensors, strict=True):
            is_kept = is_kept.view(-1, *[1] * (tensor.ndim - 1))
            kept[self.rows] = torch.where(is_kept, tensor, kept[self.rows])

    def _end(self, is_ending: Bool[Tensor, " A"], how: int, step: int) -> None:
        """Note how and when rows end; the first reason counts."""
        is_ending = is_ending & (self.ends == GOES_ON)
        self.ends = torch.where(is_ending, how, self.ends)
        self.end_steps = torch.where(is_ending, step, self.end_steps)

    def _retire(self) -> None:
        """Go on without the rows that have ended."""
        ends = self.ends.tolist()
        if not any(ends):
            return
        for row, how, step in zip(self.rows.tolist(), ends, self.end_steps.tolist(), strict=True):
            if how in REASONS:
                when = "at step" if step < self.settings.steps else "after"
                unit = "" if step < self.settings.steps else " steps"
                self.failures[row] = (
                    f"{self.name}: {REASONS[how]} is not finite {when} {step}{unit}"
                )
        self._shrink(self.ends == GOES_ON)

    def _shrink(self, keep: Bool[Tensor, " A"]) -> None:
        """Go on with some of the active rows: the others cost nothing any more."""
        keep = keep.to(self.rows.device)
        if not bool(keep.all()):
            self.adam.keep(keep)
        self.rows: Int[Tensor, " A"] = self.rows[keep]
        self.ends, self.end_steps = self.ends[keep], self.end_steps[keep]
        self.targets = self.images[self.rows]
        self.target_features = [f[keep] for f in self.target_features]
        start = self.start
        self.features = start.features and {k: f[self.rows] for k, f in start.features.items()}
        self.residual = start.residual and {
            k: LowRank(u=r.u[self.rows], v=r.v[self.rows]) for k, r in start.residual.items()
        }
