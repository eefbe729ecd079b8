"""Schedules of training runs, as functions of the share of the budget that is spent."""

import math


def open_offsets(share: float, num_ws: int, start: float, end: float) -> int:
    """How many of the L - 1 offsets are open after a share of the run (e4e's progressive training).

    None before `start`, all from `end` on, one more at equal distances between.
    """
    if share < start:
        return 0
    span = end - start
    last = num_ws - 1
    if share >= end or span == 0:
        return last
    # last - 1 equal distances lie between the first opening and the last one.
    return min(1 + math.floor((share - start) / span * (last - 1) + 1e-9), last)


def closed_offsets(share: float, num_ws: int, start: float, end: float) -> int:
    """How many of the L - 1 offsets are still open while they close (Cycle Encoding's way back).

    All before `start`, none from `end` on; the last row closes first, at equal distances.
    """
    last = num_ws - 1
    if share < start:
        return last
    if share >= end:
        return 0
    # At `start` the last offset is still open and at `end` the first one closes: last distances.
    return last - math.floor((share - start) / (end - start) * last + 1e-9)


def progress(share: float, start: float, end: float) -> float:
    """How far a weight is on an exponential way: 0 until `start`, 1 at `end`, then beyond it."""
    if share <= start:
        return 0.0
    return (share - start) / (end - start)


def annealed(share: float, anneal: float) -> float:
    """Factor of the learning rate: 1, then a cosine to 0 over the last share `anneal`."""
    if not anneal or share <= 1 - anneal:
        return 1.0
    return 0.5 + 0.5 * math.cos(math.pi * min((share - 1 + anneal) / anneal, 1.0))
