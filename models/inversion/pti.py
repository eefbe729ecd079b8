"""Pivotal tuning: the generator itself is tuned to each picture, around the code of a method.

Source: PTI (arXiv 2106.05744), and its settings in Cycle Encoding (arXiv 2207.09367):
theta* = argmin perceptual(x, G(w_p; theta)) + L2(x, G(w_p; theta)) + L_R, where L_R holds the
pictures of codes around the pivot where they were. The tuned generator is stored as an 8-bit change
of the shared one, and that change is what is rendered and scored.

Legend: N batch, S samples of the locality term, L num_ws, D w_dim, H W image.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from models.errors import ConfigError
from models.inversion.base import Inversion, Method, SampleRng, frozen
from models.inversion.picture_loss import LossSettings, PictureLoss
from models.settings import Count, CountOrNone, NotNegative, Positive, Share
from models.stylegan2.generator import Generator
from models.stylegan2.weight_delta import WeightDelta

PRESETS = {"pti": (0.06, 0.0), "cycle": (0.07, 0.1)}
"""`stop_perceptual` and `locality_weight` of the two released programs."""

Parameters = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class PtiConfig(LossSettings):
    """Settings of the method `pti`. None means the preset's number."""

    preset: Literal["pti", "cycle"] = "pti"
    """"pti": stop at 0.06, no locality term. "cycle": stop at 0.07, locality term on."""
    steps: CountOrNone = 350
    """Updates for each picture at most; 0 keeps the generator."""
    learning_rate: Positive = 3e-4
    """Adam's rate, constant."""
    stop_perceptual: NotNegative | None = None
    """A picture is done when its perceptual distance is at most this; 0 never stops it. The
    presets' numbers were chosen for LPIPS (alex); other distances have other scales."""
    locality_weight: NotNegative | None = None
    """Weight of the same loss between the tuned and the untuned generator at codes near the pivot;
    0 leaves it out, and with it half of the time."""
    locality_distance: NotNegative = 30.0
    """How far those codes are from the pivot: Euclidean norm over all rows of w+ together."""
    locality_psi: Share = 0.5
    """Truncation of the samples towards which those codes lie."""
    locality_samples: Count = 1
    """Such codes in each update, fresh ones each time."""

    def or_preset(self, name: Literal["stop_perceptual", "locality_weight"]) -> float:
        """The setting, or the preset's number where it is None."""
        stop, locality = PRESETS[self.preset]
        value = getattr(self, name)
        if value is not None:
            return value
        return stop if name == "stop_perceptual" else locality


