"""Low-rank kernel residuals, a door of the generator: RefineStyle's kernel refinement.

Legend: N batch, O/I out/in channels, r rank, k kernel size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class LowRank:
    """A per-sample residual `dW = u v` of one kernel, between modulation and demodulation.

    `K_n = W * s_n + u_n v_n` (RefineStyle, arXiv 2410.06104: `W^d = dW + s W^0`, `dW = P^T Q`). The
    product is in the unit of the stored kernel W: the equalised-learning-rate gain multiplies the
    sum.

    Attributes:
        is_shared: every sample has the very same factors, as `expand` gives them.
    """

    u: Float[Tensor, "N O r"]
    v: Float[Tensor, "N r I k k"]
    is_shared: bool = False

    def __post_init__(self) -> None:
        if self.u.ndim != 3 or self.v.ndim != 5 or self.u.shape[2] != self.v.shape[1]:
            raise ValueError(
                f"low-rank residual: expected u [N O r] and v [N r I k k] with one r, "
                f"found {list(self.u.shape)} and {list(self.v.shape)}"
            )

    def kernel(self) -> Float[Tensor, "N O I k k"]:
        """The materialised product, for tests and for folding."""
        n, r, i, k, _ = self.v.shape
        return (self.u @ self.v.reshape(n, r, -1)).reshape(n, self.u.shape[1], i, k, k)

    def expand(self, n: int) -> "LowRank":
        """The factors of one sample for n of them, as a view: what all samples share is then
        computed once. Slices keep that; joining with other factors does not."""
        u, v = self.u.expand(n, -1, -1), self.v.expand(n, -1, -1, -1, -1)
        return LowRank(u=u, v=v, is_shared=True)

    def __getitem__(self, rows: slice) -> "LowRank":
        return replace(self, u=self.u[rows], v=self.v[rows])

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "LowRank":
        if self.is_shared and len(self.u) > 1:  # `Tensor.to` may write out the view
            return self[0:1].to(device, dtype).expand(len(self.u))
        u, v = self.u.to(device=device, dtype=dtype), self.v.to(device=device, dtype=dtype)
        return replace(self, u=u, v=v)

    @staticmethod
    def cat(parts: Sequence["LowRank"]) -> "LowRank":
        """Join along the batch; ranks must agree."""
        return LowRank(u=torch.cat([p.u for p in parts]), v=torch.cat([p.v for p in parts]))

    @staticmethod
    def total(parts: Sequence["LowRank"]) -> "LowRank":
        """The residual whose kernel is the sum of the parts': factors stack along the rank."""
        return LowRank(u=torch.cat([p.u for p in parts], 2), v=torch.cat([p.v for p in parts], 1))


Residual = Mapping[int, LowRank]
"""Residuals by index of the 3x3 convolution: 0 is `conv1`, i + 1 is `convs.i`."""
