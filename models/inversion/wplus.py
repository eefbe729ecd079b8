"""Optimisation of the code of each picture, in W or W+: the StyleGAN2 projector, batched.

Source: StyleGAN2 (arXiv 1912.04958, appendix D) and stylegan2-ada-pytorch's projector: Adam,
learning-rate ramps, decaying noise on the code, noise maps optimised under an autocorrelation
penalty. Differences: every loss, penalty, stop and failure is per picture, and the loss may mix MSE
with the perceptual distance and with the codes' distance from the generator's own styles.

Legend: N batch, A active rows of it, K rows of the optimised code (1 in W, L in W+), L num_ws,
D w_dim, C H W image.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from models.errors import AssetError, ConfigError
from models.inversion.base import Inversion, Method, SampleRng, frozen
from models.inversion.noise_maps import noise_penalty, normalise, starting_maps
from models.losses.perceptual import load_perceptual
from models.losses.style_space import StyleSpace
from models.optim import RowAdam
from models.statistics import statistics_for
from models.stylegan2.generator import Generator
from models.stylegan2.residual import LowRank

PROJECTOR_RATE, REFINING_RATE = 0.1, 0.08
"""Adam's rate from `latent_avg` (the projector's) and from another method's codes."""


@dataclass(frozen=True, kw_only=True)
class WPlusConfig:
    """Settings of the method `wplus`. None means the preset of the start.

    From `latent_avg` the presets are the projector's: rate 0.1, ramp-up over the first 5 % of the
    steps, code noise 0.05; optimised noise maps start from white noise. The result of an earlier
    method is to be improved, not searched for: rate 0.08, no ramp-up, no code noise; noise maps
    start from its own or the stored ones.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    space: Literal["w_plus", "w"] = "w_plus"
    """What is optimised: one w per layer, or a single w for all."""
    steps: int = 100
    """Updates for each picture; 0 keeps the start. The projector takes 1000."""
    learning_rate: float | None = None
    """Peak rate of Adam."""
    ramp_up: float | None = None
    """Share of the steps in which the rate grows linearly from 0."""
    ramp_down: float = 0.25
    """Share of the steps, at the end, in which the rate falls to 0 along a cosine."""
    code_noise: float | None = None
    """Initial strength of the normal noise added to the code, in units of the spread of W."""
    code_noise_end: float = 0.75
    """Share of the steps after which that noise has faded out (quadratically)."""
    mse_weight: float = 1.0
    """Weight of the mean squared error on [-1, 1]."""
    perceptual_weight: float = 0.8
    """Weight of the perceptual distance."""
    perceptual: str = "auto"
    """Its name: "auto" (LPIPS where its weights are at hand, else ours), "refinery" (ours),
    "lpips-alex", "lpips-vgg", "lpips-squeeze", or "none"."""
    nscd_weight: float = 0.0
    """Weight of the codes' distance from the generator's own styles (LSAP's NSCD in its mean form;
    the method `lsap_o` takes 0.25); 0 leaves it out."""
    optimise_noise: bool = False
    """Optimise the noise maps too, as the projector does. The result is then rendered with them:
    its codes alone give a different picture."""
    noise_weight: float = 1e5
    """Weight of the penalty that keeps optimised noise maps white."""
    stop_loss: float = 0.0
    """A picture stops when its loss (without the noise penalty) falls to this; 0 never stops it."""
    patience: int = 0
    """A picture stops after so many steps without a new best loss; 0 never stops it."""

    def __post_init__(self) -> None:
        if self.space not in ("w_plus", "w"):
            raise ConfigError(f'space: expected "w_plus" or "w", found {self.space!r}')
        for name in (
            "steps",
            "code_noise",
            "mse_weight",
            "perceptual_weight",
            "nscd_weight",
            "noise_weight",
            "stop_loss",
            "patience",
        ):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ConfigError(f"{name} must be >= 0, got {value}")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ConfigError(f"learning_rate must be > 0, got {self.learning_rate}")
        for name in ("ramp_up", "ramp_down", "code_noise_end"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(f"{name} must be in 0..1, got {value}")
        if not self.mse_weight and (not self.perceptual_weight or self.perceptual == "none"):
            raise ConfigError(
                "mse_weight and perceptual_weight must not both be 0: nothing to minimise"
            )


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Rate and code noise over the steps (the projector's, with t = step / steps)."""

    steps: int
    learning_rate: float
    ramp_up: float
    ramp_down: float
    code_noise: float
    code_noise_end: float

    def rate(self, step: int) -> float:
        """Adam's rate of the update `step`, 0-based."""
        t = step / self.steps
        down = min(1.0, (1.0 - t) / self.ramp_down) if self.ramp_down else 1.0
        up = min(1.0, t / self.ramp_up) if self.ramp_up else 1.0
        return self.learning_rate * (0.5 - 0.5 * math.cos(math.pi * down)) * up

    def noise(self, step: int) -> float:
        """Strength of the code noise at `step`, in units of the spread of W."""
        if not self.code_noise_end:
            return 0.0
        return self.code_noise * max(0.0, 1.0 - step / self.steps / self.code_noise_end) ** 2