class Pti(Method):
    """Adam on a copy of the synthesis network's parameters, one picture after the other.

    All of them move: kernels, affines, biases, the constant input, ToRGB, noise strengths. The
    mapping network has no part in the render of a code. The shared generator is only ever called
    with the copies in place of its own parameters.
    """

    Config = PtiConfig
    needs_init = True
    summary = "tunes the generator to each picture around a pivot code (PTI, arXiv 2106.05744)"

    def __init__(self, generator: Generator, config: PtiConfig) -> None:
        super().__init__(generator, config)
        self.stop = config.or_preset("stop_perceptual")
        self.locality_weight = config.or_preset("locality_weight")
        self.picture_loss = PictureLoss(config)
        if generator.c_dim and self.locality_weight:
            raise ConfigError(
                "pti: its locality term needs samples of the mapping network, and this generator "
                "is conditional; set locality_weight = 0"
            )

    def hashes(self) -> dict[str, str]:
        return self.picture_loss.hashes()

    def invert(
        self, images: Float[Tensor, "N 3 H W"], init: Inversion | None, rng: SampleRng
    ) -> Inversion:
        """See `Method.invert`. Everything in `init` is kept and rendered with.

        A picture whose loss is not finite is a failure with the step; the others do not notice.
        """
        self.check_inputs(images, init, rng)
        assert init is not None
        changes: list[dict[str, WeightDelta]] = []
        # The caller may run in inference mode, whose tensors autograd refuses: work on copies.
        with torch.inference_mode(False), torch.enable_grad(), frozen(self.generator):
            self.picture_loss.to(images.device)
            targets, pivots = images.detach().float().clone(), init.detached()
            failures = dict(pivots.failures)
            own = synthesis_parameters(self.generator)
            for row in range(len(images)):
                part = slice(row, row + 1)
                tuned = own
                if row not in failures:
                    try:
                        tuned = self._tuned(own, targets[part], pivots[part], rng[part])
                    except _NotFiniteError as error:
                        failures[row] = f"pti: {error}"
                changes.append(
                    {k: WeightDelta.quantised((tuned[k] - p)[None]) for k, p in own.items()}
                )
        weights = {k: WeightDelta.cat([change[k] for change in changes]) for k in own}
        return replace(pivots, weights=weights, failures=failures)

    def _tuned(
        self, own: Parameters, target: Float[Tensor, "1 3 H W"], pivot: Inversion, rng: SampleRng
    ) -> Parameters:
        """The parameters after tuning to one picture, by name."""
        tuned = {name: p.clone().requires_grad_() for name, p in own.items()}
        adam = torch.optim.Adam(tuned.values(), lr=self.config.learning_rate, fused=True)
        target_features = self.picture_loss.features(target)
        for step in range(self.config.steps):
            image = self._render(tuned, pivot)
            mse, distance = self._compare(image, target, target_features)
            loss = self.config.mse_weight * mse + self.config.perceptual_weight * distance
            reached, value = torch.stack([distance, loss]).tolist()  # one answer of the device
            if self.config.has_perceptual and reached <= self.stop:
                break
            if self.locality_weight:
                loss = loss + self.locality_weight * self._locality(tuned, pivot.w_plus, rng)
                value = loss.item()
            if not math.isfinite(value):
                raise _NotFiniteError(f"loss is not finite at step {step}")
            adam.zero_grad()
            loss.backward(inputs=list(tuned.values()))
            adam.step()
        found = {name: p.detach() for name, p in tuned.items()}
        if not all(p.isfinite().all() for p in found.values()):
            raise _NotFiniteError(f"weights are not finite after {self.config.steps} steps")
        return found

    def _locality(
        self, tuned: Parameters, pivot: Float[Tensor, "1 L D"], rng: SampleRng
    ) -> Float[Tensor, ""]:
        """L_R: what tuning changed at codes a fixed distance from the pivot, without noise."""
        config, generator = self.config, self.generator
        z = rng.randn(config.locality_samples, generator.z_dim, device=pivot.device)[0]
        with torch.no_grad():
            samples = generator.mapping(z, truncation_psi=config.locality_psi)
            codes = interpolated(pivot, samples, config.locality_distance)
            before = generator.synthesis(codes, "none")
            before_features = self.picture_loss.features(before)
        after = torch.func.functional_call(generator, dict(tuned), (codes, "none"))
        mse, distance = self._compare(after, before, before_features)
        return config.mse_weight * mse + config.perceptual_weight * distance

    def _render(self, tuned: Parameters, pivot: Inversion) -> Float[Tensor, "1 3 H W"]:
        return torch.func.functional_call(self.generator, dict(tuned), (), pivot.doors())

    def _compare(
        self, images: Float[Tensor, "S 3 H W"], wanted: Float[Tensor, "S 3 H W"], features: Any
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Mean squared error and perceptual distance, means over the pictures."""
        mse = (images - wanted).square().mean()
        perceptual = self.picture_loss.perceptual
        if perceptual is None:
            return mse, torch.zeros_like(mse)
        return mse, perceptual.compare(perceptual.features(images), features).mean()


class _NotFiniteError(Exception):
    """The tuning of one picture diverged."""


def synthesis_parameters(generator: Generator) -> Parameters:
    """Every parameter but the mapping network's, by name, without history."""
    return {
        name: parameter.detach()
        for name, parameter in generator.named_parameters()
        if not name.startswith(("style.", "embed."))
    }


def interpolated(
    pivot: Float[Tensor, "1 L D"], samples: Float[Tensor, "S L D"], distance: float
) -> Float[Tensor, "S L D"]:
    """Codes at `distance` from the pivot towards the samples.

    PTI, equation 4; the norm is over all rows together, as the released program takes it (with 18
    rows, alpha = 30 is 7.07 a row).
    """
    towards = samples - pivot
    norm = towards.flatten(1).norm(dim=1)[:, None, None]
    return pivot + distance * towards / norm
