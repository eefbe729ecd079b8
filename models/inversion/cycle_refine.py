"""Cycle Encoding's refinement of the pivot: a few updates of the encoder for each picture.

Source: Cycle Encoding (arXiv 2207.09367). What moves are the encoder's weights, not the code:
L_ref = L_S(x) + lambda * mean_M L_S(x*), where the x* are companions, pictures that the encoder
must go on to invert well. A code therefore moves only where the encoder would take other pictures
too. The result is still a w.

Legend: N batch, B pictures of one update (target and companions), L num_ws, D w_dim, H W image.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from models.errors import ConfigError
from models.inversion.base import Inversion, SampleRng, frozen
from models.inversion.cycle import Cycle, CycleConfig
from models.inversion.picture_loss import LossSettings
from models.losses.identity import load_identity
from models.losses.perceptual import load_perceptual
from models.optim import Ranger
from models.settings import CountOrNone, NotNegative, Positive
from models.stylegan2.generator import Generator


@dataclass(frozen=True, kw_only=True)
class CycleRefineConfig(CycleConfig, LossSettings):
    """Settings of the method `cycle_refine`; the file is that of `cycle`."""

    steps: CountOrNone = 6
    """Updates of the encoder for each picture (the released program: 15); 0 gives what `cycle`
    gives."""
    learning_rate: Positive = 1e-3
    """Ranger's rate (the released program: 1e-4)."""
    companions: CountOrNone = 1
    """Pictures that accompany the target in every update, fresh ones each time (M; the released
    program: 7)."""
    regularisation: NotNegative = 7.0
    """Weight of the companions' mean loss against the target's (lambda_reg). With 7 companions
    every picture of an update weighs the same: the released program's plain mean."""
    perceptual_weight: NotNegative = 0.8
    identity: str | None = None
    """File of ArcFace's IR-SE50 weights, for faces; without it there is no identity loss."""
    identity_weight: NotNegative = 0.1
    """Weight of 1 - cosine of the identity embeddings."""


class CycleRefine(Cycle):
    """A copy of the encoder for each picture, trained a little on it and on its companions.

    The copies are trained one after the other: stacked weights would make every convolution a
    grouped one, and the renders, which are most of the work, share nothing anyway.
    """

    Config = CycleRefineConfig
    summary = "tunes the cycle encoder to each picture, regularised (Cycle Encoding's refinement)"
    config: CycleRefineConfig

    def __init__(self, generator: Generator, config: CycleRefineConfig) -> None:
        super().__init__(generator, config)
        if generator.c_dim and config.companions:
            raise ConfigError(
                "cycle_refine: its companions are samples of the generator, and this one is "
                "conditional; set companions = 0"
            )
        self.perceptual = self.identity = None
        if config.has_perceptual:
            self.perceptual = load_perceptual(config.perceptual)
        if config.identity is not None and config.identity_weight:
            self.identity = load_identity(config.identity)

    def hashes(self) -> dict[str, str]:
        losses = [loss for loss in (self.perceptual, self.identity) if loss is not None]
        return {**super().hashes(), **{loss.name: loss.hash for loss in losses}}

    def invert(
        self, images: Float[Tensor, "N 3 H W"], init: Inversion | None, rng: SampleRng
    ) -> Inversion:
        """See `Method.invert`; `init` is not used: the start is what `cycle` gives.

        The result is the best code by the picture's own loss among those of all updates. A picture
        whose loss is not finite is a failure with the step; the others do not notice.
        """
        self.check_inputs(images, init, rng)
        codes, failures = [], {}
        # The caller may run in inference mode, whose tensors autograd refuses: work on copies.
        with torch.inference_mode(False), torch.enable_grad(), frozen(self.generator):
            for module in (self.encoder, self.perceptual, self.identity):
                if module is not None:
                    module.to(images.device)
            targets = images.detach().float().clone()
            for row in range(len(images)):
                code, reason = self._refined(targets[row : row + 1], rng[row : row + 1])
                codes.append(code)
                if reason is not None:
                    failures[row] = f"cycle_refine: {reason}"
        return Inversion(w_plus=torch.cat(codes), failures=failures)

    def _refined(
        self, target: Float[Tensor, "1 3 H W"], rng: SampleRng
    ) -> tuple[Float[Tensor, "1 L D"], str | None]:
        """The code of one picture, or `latent_avg` and why there is none."""
        config = self.config
        average = self.latent_avg.to(target.device)[None]
        tuned = {
            name: parameter.detach().clone().requires_grad_()
            for name, parameter in self.encoder.named_parameters()
        }
        ranger = Ranger(tuned.values(), lr=config.learning_rate)
        best, best_loss = average, float("inf")
        for step in range(config.steps + 1):
            is_over = step == config.steps
            pictures = target
            if config.companions and not is_over:
                pictures = torch.cat([target, self._companions(rng, target.device)])
            with torch.set_grad_enabled(not is_over):
                offsets = torch.func.functional_call(
                    self.encoder, tuned, pictures.contiguous(memory_format=torch.channels_last)
                )
                codes = average + offsets
                losses = self.similarity_loss(self.generator.synthesis(codes), pictures)
            if not losses.isfinite().all():
                return average.clone(), f"loss is not finite at step {step}"
            if losses[0] < best_loss:
                best, best_loss = codes[:1].detach(), losses[0].item()
            if is_over:
                break
            ranger.zero_grad()
            self.total(losses).backward(inputs=list(tuned.values()))
            if step == 0:
                ranger.settle()  # the released program goes on with the training's moments
            ranger.step()
        return best.clone(), None

    def similarity_loss(
        self, found: Float[Tensor, "B 3 H W"], wanted: Float[Tensor, "B 3 H W"]
    ) -> Float[Tensor, " B"]:
        """L_S of each picture: L2 + perceptual + identity, weighted."""
        config = self.config
        loss = config.mse_weight * (found - wanted).square().flatten(1).mean(1)
        if self.perceptual is not None:
            loss = loss + config.perceptual_weight * self.perceptual(found, wanted)
        if self.identity is not None:
            loss = loss + config.identity_weight * (1 - self.identity(found, wanted))
        return loss

    def total(self, losses: Float[Tensor, " B"]) -> Float[Tensor, ""]:
        """L_ref of the target's loss (first) and its companions', divided by 1 + lambda.

        The division makes lambda = M = 7 the plain mean that the released program takes.
        """
        if len(losses) == 1:
            return losses[0]
        weight = self.config.regularisation
        return (losses[0] + weight * losses[1:].mean()) / (1 + weight)

    def _companions(self, rng: SampleRng, device: torch.device) -> Float[Tensor, "_ 3 H W"]:
        """Fresh samples of the generator, from the target's own stream."""
        z = rng.randn(self.config.companions, self.generator.z_dim, device=device)[0]
        with torch.no_grad():
            return self.generator.synthesis(self.generator.mapping(z))
