"""When the rows of a run were made, from the times in its commit markers."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np

from tasks.run.marker import Marker

STEPS = 60
PAUSE_S = 60.0
"""A longer stretch without any shard at work is a pause (a stopped run), not slow work."""


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """Images/s in equal steps of working time, pauses cut out.

    Attributes:
        seconds: working time from the first shard's start to the last commit, pauses left out.
        at_work_s: of these, with a shard at work that was committed then.
        rates: images/s in each of the `STEPS` equal steps; empty without a commit.
        pauses: (position on the working-time axis, length), both in seconds.
        first, last: start of the first shard and last commit, UTC, or empty.
    """

    seconds: float = 0.0
    at_work_s: float = 0.0
    rates: tuple[float, ...] = ()
    pauses: tuple[tuple[float, float], ...] = ()
    first: str = ""
    last: str = ""


def timeline(markers: Sequence[Marker]) -> Timeline:
    """Spread every shard's rows evenly over the time between its start and its commit."""
    timed = [marker for marker in markers if marker.started_at and marker.finished_at]
    if not timed:
        return Timeline()
    starts = np.array([datetime.fromisoformat(m.started_at).timestamp() for m in timed])
    stops = np.array([datetime.fromisoformat(m.finished_at).timestamp() for m in timed])
    stops = np.maximum(stops, starts + 1e-3)  # clocks may step back
    rows = np.array([marker.rows for marker in timed], dtype=np.float64)

    order = np.argsort(starts, kind="stable")
    starts, stops, rows = starts[order], stops[order], rows[order]
    busy_until = np.maximum.accumulate(stops)
    gaps = np.maximum(starts[1:] - busy_until[:-1], 0.0)
    at_work = float(busy_until[-1] - starts[0] - gaps.sum())
    gaps[gaps <= PAUSE_S] = 0.0
    lost = np.concatenate([[0.0], np.cumsum(gaps)]) + starts[0]
    # No pause falls inside a shard, so both ends move by the same amount.
    starts, stops = starts - lost, stops - lost
    paused = np.flatnonzero(gaps)
    total = float(stops.max())
    return Timeline(
        seconds=total,
        at_work_s=at_work,
        rates=_rates(starts, stops, rows, total),
        pauses=tuple((float(starts[i + 1]), float(gaps[i])) for i in paused),
        first=min(marker.started_at for marker in timed),
        last=max(marker.finished_at for marker in timed),
    )


def _rates(
    starts: np.ndarray, stops: np.ndarray, rows: np.ndarray, total: float
) -> tuple[float, ...]:
    """Rows done are piecewise linear in time; a rate is their difference over a step's length."""
    speed = rows / (stops - starts)
    times = np.concatenate([starts, stops])
    changes = np.concatenate([speed, -speed])
    order = np.argsort(times, kind="stable")
    times, speeds = times[order], np.cumsum(changes[order])
    done = np.concatenate([[0.0], np.cumsum(speeds[:-1] * np.diff(times))])
    edges = np.linspace(0.0, total, STEPS + 1)
    rates = np.diff(np.interp(edges, times, done)) / (total / STEPS)
    return tuple(float(rate) for rate in np.maximum(rates, 0.0))
