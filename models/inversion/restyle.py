"""ReStyle: an encoder that looks at its own render and corrects the codes (arXiv 2104.02699).

w+_0 = latent_avg, or the codes of another encoder where the network was trained to correct those
(the paper's encoder bootstrapping); w+_{t+1} = w+_t + E(picture, G(w+_t)), for a few iterations
(equations 3 and 4).

Legend: N batch, L num_ws, D w_dim, H W image.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from models.inversion.base import Inversion, SampleRng
from models.inversion.e4e import E4e, E4eConfig
from models.inversion.first_stage import FirstStage
from models.settings import Count, check_fields
from models.stylegan2.generator import Generator

SEEN_SIZE = 256
"""Renders are averaged down to this before the encoder sees them, as in the original, px."""
ITERATIONS = 5
"""Passes, as published."""


@dataclass(frozen=True, kw_only=True)
class RestyleConfig(E4eConfig):
    """Settings of the method `restyle`."""

    iterations: Count | None = None
    """Passes of the encoder, each over the render of the one before; without it, as many as the
    network's card says it was trained with, or the published 5."""
    first_stage: str | None = None
    """Encoder file whose codes are corrected where no method comes before; without it, the bundled
    e4e of the generator where the network was trained on an encoder's codes, else `latent_avg`."""

    def __post_init__(self) -> None:
        check_fields(self)


class Restyle(E4e):
    """Codes from `latent_avg` or a first stage's on, or from an earlier method's, by repeated
    passes of an encoder."""

    Config = RestyleConfig
    name = "restyle"
    in_channels = 6
    summary = "repeated passes of an encoder that sees its render (ReStyle, arXiv 2104.02699)"

    def __init__(self, generator: Generator, config: RestyleConfig) -> None:
        super().__init__(generator, config)
        trained_on = self._card.get("first_stage_sha256")
        self.iterations: int = config.iterations or self._card.get("iterations", ITERATIONS)
        self._first: FirstStage | None = None
        if trained_on or config.first_stage:
            allow = config.allow_other_generator
            self._first = FirstStage(self.name, generator, config.first_stage, allow, trained_on)

    def hashes(self) -> dict[str, str]:
        return {**super().hashes(), **(self._first.hashes() if self._first else {})}

    @torch.no_grad()
    def invert(
        self, images: Float[Tensor, "N 3 H W"], init: Inversion | None, rng: SampleRng
    ) -> Inversion:
        """See `Method.invert`; deterministic. Only the codes of `init` are used, as the start.

        A row fails where its codes are no longer finite; it keeps those of the pass before.

        Raises:
            ConfigError: a network trained on a first stage's codes, without `init` and without one.
        """
        self.check_inputs(images, init, rng)
        if self._first is not None:
            init = self._first.invert(images, init, rng)
        start = self.latent_avg.to(images.device).expand(len(images), -1, -1)
        w_plus = start if init is None else init.w_plus.float()
        failures = {} if init is None else dict(init.failures)
        images = images.float()
        for iteration in range(self.iterations):
            seen = torch.cat([images, self._seen(w_plus, images)], 1)
            found = w_plus + self.offsets(seen)
            is_finite = found.isfinite().flatten(1).all(1)
            for row in (~is_finite).nonzero()[:, 0].tolist():
                failures.setdefault(
                    row,
                    f"{self.name}: the codes are not finite after pass {iteration + 1} "
                    "(is the picture?)",
                )
            w_plus = torch.where(is_finite[:, None, None], found, w_plus)
        return Inversion(w_plus=w_plus, failures=failures)

    def _seen(self, w_plus: Tensor, images: Tensor) -> Float[Tensor, "N 3 H W"]:
        """The render as the encoder saw it in training, at the size of the picture beside it."""
        render = self.generator.synthesis(w_plus).float()
        if render.shape[2] > SEEN_SIZE:
            render = F.adaptive_avg_pool2d(render, SEEN_SIZE)
        if render.shape == images.shape:
            return render
        return F.interpolate(render, images.shape[2:], mode="bilinear", antialias=True)
