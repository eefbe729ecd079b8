"""RefineStyle: a network's kernel residuals on top of codes, in one forward pass.

Source: RefineStyle (arXiv 2410.06104). In two stages a frozen encoder (or an earlier method of the
chain) gives the codes, and a token network looks at the picture and their render; in one stage the
network gives both. A network of several passes looks at the render of the one before.

Legend: N batch, L num_ws, D w_dim, H W image.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from models.encoders.checkpoint import check_size, load_network
from models.encoders.token_network import (
    TOKEN_NETWORKS,
    Refinement,
    TokenArchitecture,
    TokenNetwork,
)
from models.errors import AssetError, ConfigError
from models.inversion.base import Inversion, Method, SampleRng
from models.inversion.first_stage import FirstStage
from models.inversion.weights import check_generator, weights_file
from models.settings import Count, NotNegative, check_fields
from models.stylegan2.generator import Generator
from models.stylegan2.residual import LowRank, Residual
from models.stylegan2.tokens import kernel_channels

SEEN_SIZE = 256
"""Renders are averaged down to this before the network sees them, as its training does, px."""


@dataclass(frozen=True, kw_only=True)
class RefineConfig:
    """Settings of the method `refine`."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    checkpoint: str | None = None
    """Token network file (.safetensors beside its .json card). Without it, the bundled one whose
    card names the generator's hash."""
    first_stage: str | None = None
    """Encoder file whose codes are refined where no method comes before; without it, the bundled
    e4e of the generator. A network trained in one stage needs none."""
    strength: NotNegative = 1.0
    """Factor of the residuals; 0 leaves the first stage's picture."""
    iterations: Count | None = None
    """Passes of the network, each over the render of the one before; without it, as many as it was
    trained with. Fewer are quicker and further from the picture."""
    allow_other_generator: bool = False
    """Accept networks that were trained with another generator. Right for a generator fine-tuned
    from that one, which shares its W; wrong for any other."""

    def __post_init__(self) -> None:
        check_fields(self)


class Refine(Method):
    """Kernel residuals for the codes of a first stage, or codes and residuals at once.

    The codes that a two-stage network refines are those of the method before it; where there is
    none, of its own first stage. It was trained on one encoder's codes (`first_stage_sha256` of its
    card) and is best on them.
    """

    Config = RefineConfig
    summary = "a network's low-rank kernel residuals for codes (RefineStyle, arXiv 2410.06104)"

    def __init__(self, generator: Generator, config: RefineConfig) -> None:
        super().__init__(generator, config)
        path = weights_file("refine", generator, config.checkpoint)
        network, self._sha256, card = load_network(path, TOKEN_NETWORKS)
        check_size(path, network.architecture, generator.num_ws, generator.w_dim)
        channels = tuple(kernel_channels(generator))
        if network.architecture.channels != channels:
            raise AssetError(
                f"refine: `checkpoint` {path} refines kernels of (out, in) channels "
                f"{network.architecture.channels}, the generator's are {channels}: choose the "
                "network of this generator"
            )
        trained_with = card.get("generator_hash")
        check_generator("refine", path, trained_with, generator, config.allow_other_generator)
        self.network: TokenNetwork = network.to(memory_format=torch.channels_last)
        trained = network.architecture.iterations
        self.iterations = config.iterations or trained
        if self.iterations > trained:
            raise ConfigError(
                f"refine: `iterations` is {self.iterations}, {path} was trained with {trained}: "
                "choose as many or fewer"
            )
        self.is_two_stage = network.architecture.stages == "two"
        self._first: FirstStage | None = None
        if self.is_two_stage:
            trained_on, allow = card.get("first_stage_sha256"), config.allow_other_generator
            self._first = FirstStage("refine", generator, config.first_stage, allow, trained_on)

    @classmethod
    def tiny_network(cls, generator: Generator) -> TokenNetwork:
        return TokenNetwork(TokenArchitecture.tiny(generator))

    def hashes(self) -> dict[str, str]:
        return {"refine": self._sha256, **(self._first.hashes() if self._first else {})}

    @torch.no_grad()
    def invert(
        self, images: Float[Tensor, "N 3 H W"], init: Inversion | None, rng: SampleRng
    ) -> Inversion:
        """See `Method.invert`; deterministic. Noise and features of `init` are kept and rendered
        with, a residual of `init` is added to. A one-stage network does not look at `init`.

        The trunk's convolutions run in the generator's `compute_dtype`; residuals are float32.

        Raises:
            ConfigError: a two-stage network without `init` and without a first stage.
        """
        self.check_inputs(images, init, rng)
        self.network.to(images.device)
        # A one-stage network finds codes of its own.
        start = None if self._first is None else self._first.invert(images, init, rng)
        found = self._refinement(images, start)
        average = self.generator.latent_avg.float().to(images.device)
        if start is None:
            start = Inversion(w_plus=average + found.offsets().float())
        is_finite = start.w_plus.isfinite().flatten(1).all(1)
        for low_rank in found.residual.values():
            is_finite &= low_rank.u.isfinite().flatten(1).all(1)
            is_finite &= low_rank.v.isfinite().flatten(1).all(1)
        failures = dict(start.failures)
        for row in (~is_finite).nonzero()[:, 0].tolist():
            failures.setdefault(row, "refine: the network's output is not finite (is the picture?)")
        return replace(
            _with_residual(start, self._scaled(found.residual, is_finite)),
            w_plus=torch.where(start.w_plus.isfinite(), start.w_plus, average),
            failures=failures,
        )

    def _refinement(self, images: Float[Tensor, "N 3 H W"], start: Inversion | None) -> Refinement:
        """What the passes write, each over the render of the one before."""
        found, seen = None, None
        dtype = self.generator.compute_dtype
        for _ in range(self.iterations):
            if start is not None:
                so_far = start if found is None else _with_residual(start, found.residual)
                seen = _seen(so_far.render(self.generator), images)
            with torch.autocast(images.device.type, dtype=dtype, enabled=dtype is not None):
                found = self.network(images.float(), seen, found)
        assert found is not None
        return found

    def _scaled(self, found: Residual, is_finite: Bool[Tensor, " N"]) -> dict[int, LowRank]:
        """The residual at its strength; that of a row which is not finite is zero."""
        own = {}
        for layer, low_rank in found.items():
            u = torch.where(is_finite[:, None, None], self.config.strength * low_rank.u, 0.0)
            v = torch.where(is_finite[:, None, None, None, None], low_rank.v, 0.0)
            own[layer] = LowRank(u=u.contiguous(), v=v.contiguous())
        return own


def _with_residual(start: Inversion, residual: Residual) -> Inversion:
    """An inversion with more residuals."""
    total = dict(start.residual or {})
    for layer, own in residual.items():
        total[layer] = LowRank.total([total[layer], own]) if layer in total else own
    return replace(start, residual=total)


def _seen(
    render: Float[Tensor, "N 3 H W"], images: Float[Tensor, "N 3 H W"]
) -> Float[Tensor, "N 3 H W"]:
    """A render as the network saw it in training, at the size of the picture beside it."""
    render = render.float()
    if render.shape[2] > SEEN_SIZE:
        render = F.adaptive_avg_pool2d(render, SEEN_SIZE)
        render = F.interpolate(render, images.shape[2:], mode="bilinear", antialias=True)
    return render
