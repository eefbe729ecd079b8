"""Two token sets make a kernel residual: the three factorisations of RefineStyle's `P^T Q`.

RefineStyle (arXiv 2410.06104) adds `dW = P^T Q` to a modulated kernel: a matrix product of two
sets of equally many tokens, whose number bounds the rank. How its product becomes a kernel
[O I k k] is not stated; three readings satisfy every stated fact, and each is a `LowRank`:

    name        P [T _]    Q [T _]      dW[o,i,a,b]                   T     R of the LowRank
    per_tap     O          I            sum_t P[abt,o] Q[abt,i]       k k r k k r
    shared      O          I k k        sum_t P[t,o] Q[t,iab]         r     r
    conv_lora   O k        I k          sum_t P[t,oa] Q[t,ib]         r     k r

A token of P is scaled by the gain g [O] of its layer ("learnable scalings"; their place is
inferred).

Legend: N batch, T tokens of a set, O/I out/in channels, k kernel size, a b its taps, r rank,
R rank of the `LowRank`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from models.errors import ConfigError
from models.stylegan2.generator import Generator
from models.stylegan2.residual import LowRank, Residual

Factorization = Literal["per_tap", "shared", "conv_lora"]
FACTORIZATIONS: tuple[str, ...] = get_args(Factorization)


@dataclass(frozen=True, kw_only=True)
class TokenLayout:
    """The token sets of one 3x3 layer.

    Attributes:
        rank: r, at least 1.
    """

    factorization: Factorization
    rank: int
    out_channels: int
    in_channels: int
    kernel: int = 3

    @property
    def count(self) -> int:
        """T, tokens of each set."""
        return self.rank * (self.kernel**2 if self.factorization == "per_tap" else 1)

    @property
    def p_width(self) -> int:
        """Values of a token of P."""
        return self.out_channels * (self.kernel if self.factorization == "conv_lora" else 1)

    @property
    def q_width(self) -> int:
        """Values of a token of Q."""
        taps = {"per_tap": 1, "shared": self.kernel**2, "conv_lora": self.kernel}
        return self.in_channels * taps[self.factorization]

    def low_rank(
        self,
        p: Float[Tensor, "N T _"],
        q: Float[Tensor, "N T _"],
        gain: Float[Tensor, " O"] | float = 1.0,
    ) -> LowRank:
        """`g P^T Q` as the generator takes it; exact, differentiable in both sets and the gain.

        Raises:
            ValueError: token sets of another size.
        """
        n, k = len(p), self.kernel
        want = ([n, self.count, self.p_width], [n, self.count, self.q_width])
        if (list(p.shape), list(q.shape)) != want:
            raise ValueError(
                f"tokens of a {self.factorization} residual of rank {self.rank}: expected P and Q "
                f"{want[0]} and {want[1]}, found {list(p.shape)} and {list(q.shape)}"
            )
        if self.factorization == "shared":
            u, v = p.transpose(1, 2), q.reshape(n, self.rank, self.in_channels, k, k)
        elif self.factorization == "per_tap":
            u = p.transpose(1, 2)
            # Token (a, b, t) holds tap (a, b) alone; the other taps of its kernel are zero.
            tap = torch.eye(k * k, dtype=q.dtype, device=q.device).repeat_interleave(self.rank, 0)
            v = (q[..., None] * tap[:, None]).unflatten(3, (k, k))
        else:
            u = p.unflatten(2, (self.out_channels, k)).permute(0, 2, 1, 3).flatten(2)  # [N O (t a)]
            row = torch.eye(k, dtype=q.dtype, device=q.device)
            # Entry (t, a) holds row a of the kernel alone: a plain view would mix taps, channels.
            v = torch.einsum("ntib,ac->ntaicb", q.unflatten(2, (self.in_channels, k)), row)
            v = v.flatten(1, 2)
        scaled = u * gain[:, None] if isinstance(gain, Tensor) else u * gain
        return LowRank(u=scaled, v=v)


def token_layouts(
    channels: Sequence[Sequence[int]],
    layers: Sequence[int],
    factorization: Factorization,
    rank: int,
) -> dict[int, TokenLayout]:
    """Layouts by index of the 3x3 layer.

    Args:
        channels: (O, I) of every 3x3 layer, `kernel_channels`.
        layers: which are refined; none stands for all.

    Raises:
        ConfigError: an unknown factorisation, a rank below 1, or a layer that is not there.
    """
    check_tokens(factorization, rank)
    for layer in layers:
        if not 0 <= layer < len(channels):
            raise ConfigError(
                f"layers: expected indices of 3x3 layers in 0..{len(channels) - 1}, found {layer}"
            )
    return {
        layer: TokenLayout(
            factorization=factorization,
            rank=rank,
            out_channels=channels[layer][0],
            in_channels=channels[layer][1],
        )
        for layer in sorted(set(layers) or range(len(channels)))
    }


def check_tokens(factorization: str, rank: int) -> None:
    """Refuse settings that describe no residual.

    Raises:
        ConfigError: an unknown factorisation, or a rank below 1.
    """
    if factorization not in FACTORIZATIONS:
        raise ConfigError(
            f"factorization: expected one of {', '.join(FACTORIZATIONS)}, found {factorization!r}"
        )
    if rank < 1:
        raise ConfigError(f"rank must be >= 1, got {rank}")


def kernel_channels(generator: Generator) -> list[tuple[int, int]]:
    """(O, I) of every 3x3 layer; ToRGB layers are never refined."""
    shapes: list[Any] = [generator.conv(i).conv.weight.shape for i in range(generator.num_convs)]
    return [(int(shape[1]), int(shape[2])) for shape in shapes]


def relative_energy(
    generator: Generator, w_plus: Float[Tensor, "N L D"], residual: Residual
) -> Float[Tensor, " N"]:
    """Mean square of dW over that of the modulated kernel s W, averaged over the refined layers.

    Computed from the factors: `|u v|^2 = <u^T u, v v^T>` and `|s W|^2 = s^2 sum_k W^2`.
    """
    found = []
    for layer, low_rank in residual.items():
        conv = generator.conv(layer).conv
        weight = conv.weight[0]  # [O I k k]
        v = low_rank.v.flatten(2)
        ours = ((low_rank.u.transpose(1, 2) @ low_rank.u) * (v @ v.transpose(1, 2))).sum((1, 2))
        style = conv.modulation(w_plus[:, layer])
        found.append(ours / (style.square() @ weight.square().sum((0, 2, 3))))
    return torch.stack(found).mean(0)
