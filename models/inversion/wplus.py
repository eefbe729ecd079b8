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
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from models.errors import AssetError
from models.inversion.base import Inversion, Method, SampleRng, frozen
from models.inversion.noise_maps import noise_penalty, normalise, starting_maps
from models.inversion.picture_loss import PictureLoss
from models.inversion.row_search import RowSearch, SearchSettings
from models.losses.style_space import StyleSpace
from models.settings import CountOrNone, NotNegative, Positive, Share
from models.statistics import statistics_for
from models.stylegan2.generator import Generator

PROJECTOR_RATE, REFINING_RATE = 0.1, 0.08
"""Adam's rate from `latent_avg` (the projector's) and from another method's codes."""


@dataclass(frozen=True, kw_only=True)
class WPlusConfig(SearchSettings):
    """Settings of the method `wplus`. None means the preset of the start.

    From `latent_avg` the presets are the projector's: rate 0.1, ramp-up over the first 5 % of the
    steps, code noise 0.05; optimised noise maps start from white noise. The result of an earlier
    method is to be improved, not searched for: rate 0.08, no ramp-up, no code noise; noise maps
    start from its own or the stored ones.
    """

    space: Literal["w_plus", "w"] = "w_plus"
    """What is optimised: one w per layer, or a single w for all."""
    steps: CountOrNone = 100
    """Updates for each picture; 0 keeps the start. The projector takes 1000."""
    learning_rate: Positive | None = None
    """Peak rate of Adam."""
    ramp_up: Share | None = None
    """Share of the steps in which the rate grows linearly from 0."""
    ramp_down: Share = 0.25
    """Share of the steps, at the end, in which the rate falls to 0 along a cosine."""
    code_noise: NotNegative | None = None
    """Initial strength of the normal noise added to the code, in units of the spread of W."""
    code_noise_end: Share = 0.75
    """Share of the steps after which that noise has faded out (quadratically)."""
    perceptual_weight: NotNegative = 0.8
    nscd_weight: NotNegative = 0.0
    """Weight of the codes' distance from the generator's own styles (LSAP's NSCD in its mean form;
    the method `lsap_o` takes 0.25); 0 leaves it out."""
    optimise_noise: bool = False
    """Optimise the noise maps too, as the projector does. The result is then rendered with them:
    its codes alone give a different picture."""
    noise_weight: NotNegative = 1e5
    """Weight of the penalty that keeps optimised noise maps white."""


@dataclass(frozen=True, kw_only=True)
class SearchSchedule:
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
        self.picture_loss = PictureLoss(config)
        self.style_space = None
        if config.nscd_weight:
            self.style_space = StyleSpace(generator, statistics_for(generator).style_anchor)
        if not generator.latent_avg.isfinite().all():
            raise AssetError(
                "wplus: the generator has no latent_avg to start from; load it through "
                "`load_generator`, which estimates it"
            )

    def hashes(self) -> dict[str, str]:
        return self.picture_loss.hashes()

    def invert(
        self, images: Float[Tensor, "N 3 H W"], init: Inversion | None, rng: SampleRng
    ) -> Inversion:
        """See `Method.invert`. Features and residuals of `init` are kept and rendered with.

        The result is the best code rendered on the way, by its own loss. A picture whose loss or
        gradient is not finite is a failure with the step; its neighbours do not notice.
        """
        self.check_inputs(images, init, rng)
        self.picture_loss.to(images.device)
        # The caller may run in inference mode, whose tensors autograd refuses: work on copies.
        with torch.inference_mode(False), torch.enable_grad(), frozen(self.generator):
            start = Inversion(w_plus=self._average(images)) if init is None else init.detached()
            search = _Search(self, images.detach().float().clone(), start, init is None, rng)
            return search.run()

    def schedule(self, is_from_average: bool) -> SearchSchedule:
        """The settings with the presets of the start filled in."""
        c = self.config

        def preset(value: float | None, from_average: float, from_init: float) -> float:
            return (from_average if is_from_average else from_init) if value is None else value

        return SearchSchedule(
            steps=c.steps,
            learning_rate=preset(c.learning_rate, PROJECTOR_RATE, REFINING_RATE),
            ramp_up=preset(c.ramp_up, 0.05, 0.0),
            ramp_down=c.ramp_down,
            code_noise=preset(c.code_noise, 0.05, 0.0),
            code_noise_end=c.code_noise_end,
        )

    def _average(self, images: Tensor) -> Float[Tensor, "N L D"]:
        average = self.generator.latent_avg.detach().to(images.device).float()
        return average.expand(len(images), self.generator.num_ws, -1).clone()


class _Search(RowSearch):
    """The codes of one batch, and where they are optimised its noise maps."""

    def __init__(
        self, method: WPlus, images: Tensor, start: Inversion, is_from_average: bool, rng: SampleRng
    ) -> None:
        self.method, self.config, self.generator = method, method.config, method.generator
        self.schedule, self.rng = method.schedule(is_from_average), rng
        code = start.w_plus
        if self.config.space == "w":
            code = code.mean(1, keepdim=True)  # the nearest point of W
        self.noise_scale = 0.0
        if self.schedule.code_noise:
            self.noise_scale = statistics_for(self.generator).w_std
        maps = starting_maps(self.generator, start, is_from_average, rng, images.device)
        tensors = [code, *(maps if self.config.optimise_noise else [])]
        super().__init__("wplus", self.config, method.picture_loss, images, start, tensors)

    def run(self) -> Inversion:
        self.descend()
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

    def rate(self, step: int) -> float:
        return self.schedule.rate(step)

    def loss(self, tensors: list[Tensor]) -> tuple[Float[Tensor, " A"], Float[Tensor, " A"]]:
        code = tensors[0].expand(-1, self.generator.num_ws, -1)
        noise = tensors[1:] or self.given(self.start.noise) or "const"
        images = self.generator.synthesis(code, noise, self.features, self.residual)
        loss, distance = self.picture_loss(images, self.targets, self.target_features)
        if self.method.style_space is not None:
            loss = loss + self.config.nscd_weight * self.method.style_space.nscd(code)
        return loss, distance

    def perturbed(self, tensors: list[Tensor], step: int) -> list[Tensor]:
        if not self.schedule.code_noise:
            return tensors
        # All rows draw at every step, so that no stream depends on which others are active.
        draw = self.rng.randn(*tensors[0].shape[1:], device=self.images.device)
        noise = self.schedule.noise(step) * self.noise_scale
        return [tensors[0] + noise * draw[self.rows], *tensors[1:]]

    def penalty(self, tensors: list[Tensor]) -> Float[Tensor, " A"] | float:
        return self.config.noise_weight * noise_penalty(tensors[1:], len(tensors[0]))

    def tidy(self) -> None:
        for noise_map in self.adam.tensors[1:]:
            normalise(noise_map)