class WPlus(Method):
    """Adam on the code of every picture of the batch at once, each as if it were alone."""

    Config = WPlusConfig
    summary = "Adam on w or w+ of each picture, batched (StyleGAN2's projector, arXiv 1912.04958)"

    def __init__(self, generator: Generator, config: WPlusConfig) -> None:
        super().__init__(generator, config)
        self.perceptual = None
        if config.perceptual_weight and config.perceptual != "none":
            self.perceptual = load_perceptual(config.perceptual)
        self.style_space = None
        if config.nscd_weight:
            self.style_space = StyleSpace(generator, statistics_for(generator).style_anchor)
        if not generator.latent_avg.isfinite().all():
            raise AssetError(
                "wplus: the generator has no latent_avg to start from; load it through "
                "`load_generator`, which estimates it"
            )

    def hashes(self) -> dict[str, str]:
        return {} if self.perceptual is None else {self.perceptual.name: self.perceptual.hash}

    def invert(
        self, images: Float[Tensor, "N 3 H W"], init: Inversion | None, rng: SampleRng
    ) -> Inversion:
        """See `Method.invert`. Features and residuals of `init` are kept and rendered with.

        The result is the best code rendered on the way, by its own loss. A picture whose loss or
        gradient is not finite is a failure with the step; its neighbours do not notice.
        """
        self.check_inputs(images, init, rng)
        if self.perceptual is not None:
            self.perceptual.to(images.device)
        # The caller may run in inference mode, whose tensors autograd refuses: work on copies.
        with torch.inference_mode(False), torch.enable_grad(), frozen(self.generator):
            start = Inversion(w_plus=self._average(images)) if init is None else init.detached()
            search = _Search(self, images.detach().float().clone(), start, init is None, rng)
            return search.run()

    def schedule(self, is_from_average: bool) -> Schedule:
        """The settings with the presets of the start filled in."""
        c = self.config

        def preset(value: float | None, from_average: float, from_init: float) -> float:
            return (from_average if is_from_average else from_init) if value is None else value

        return Schedule(
            steps=c.steps,
            learning_rate=preset(c.learning_rate, PROJECTOR_RATE, REFINING_RATE),
            ramp_up=preset(c.ramp_up, 0.05, 0.0),
            ramp_down=c.ramp_down,
            code_noise=preset(c.code_noise, 0.05, 0.0),
            code_noise_end=c.code_noise_end,
        )

    def image_loss(
        self,
        images: Float[Tensor, "A 3 H W"],
        targets: Float[Tensor, "A 3 H W"],
        features: list[Tensor],
    ) -> Float[Tensor, " A"]:
        """The loss of renders against targets, whose perceptual features are given."""
        loss = self.config.mse_weight * (images - targets).square().flatten(1).mean(1)
        if self.perceptual is not None:
            distance = self.perceptual.compare(self.perceptual.features(images), features)
            loss = loss + self.config.perceptual_weight * distance
        return loss

    def target_features(self, targets: Float[Tensor, "N 3 H W"]) -> list[Tensor]:
        """What `image_loss` compares with; empty without a perceptual distance."""
        if self.perceptual is None:
            return []
        with torch.no_grad():
            return self.perceptual.features(targets)

    def _average(self, images: Tensor) -> Float[Tensor, "N L D"]:
        average = self.generator.latent_avg.detach().to(images.device).float()
        return average.expand(len(images), self.generator.num_ws, -1).clone()


