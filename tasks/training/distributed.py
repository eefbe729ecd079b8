"""The little that a plain training function needs to know of other processes."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn


def is_main_process() -> bool:
    """True in a single process and on rank 0."""
    return not dist.is_initialized() or dist.get_rank() == 0


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes; nothing to do in a single one."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
