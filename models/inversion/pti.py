"""Pivotal tuning: the generator itself is tuned to each picture, around the code of a method.

Source: PTI (arXiv 2106.05744), and its settings in Cycle Encoding (arXiv 2207.09367):
theta* = argmin perceptual(x, G(w_p; theta)) + L2(x, G(w_p; theta)) + L_R, where L_R holds the
pictures of codes around the pivot where they were. The tuned generator is stored as an 8-bit change
of the shared one, and that change is what is rendered and scored.

A GPU tunes several generators at once, in one program over their stacked parameters
(`torch.func.vmap`: kernels of their own become grouped convolutions). Tuning one picture after the
other is the twin that a test holds it against, and what a CPU does: there it is 1.2 times as fast.

Legend: N batch, A pictures that are tuned at once, S samples of the locality term, L num_ws, D
w_dim, H W image.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_map

from models.errors import ConfigError
from models.inversion.base import Inversion, Method, SampleRng, frozen
from models.inversion.picture_loss import LossSettings, PictureLoss
from models.optim import RowAdam
from models.settings import Count, CountOrNone, NotNegative, Positive, Share
from models.stylegan2.generator import Generator
from models.stylegan2.weight_delta import WeightDelta

PRESETS = {"pti": (0.06, 0.0), "cycle": (0.07, 0.1)}
"""`stop_perceptual` and `locality_weight` of the two released programs."""
TOGETHER = {"cpu": 1, "cuda": 8}
"""Pictures that are tuned at once, by device."""

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
    """Adam on copies of the synthesis network's parameters, one for each picture.

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
        # The caller may run in inference mode, whose tensors autograd refuses: work on copies.
        with torch.inference_mode(False), torch.enable_grad(), frozen(self.generator):
            self.picture_loss.to(images.device)
            targets, pivots = images.detach().float().clone(), init.detached()
            failures = dict(pivots.failures)
            own = synthesis_parameters(self.generator)
            changes = [_changes(own, own)] * len(images)
            rows = [row for row in range(len(images)) if row not in failures]
            size = TOGETHER.get(images.device.type, 1)
            for part in (rows[at : at + size] for at in range(0, len(rows), size)):
                doors = {name: value[part] for name, value in pivots.tensors().items()}
                seeds = SampleRng([rng.seeds[row] for row in part])
                tune = self._tuned_together if size > 1 else self._tuned
                found = tune(own, targets[part], Inversion.from_tensors(doors), seeds)
                for row, tuned in zip(part, found, strict=True):
                    if isinstance(tuned, str):
                        failures[row] = f"pti: {tuned}"
                    else:
                        changes[row] = _changes(tuned, own)
        weights = {k: WeightDelta.cat([change[k] for change in changes]) for k in own}
        return replace(pivots, weights=weights, failures=failures)

    def _tuned(
        self, own: Parameters, target: Float[Tensor, "1 3 H W"], pivot: Inversion, rng: SampleRng
    ) -> list[Parameters | str]:
        """The parameters after tuning to one picture, by name, or why there are none."""
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
                near = tree_map(lambda part: part[0], self._near(pivot.w_plus, rng))
                loss = loss + self.locality_weight * self._change(tuned, *near)
                value = loss.item()
            if not math.isfinite(value):
                return [_no_loss(step)]
            adam.zero_grad()
            loss.backward(inputs=list(tuned.values()))
            adam.step()
        return [self._whole({name: p.detach() for name, p in tuned.items()})]

    def _tuned_together(
        self,
        own: Parameters,
        targets: Float[Tensor, "A 3 H W"],
        pivots: Inversion,
        rng: SampleRng,
    ) -> list[Parameters | str]:
        """The same of several pictures at once; one that is near enough leaves the others."""
        config, has_stop = self.config, self.config.has_perceptual
        adam = RowAdam([p.expand(len(targets), *p.shape).clone() for p in own.values()])
        fixed = [pivots.tensors(), targets, self.picture_loss.features(targets)]
        rows = torch.arange(len(targets), device=targets.device)
        found: dict[int, Parameters | str] = {}

        def loss(
            parameters: list[Tensor],
            doors: dict[str, Tensor],
            target: Tensor,
            features: list[Tensor],
            near: Sequence[Any],
        ) -> tuple[Tensor, Tensor]:
            tuned = dict(zip(own, parameters, strict=True))
            pivot = Inversion.from_tensors({name: door[None] for name, door in doors.items()})
            image = self._render(tuned, pivot)
            mse, distance = self._compare(image, target[None], [f[None] for f in features])
            value = config.mse_weight * mse + config.perceptual_weight * distance
            if near:
                value = value + self.locality_weight * self._change(tuned, *near)
            return value, distance

        def leave(row: int, at: int, why: str = "") -> None:
            tensors = [tensor[at].clone() for tensor in adam.tensors]
            found[row] = why or self._whole(dict(zip(own, tensors, strict=True)))

        descent = torch.func.vmap(torch.func.grad_and_value(loss, has_aux=True))
        with _mappable(self.generator):
            for step in range(config.steps):
                near = self._near(pivots.w_plus, rng) if self.locality_weight else ()
                near = tree_map(lambda part, chosen=rows: part[chosen], near)
                gradients, (values, distances) = descent(adam.tensors, *fixed, near)  # type: ignore[call-arg]
                is_near = (distances <= self.stop) & has_stop
                goes_on = ~is_near & values.isfinite()
                ends = torch.stack([rows, is_near, goes_on]).T.tolist()  # one answer of the device
                for at, (row, reached, stays) in enumerate(ends):
                    if not stays:
                        leave(row, at, "" if reached else _no_loss(step))
                rows = rows[goes_on]
                if not len(rows):
                    break
                adam.keep(goes_on)
                fixed, gradients = tree_map(lambda part, on=goes_on: part[on], (fixed, gradients))
                adam.step(gradients, config.learning_rate)
        for at, row in enumerate(rows.tolist()):
            leave(row, at)
        return [found[row] for row in range(len(targets))]

    def _whole(self, tuned: Parameters) -> Parameters | str:
        if all(p.isfinite().all() for p in tuned.values()):
            return tuned
        return f"weights are not finite after {self.config.steps} steps"

    @torch.no_grad()
    def _near(
        self, pivots: Float[Tensor, "A L D"], rng: SampleRng
    ) -> tuple[
        Float[Tensor, "A S L D"], Float[Tensor, "A S 3 H W"], list[Float[Tensor, "A S ..."]]
    ]:
        """Codes a fixed distance from each pivot, their pictures by the untuned generator, without
        noise, and the features of those."""
        config, generator = self.config, self.generator
        count = config.locality_samples
        z = rng.randn(count, generator.z_dim, device=pivots.device).flatten(0, 1)
        samples = generator.mapping(z, truncation_psi=config.locality_psi)
        pivots = pivots.repeat_interleave(count, 0)
        codes = interpolated(pivots, samples, config.locality_distance)
        before = generator.synthesis(codes, "none")
        features = self.picture_loss.features(before)
        return tree_map(lambda part: part.unflatten(0, (-1, count)), (codes, before, features))

    def _change(
        self,
        tuned: Parameters,
        codes: Float[Tensor, "S L D"],
        before: Float[Tensor, "S 3 H W"],
        features: list[Tensor],
    ) -> Float[Tensor, ""]:
        """L_R: what tuning has changed at codes near the pivot (`_near`)."""
        after = torch.func.functional_call(self.generator, dict(tuned), (codes, "none"))
        mse, distance = self._compare(after, before, features)
        return self.config.mse_weight * mse + self.config.perceptual_weight * distance

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


def _no_loss(step: int) -> str:
    return f"loss is not finite at step {step}"


def _changes(tuned: Parameters, own: Parameters) -> dict[str, WeightDelta]:
    return {name: WeightDelta.quantised((tuned[name] - p)[None]) for name, p in own.items()}


@contextmanager
def _mappable(generator: Generator) -> Iterator[None]:
    """Inside, the layout is one that `vmap` knows."""
    layout, generator.memory_format = generator.memory_format, torch.contiguous_format
    try:
        yield
    finally:
        generator.memory_format = layout


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
