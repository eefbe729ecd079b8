"""Sums of kernel residuals and of weight changes with strengths, a row for each picture.

The fast form joins factors along the rank; its slow twin adds the materialised kernels (tests).

Legend: N pictures, R mixes (N, or one that all pictures share), O/I out/in channels, r rank.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.stylegan2.residual import LowRank, Residual
from models.stylegan2.weight_delta import TunedWeights, WeightDelta


def mixed_residual(
    mixes: Sequence[Sequence[tuple[Residual, float]]], n: int, like: Tensor
) -> dict[int, LowRank]:
    """`sum_j g_j dW_j` of every mix by layer, for n pictures, in the dtype and place of `like`.

    Args:
        mixes: R of them: residuals of batch size 1 with strengths. Ranks may differ, within a mix
            and between mixes; a mix may be empty or leave layers alone.
    """
    found = {}
    for layer in sorted({layer for mix in mixes for residual, _ in mix for layer in residual}):
        rows = [[(residual[layer], g) for residual, g in mix if layer in residual] for mix in mixes]
        part = LowRank.cat(_padded([_total(row, like) for row in rows]))
        found[layer] = part.expand(n) if len(rows) == 1 else part
    return found


def summed(a: Residual, b: Residual) -> dict[int, LowRank]:
    """Both residuals, row by row."""
    found = dict(a)
    for layer, part in b.items():
        found[layer] = LowRank.total([found[layer], part]) if layer in found else part
    return found


def mixed_weights(
    mixes: Sequence[Sequence[tuple[TunedWeights, float]]], n: int, device: torch.device
) -> dict[str, WeightDelta]:
    """`sum_j g_j dtheta_j` of every mix by parameter, for n pictures.

    One change keeps its codes, the strength goes into its step; a sum of several is rounded again.
    """
    shapes = {k: delta for mix in mixes for weights, _ in mix for k, delta in weights.items()}
    found = {}
    for name, like in shapes.items():
        rows = [
            _delta([(weights[name], g) for weights, g in mix if name in weights], like)
            for mix in mixes
        ]
        delta = WeightDelta.cat(rows).to(device)
        if len(rows) == 1:
            delta = WeightDelta(
                codes=delta.codes.expand(n, *delta.codes.shape[1:]),
                step=delta.step.expand(n, *delta.step.shape[1:]),
            )
        found[name] = delta
    return found


def _total(row: Sequence[tuple[LowRank, float]], like: Tensor) -> LowRank | None:
    parts = [(part.to(like.device, like.dtype), g) for part, g in row]
    return LowRank.total([LowRank(u=g * p.u, v=p.v) for p, g in parts]) if parts else None


def _padded(rows: Sequence[LowRank | None]) -> list[LowRank]:
    """All rows at the largest rank: factors of zeros add nothing."""
    given = [row for row in rows if row is not None]
    rank, shape = max(row.u.shape[2] for row in given), given[0]
    found = []
    for row in rows:
        u = shape.u.new_zeros(1, shape.u.shape[1], rank)
        v = shape.v.new_zeros(1, rank, *shape.v.shape[2:])
        if row is not None:
            u[:, :, : row.u.shape[2]], v[:, : row.v.shape[1]] = row.u, row.v
        found.append(LowRank(u=u, v=v))
    return found


def _delta(parts: Sequence[tuple[WeightDelta, float]], like: WeightDelta) -> WeightDelta:
    if not parts:
        return WeightDelta(codes=torch.zeros_like(like.codes), step=torch.zeros_like(like.step))
    if len(parts) == 1:
        delta, g = parts[0]
        return WeightDelta(codes=delta.codes, step=g * delta.step)
    total = torch.stack([g * delta.value() for delta, g in parts]).sum(0)
    return WeightDelta.quantised(total)