class _Search:
    """The state of one batch: what is active, what is optimised, what was best."""

    def __init__(
        self, method: WPlus, images: Tensor, start: Inversion, is_from_average: bool, rng: SampleRng
    ) -> None:
        self.method, self.config, self.generator = method, method.config, method.generator
        self.schedule = method.schedule(is_from_average)
        self.start, self.rng, self.images = start, rng, images
        self.targets, self.target_features = images, method.target_features(images)
        code = start.w_plus
        if self.config.space == "w":
            code = code.mean(1, keepdim=True)  # the nearest point of W
        self.noise_scale = 0.0
        if self.schedule.code_noise:
            self.noise_scale = statistics_for(self.generator).w_std
        maps = starting_maps(self.generator, start, is_from_average, rng, images.device)
        self.maps = maps if self.config.optimise_noise else []
        self.adam = RowAdam([code.clone(), *(m.clone() for m in self.maps)])
        self.best = [t.clone() for t in self.adam.tensors]
        self.best_loss = torch.full((len(images),), math.inf, device=images.device)
        self.best_step = torch.zeros(len(images), dtype=torch.long, device=images.device)
        self.failures = dict(start.failures)
        self.rows = torch.arange(len(images), device=images.device)
        self._shrink(torch.tensor([i not in self.failures for i in range(len(images))]))

    def run(self) -> Inversion:
        for step in range(self.config.steps):
            if not len(self.rows):
                break
            self._step(step)
        if len(self.rows):
            with torch.no_grad():
                loss = self._loss(self.adam.tensors)
            self._keep_best(loss, self.adam.tensors, self.config.steps)
            self._fail(~loss.isfinite(), f"loss is not finite after {self.config.steps} steps")
        return self._result()

    def _step(self, step: int) -> None:
        tensors = [t.detach().requires_grad_() for t in self.adam.tensors]
        rendered = list(tensors)
        noise = self.schedule.noise(step) * self.noise_scale
        if self.schedule.code_noise:
            # All rows draw at every step, so that no stream depends on which others are active.
            draw = self.rng.randn(*tensors[0].shape[1:], device=self.images.device)
            rendered[0] = tensors[0] + noise * draw[self.rows]
        loss = self._loss(rendered)
        total = loss + self.config.noise_weight * noise_penalty(rendered[1:], len(loss))
        gradients = torch.autograd.grad(total.sum(), tensors)
        loss = loss.detach()
        self._keep_best(loss, [t.detach() for t in rendered], step)
        is_finite = torch.stack([g.isfinite().flatten(1).all(1) for g in gradients]).all(0)
        is_bad_loss = ~total.detach().isfinite()
        self.adam.step(gradients, self.schedule.rate(step))
        for noise_map in self.adam.tensors[1:]:
            normalise(noise_map)
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

    def _loss(self, tensors: list[Tensor]) -> Float[Tensor, " A"]:
        code = tensors[0].expand(-1, self.generator.num_ws, -1)
        noise = tensors[1:] or self._given(self.start.noise) or "const"
        images = self.generator.synthesis(code, noise, self.features, self.residual)
        loss = self.method.image_loss(images, self.targets, self.target_features)
        if self.method.style_space is not None:
            loss = loss + self.config.nscd_weight * self.method.style_space.nscd(code)
        return loss

    def _given(self, maps: tuple[Tensor, ...] | None) -> list[Tensor] | None:
        return None if maps is None else [m[self.rows] for m in maps]

    def _is_done(self, loss: Tensor, step: int) -> Bool[Tensor, " A"]:
        is_done = loss <= self.config.stop_loss if self.config.stop_loss else loss < -math.inf
        if self.config.patience:
            is_done = is_done | (step - self.best_step[self.rows] >= self.config.patience)
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
            self.failures[row] = f"wplus: {reason}"
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

    def _result(self) -> Inversion:
        code, *maps = self.best
        # A failed row keeps what it had when it last rendered a finite loss, else its start.
        average = self.generator.latent_avg.to(code.device, code.dtype)
        code = torch.where(code.isfinite(), code, average)
        return Inversion(
            w_plus=code.expand(-1, self.generator.num_ws, -1).contiguous(),
            noise=tuple(maps) if self.config.optimise_noise else self.start.noise,
            features=self.start.features,
            residual=self.start.residual,
            failures=self.failures,
        )
