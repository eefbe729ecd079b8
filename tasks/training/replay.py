"""One fixed piece of a training step as a CUDA graph: recorded once, then launched as a whole.

A step of a 64 px StyleGAN2 is two to three thousand small kernels; launched one by one they take
several times as long as they compute.
"""

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP = 3
"""Ordinary calls before the recording: optimisers make their state, cuDNN chooses its kernels."""


class Replayed:
    """Calls `piece`, on a GPU from the fourth call on by replaying the recorded kernels.

    Args:
        piece: no arguments; tensors by name. It must do the same on every call: no value may pass
            through the host, and what it keeps it must change in place. The tensors that it
            returns are overwritten by the next call.
        is_recorded: False calls it as it is (CPU, several processes).
    """

    def __init__(self, piece: Callable[[], dict[str, Tensor]], is_recorded: bool) -> None:
        self.piece, self.is_recorded = piece, is_recorded
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.found: dict[str, Tensor] = {}

    def __call__(self) -> dict[str, Tensor]:
        if not self.is_recorded:
            return self.piece()
        if self.graph is not None:
            self.graph.replay()
            return self.found
        self.calls += 1
        if self.calls <= WARM_UP:
            # On a stream of its own, as the recording will be.
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                found = self.piece()
            torch.cuda.current_stream().wait_stream(side)
            return found
        self.graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(self.graph):
            self.found = self.piece()
        self.graph.replay()
        return self.found
