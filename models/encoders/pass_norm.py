"""Batch normalisation for a network that makes several passes, each over other inputs.

Legend: N batch, C channels, h w map.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class PassNorm(nn.BatchNorm2d):
    """Batch normalisation whose running statistics are each pass's own, its weights everybody's.

    What the first stage lacks is larger than what the first pass lacks: with statistics of both
    together neither is normalised as in training.

    Attributes:
        used: which pass's statistics are used and updated.
    """

    def __init__(self, norm: nn.BatchNorm2d, passes: int) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum)
        sizes = (norm.num_features, norm.eps, norm.momentum)
        self.later = nn.ModuleList(nn.BatchNorm2d(*sizes, affine=False) for _ in range(1, passes))
        self.used = 0

    def forward(self, input: Float[Tensor, "N C h w"]) -> Float[Tensor, "N C h w"]:
        if not self.used:
            return super().forward(input)
        own = self.later[self.used - 1]
        assert isinstance(own, nn.BatchNorm2d)
        return F.batch_norm(
            input,
            own.running_mean,
            own.running_var,
            self.weight,
            self.bias,
            self.training,
            self.momentum or 0.0,
            self.eps,
        )

    def copy_last(self, known: int) -> None:
        """Passes that have no statistics yet begin with those of the last one that has."""
        every = [self, *self.later]
        last = every[known - 1]
        for norm in every[known:]:
            for name in ("running_mean", "running_var"):
                getattr(norm, name).copy_(getattr(last, name))


def keep_apart(trunk: nn.Module, passes: int) -> list[PassNorm]:
    """Give a trunk's normalisations statistics for each pass; nothing is replaced for one pass."""
    found = []
    if passes > 1:
        for parent in list(trunk.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.BatchNorm2d):
                    found.append(PassNorm(child, passes))
                    setattr(parent, name, found[-1])
    return found
