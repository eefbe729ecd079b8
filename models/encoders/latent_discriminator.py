"""The discriminator of codes that keeps e4e's rows close to W, and the replay pool it learns from.

Source: e4e (arXiv 2102.02766), `LatentCodesDiscriminator`; the pool is CycleGAN's history of fakes.

Legend: N batch of codes, D w_dim, M pool size.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class LatentDiscriminator(nn.Module):
    """A perceptron on single codes w; higher logits mean "from the mapping network".

    Args:
        w_dim: D, the width of the three hidden layers too.
    """

    def __init__(self, w_dim: int = 512) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(3):
            layers += [nn.Linear(w_dim, w_dim), nn.LeakyReLU(0.2)]
        self.mlp = nn.Sequential(*layers, nn.Linear(w_dim, 1))

    def forward(self, w: Float[Tensor, "N D"]) -> Float[Tensor, "N 1"]:
        """Logits of absolute codes (with `latent_avg` added)."""
        return self.mlp(w)


class CodePool:
    """The last codes seen: a query returns, for about half of its rows, an older one instead.

    Args:
        size: M, codes kept (50 in e4e); 0 returns every query as it is.
    """

    def __init__(self, size: int = 50) -> None:
        self.size = size
        self.codes: Tensor | None = None

    def state_dict(self) -> dict[str, Tensor]:
        """The codes kept, for a checkpoint."""
        return {} if self.codes is None else {"codes": self.codes.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Put back what `state_dict` gave."""
        self.codes = state["codes"].clone() if "codes" in state else None

    def query(self, codes: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        """Detached codes, a random half swapped with the pool (torch's global generator)."""
        codes = codes.detach()
        if self.size == 0:
            return codes
        pool = codes[:0] if self.codes is None else self.codes
        room = self.size - len(pool)
        self.codes = torch.cat([pool, codes[:room]]) if room > 0 else pool.clone()
        fresh, late = codes[: max(room, 0)], codes[max(room, 0) :]
        is_swapped = torch.rand(len(late)) < 0.5
        slots = torch.randperm(self.size)[: len(late)]
        # A batch larger than the pool can swap each slot once only.
        is_swapped[len(slots) :] = False
        rows, slots = is_swapped.nonzero()[:, 0], slots[is_swapped[: len(slots)]]
        out = late.clone()
        out[rows] = self.codes[slots]
        self.codes[slots] = late[rows]
        return torch.cat([fresh, out])
