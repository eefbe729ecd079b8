"""Inline SVG charts whose bars stretch with the page while their text keeps its size.

Every coordinate inside a chart is a percentage of its plot, so nothing has a fixed width: the same
SVG is right on a phone and on a desktop. Colours come from the page's CSS classes (light and dark).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from tasks.report.look import macro
from tasks.report.words import number

MIN_BAR_PCT = 0.35
"""Height of the smallest non-empty bar, percent of the plot: a count of one stays visible."""


@dataclass(frozen=True, kw_only=True)
class PlotLine:
    """A vertical line across the plot, with a short text at its top.

    Attributes:
        at: position on the x axis, in its unit.
        text: label; empty for a bare line.
        kind: CSS class of the line: "median" or "pause".
    """

    at: float
    text: str
    kind: str = "median"


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One axis: its range, its label and the unit-free numbers to write along it."""

    low: float
    high: float
    label: str

    def percent(self, value: float) -> float:
        """Position of a value along the axis, 0..100."""
        span = self.high - self.low
        return 100.0 * (value - self.low) / span if span > 0 else 50.0


def ticks(low: float, high: float, about: int = 4) -> list[tuple[float, str]]:
    """Round numbers inside [low, high], about `about` of them, each with its text.

    Steps are 1, 2 or 5 times a power of ten.
    """
    span = high - low
    if not (math.isfinite(span) and span > 0):
        return [(low, number(low))]
    raw = span / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.999)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    first = math.ceil(low / step - 1e-9)
    count = int(high / step - first + 1e-9) + 1
    found = [(first + i) * step for i in range(count)]
    if decimals > 6 or high >= 1e7:
        return [(value, f"{value:.3g}") for value in found]
    return [(value, f"{value + 0.0:,.{decimals}f}") for value in found]


def bars(
    counts: Sequence[float],
    x: Axis,
    y: Axis,
    *,
    title: str,
    markers: Sequence[PlotLine] = (),
    height_px: int = 150,
) -> Markup:
    """Adjacent bars of equal width over `x`: a histogram, or a rate over time.

    Args:
        counts: one height for each bar, in the unit of `y`.
        title: what a reader who cannot see the chart is told.
    """
    width = 100.0 / max(len(counts), 1)
    tall = {i: max(y.percent(n), MIN_BAR_PCT) for i, n in enumerate(counts) if n > 0}
    chart = {
        "x": x,
        "y": y,
        "title": title,
        "height_px": height_px,
        "y_ticks": [
            {"at": f"{100.0 - y.percent(tick):.2f}", "text": label}
            for tick, label in ticks(y.low, y.high, 4)
        ],
        "x_ticks": [_x_tick(x.percent(tick), label) for tick, label in ticks(x.low, x.high, 4)],
        "shapes": [
            {
                "x": f"{index * width:.3f}",
                "width": f"{width * 0.94:.3f}",
                "y": f"{100 - height:.2f}",
                "height": f"{height:.2f}",
            }
            for index, height in tall.items()
        ],
        "marks": [_mark(marker, x) for marker in markers],
    }
    return macro("charts.html", "bars", chart)


def _x_tick(at: float, label: str) -> dict[str, str]:
    anchor = "start" if at < 4 else "end" if at > 96 else "middle"
    return {"at": f"{at:.2f}", "anchor": anchor, "text": label}


def _mark(marker: PlotLine, x: Axis) -> dict[str, object]:
    at = min(max(x.percent(marker.at), 0.0), 100.0)
    # The text stands on the side with more room.
    anchor, shift = ("start", 5) if at < 50 else ("end", -5)
    found = {"kind": marker.kind, "text": marker.text, "at": f"{at:.2f}"}
    return {**found, "anchor": anchor, "shift": shift}


def stacked(parts: Sequence[tuple[str, float]], *, title: str) -> Markup:
    """One horizontal bar split by share; segment i has the CSS class `part-i`."""
    total = sum(value for _, value in parts)
    segments, left = [], 0.0
    for index, (_, value) in enumerate(parts):
        share = 100.0 * value / total if total > 0 else 0.0
        if share > 0:
            place = {"x": f"{left:.3f}", "width": f"{share:.3f}"}
            segments.append({"index": index % 8, **place})
        left += share
    return macro("charts.html", "stacked", segments, title)
