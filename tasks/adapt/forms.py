"""What is optimised: token sets, or all weights of the synthesis network (the baseline).

Both hold their values as tensors [N ...], a row for each domain, so one row-wise Adam serves both
and a domain's row never meets its neighbours'.

Legend: N domains, A active ones, B pictures of each, L num_ws, D w_dim, H W image.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from models.adaptation.domain import Domain
from models.adaptation.token_sets import TokenSets
from models.inversion.pti import synthesis_parameters
from models.stylegan2.generator import Generator, Noise
from models.stylegan2.residual import LowRank
from models.stylegan2.weight_delta import WeightDelta
from tasks.adapt.config import AdaptConfig


class Form(ABC):
    """How tensors change the generator.

    Attributes:
        start: where every domain begins: [N ...] each; they render the source.
    """

    start: list[Tensor]

    @abstractmethod
    def render(
        self, tensors: Sequence[Tensor], w_plus: Float[Tensor, "A B L D"]
    ) -> Float[Tensor, "_ 3 H W"]:
        """A B pictures, a domain's pictures next to each other; differentiable in the tensors."""

    def scaled(self, tensors: Sequence[Tensor], strength: float, row: int) -> list[Tensor]:
        """One row's tensors [1 ...] whose change of the generator is `strength` times as large."""
        own = [t[row : row + 1] for t in self.start]
        return [a.lerp(t, strength) for a, t in zip(own, tensors, strict=True)]

    @abstractmethod
    def domain(
        self, name: str, generator_hash: str, tensors: Sequence[Tensor], card: Mapping[str, Any]
    ) -> Domain:
        """The finished domain of one row's tensors [1 ...], as its file will hold it."""


def make_form(
    config: AdaptConfig, generator: Generator, streams: Sequence[torch.Generator]
) -> Form:
    """The config's form for as many domains as there are streams of random numbers."""
    if config.form == "weights":
        return WeightForm(config, generator, len(streams))
    if config.form == "style":
        return StyleForm(config, generator, len(streams))
    return TokenForm(config, generator, streams)


class TokenForm(Form):
    """Kernel tokens (RefineStyle): all domains in one forward pass of the shared generator."""

    def __init__(
        self, config: AdaptConfig, generator: Generator, streams: Sequence[torch.Generator]
    ) -> None:
        self.generator = generator
        self.noise: Noise = config.noise
        self.sets = TokenSets.fresh(
            generator, config.layers, config.factorization, config.rank, streams, q_std=0.0
        )
        device = generator.latent_avg.device
        self.start = [t.to(device) for t in self.sets.tensors().values()]

    def render(
        self, tensors: Sequence[Tensor], w_plus: Float[Tensor, "A B L D"]
    ) -> Float[Tensor, "_ 3 H W"]:
        count = w_plus.shape[1]
        residual = self.sets.with_tensors(tensors).residual()
        if len(w_plus) == 1:
            rows = {layer: part.expand(count) for layer, part in residual.items()}
        else:
            rows = {
                layer: LowRank(
                    u=part.u.repeat_interleave(count, 0), v=part.v.repeat_interleave(count, 0)
                )
                for layer, part in residual.items()
            }
        return self.generator.synthesis(w_plus.flatten(0, 1), self.noise, None, rows)

    def scaled(self, tensors: Sequence[Tensor], strength: float, row: int) -> list[Tensor]:
        pairs = zip(self.sets.tensors(), tensors, strict=True)
        return [t * strength if name.endswith("_gain") else t for name, t in pairs]

    def domain(
        self, name: str, generator_hash: str, tensors: Sequence[Tensor], card: Mapping[str, Any]
    ) -> Domain:
        tokens = self.sets.with_tensors([t.cpu() for t in tensors])
        return Domain.of_tokens(name, generator_hash, tokens, card)


class StyleForm(Form):
    """Offsets in style space (StyleDomain, arXiv 2212.10229): one number for each input channel of
    each 3x3 convolution, added to what its affine says. The same offset for all pictures is a
    change of the affine's bias, and is stored as one."""

    def __init__(self, config: AdaptConfig, generator: Generator, count: int) -> None:
        self.generator = generator
        self.noise: Noise = config.noise
        chosen = config.layers or range(generator.num_convs)
        self.layers = {
            at: (f"{name}.conv.modulation.bias", layer.weight.shape[2])
            for at, (name, layer, row) in enumerate(generator.layers())
            if not name.startswith("to_rgb") and row in chosen
        }
        like = generator.latent_avg
        self.start = [like.new_zeros(count, width) for _, width in self.layers.values()]

    def render(
        self, tensors: Sequence[Tensor], w_plus: Float[Tensor, "A B L D"]
    ) -> Float[Tensor, "_ 3 H W"]:
        count = w_plus.shape[1]
        shift = {
            at: t.repeat_interleave(count, 0) for at, t in zip(self.layers, tensors, strict=True)
        }
        return self.generator.synthesis(w_plus.flatten(0, 1), self.noise, style_shift=shift)

    def domain(
        self, name: str, generator_hash: str, tensors: Sequence[Tensor], card: Mapping[str, Any]
    ) -> Domain:
        pairs = zip(self.layers.values(), tensors, strict=True)
        weights = {k: WeightDelta.quantised(t.cpu()) for (k, _), t in pairs}
        return Domain(name=name, generator_hash=generator_hash, weights=weights, card=card)


class WeightForm(Form):
    """Every parameter of the synthesis network but ToRGB and the affines, as StyleGAN-NADA trains
    (its ToRGB and mapping are frozen; here the affines stay too, so that edits keep their
    meaning). A domain is a generator of its own: one forward pass each."""

    def __init__(self, config: AdaptConfig, generator: Generator, count: int) -> None:
        self.generator = generator
        self.noise: Noise = config.noise
        kept = (".modulation.", *(() if config.noise != "none" else (".noise.",)))
        self.own = {
            name: p
            for name, p in synthesis_parameters(generator).items()
            if not name.startswith("to_rgb") and not any(part in name for part in kept)
        }
        self.start = [p[None].repeat(count, *[1] * p.ndim) for p in self.own.values()]

    def render(
        self, tensors: Sequence[Tensor], w_plus: Float[Tensor, "A B L D"]
    ) -> Float[Tensor, "_ 3 H W"]:
        pictures = []
        for row, codes in enumerate(w_plus):
            weights = {name: t[row] for name, t in zip(self.own, tensors, strict=True)}
            inputs = (codes, self.noise)
            pictures.append(torch.func.functional_call(self.generator, weights, inputs))
        return torch.cat(pictures)

    def domain(
        self, name: str, generator_hash: str, tensors: Sequence[Tensor], card: Mapping[str, Any]
    ) -> Domain:
        pairs = zip(self.own.items(), tensors, strict=True)
        weights = {k: WeightDelta.quantised((t - p[None]).cpu()) for (k, p), t in pairs}
        return Domain(name=name, generator_hash=generator_hash, weights=weights, card=card)
