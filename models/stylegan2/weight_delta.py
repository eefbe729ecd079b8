"""A tuned generator of one picture, as a change of the shared one: 8 bits a weight.

Legend: N batch, O/I out/in channels, k kernel size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int8
from torch import Tensor

LEVELS = 127
"""Codes run from -LEVELS to LEVELS."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightDelta:
    """A per-sample addition to one parameter, quantised with one step for each output channel.

    Pivotal tuning (PTI, arXiv 2106.05744) changes every weight of the generator by little; the
    change has full rank, so 8 bits an entry keep it better than the same bytes of a low rank would.

    Attributes:
        codes: integers, in the parameter's shape.
        step: what a code of 1 is worth, over the parameter's leading dimensions up to the first
            that is larger than 1: a kernel [1 O I k k] has one for each of its O outputs.
    """

    codes: Int8[Tensor, "N ..."]
    step: Float[Tensor, "N ..."]

    @staticmethod
    def quantised(delta: Float[Tensor, "N ..."]) -> "WeightDelta":
        """The nearest representable change; its error is at most half a step.

        The step is a float16 value, so that what is stored is what was scored.
        """
        kept = next((i for i in range(1, delta.ndim) if delta.shape[i] > 1), delta.ndim - 1) + 1
        largest = delta.abs()
        if kept < delta.ndim:
            largest = largest.flatten(kept).amax(kept)
        # Rounded up, by more than float16 rounds (2**-11 of the value, 2**-25 where it is tiny):
        # the largest entry must not overflow its code.
        step = (largest / LEVELS * (1 + 2**-10) + 2**-24).half().float()
        step = torch.where(largest > 0, step, torch.zeros_like(step))
        safe = torch.where(step > 0, step, torch.ones_like(step))
        codes = (delta / _spread(safe, delta)).round().clamp(-LEVELS, LEVELS)
        return WeightDelta(codes=codes.to(torch.int8), step=step)

    def value(self) -> Float[Tensor, "N ..."]:
        """The change in float32."""
        return self.codes.float() * _spread(self.step.float(), self.codes)

    def __getitem__(self, rows: slice) -> "WeightDelta":
        return WeightDelta(codes=self.codes[rows], step=self.step[rows])

    def to(self, device: torch.device | str) -> "WeightDelta":
        return WeightDelta(codes=self.codes.to(device), step=self.step.to(device))

    @staticmethod
    def cat(parts: Sequence["WeightDelta"]) -> "WeightDelta":
        """Join along the batch."""
        return WeightDelta(
            codes=torch.cat([p.codes for p in parts]), step=torch.cat([p.step for p in parts])
        )


TunedWeights = Mapping[str, WeightDelta]
"""Changes by name of the generator's parameter."""


def _spread(step: Tensor, like: Tensor) -> Tensor:
    return step.reshape(*step.shape, *[1] * (like.ndim - step.ndim))
