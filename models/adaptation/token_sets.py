"""The token sets of one or several domains, by layer: what is optimised and what is stored.

Legend: N domains, T tokens of a set, O/I out/in channels, k kernel size, r rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from models.stylegan2.generator import Generator
from models.stylegan2.residual import LowRank, Residual
from models.stylegan2.tokens import Factorization, TokenLayout, kernel_channels, token_layouts

PARTS = ("p", "q", "gain")


@dataclass(frozen=True, kw_only=True)
class LayerTokens:
    """Both sets of one layer, and the gain of its output channels."""

    p: Float[Tensor, "N T _"]
    q: Float[Tensor, "N T _"]
    gain: Float[Tensor, "N O"]

    def map(self, change: Any) -> "LayerTokens":
        return LayerTokens(p=change(self.p), q=change(self.q), gain=change(self.gain))


@dataclass(frozen=True, kw_only=True)
class TokenSets:
    """Token sets of every refined layer; `residual` is what the generator takes.

    Attributes:
        factorization: how two sets become a kernel (models/stylegan2/tokens.py).
        layers: by index of the 3x3 layer.
    """

    factorization: Factorization
    layers: Mapping[int, LayerTokens]

    @staticmethod
    def fresh(
        generator: Generator,
        layers: Sequence[int],
        factorization: Factorization,
        rank: int,
        streams: Sequence[torch.Generator],
        q_std: float,
    ) -> "TokenSets":
        """Sets to start from: P is N(0, 1/r) and Q is N(0, q_std^2), gains are 1.

        Args:
            layers: refined 3x3 layers; none stands for all.
            streams: one random stream for each domain, so that a domain does not depend on its
                neighbours.
            q_std: 0 starts from the generator itself.

        Raises:
            ConfigError: see `token_layouts`.
        """
        layouts = token_layouts(kernel_channels(generator), layers, factorization, rank)
        found = {}
        for layer, layout in layouts.items():

            def draw(width: int, std: float, count: int = layout.count) -> Tensor:
                return torch.stack([std * torch.randn(count, width, generator=s) for s in streams])

            found[layer] = LayerTokens(
                p=draw(layout.p_width, rank**-0.5),
                q=draw(layout.q_width, q_std),
                gain=torch.ones(len(streams), layout.out_channels),
            )
        return TokenSets(factorization=factorization, layers=found)

    @staticmethod
    def of_residual(residual: Residual) -> "TokenSets":
        """The sets of any residual: factors of rank r are `shared` tokens."""
        layers = {
            layer: LayerTokens(
                p=part.u.transpose(1, 2).contiguous(),
                q=part.v.flatten(2).contiguous(),
                gain=torch.ones_like(part.u[:, :, 0]),
            )
            for layer, part in residual.items()
        }
        return TokenSets(factorization="shared", layers=layers)

    def residual(self) -> dict[int, LowRank]:
        """`g P^T Q` of every layer, differentiable."""
        found = {}
        for layer, part in self.layers.items():
            product = self._layout(part).low_rank(part.p, part.q)
            found[layer] = LowRank(u=product.u * part.gain[:, :, None], v=product.v)
        return found

    def _layout(self, part: LayerTokens) -> TokenLayout:
        """Sizes are read from the tensors, so that a file needs no word about its generator."""
        k = 3
        taps = {"per_tap": (k * k, 1, 1), "shared": (1, 1, k * k), "conv_lora": (1, k, k)}
        count, p_taps, q_taps = taps[self.factorization]
        return TokenLayout(
            factorization=self.factorization,
            rank=part.p.shape[1] // count,
            out_channels=part.p.shape[2] // p_taps,
            in_channels=part.q.shape[2] // q_taps,
            kernel=k,
        )

    def map(self, change: Any) -> "TokenSets":
        """The same change of every tensor."""
        return TokenSets(
            factorization=self.factorization,
            layers={layer: part.map(change) for layer, part in self.layers.items()},
        )

    def __getitem__(self, rows: slice) -> "TokenSets":
        return self.map(lambda t: t[rows])

    def rounded(self) -> "TokenSets":
        """What a file gives back: values of half precision, in float32."""
        return self.map(lambda t: t.detach().float().half().float())

    def tensors(self) -> dict[str, Tensor]:
        """By name: `layer_<i>_p`, `layer_<i>_q`, `layer_<i>_gain`."""
        return {
            f"layer_{layer}_{name}": getattr(part, name)
            for layer, part in sorted(self.layers.items())
            for name in PARTS
        }

    def with_tensors(self, tensors: Sequence[Tensor]) -> "TokenSets":
        """Other values in the order of `tensors`."""
        names = list(self.tensors())
        return TokenSets.from_tensors(dict(zip(names, tensors, strict=True)), self.factorization)

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor], factorization: Factorization) -> "TokenSets":
        """The inverse of `tensors`.

        Raises:
            ValueError: a name that `tensors` does not give, or one that is missing.
        """
        layers: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            word, _, rest = name.partition("_")
            layer, _, part = rest.partition("_")
            if word != "layer" or not layer.isdigit() or part not in PARTS:
                raise ValueError(f"unknown tensor {name!r}")
            layers.setdefault(int(layer), {})[part] = value
        for layer, parts in layers.items():
            if set(parts) != set(PARTS):
                raise ValueError(f"layer {layer} has only {sorted(parts)} of {PARTS}")
        return TokenSets(
            factorization=factorization,
            layers={layer: LayerTokens(**parts) for layer, parts in sorted(layers.items())},
        )
