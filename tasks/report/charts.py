"""Inline SVG charts whose bars stretch with the page while their text keeps its size.

Every coordinate inside a chart is a percentage of its plot, so nothing has a fixed width: the same
SVG is right on a phone and on a desktop. Colours come from the page's CSS classes (light and dark).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from tasks.report.words import number

MIN_BAR_PCT = 0.35
"""Height of the smallest non-empty bar, percent of the plot: a count of one stays visible."""


@dataclass(frozen=True, kw_only=True)
class Marker:
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
    markers: Sequence[Marker] = (),
    height_px: int = 150,
) -> str:
    """Adjacent bars of equal width over `x`: a histogram, or a rate over time.

    Args:
        counts: one height for each bar, in the unit of `y`.
        title: what a reader who cannot see the chart is told.
    """
    width = 100.0 / max(len(counts), 1)
    shapes: list[str] = []
    for tick, label in ticks(y.low, y.high, 4):
        top = 100.0 - y.percent(tick)
        shapes.append(f'<line class="grid" x1="0%" x2="100%" y1="{top:.2f}%" y2="{top:.2f}%"/>')
        shapes.append(
            f'<text class="tick" x="0%" dx="-6" y="{top:.2f}%" dy="4" text-anchor="end">'
            f"{label}</text>"
        )
    for index, count in enumerate(counts):
        if count <= 0:
            continue
        tall = max(y.percent(count), MIN_BAR_PCT)
        shapes.append(
            f'<rect class="bar" x="{index * width:.3f}%" width="{width * 0.94:.3f}%" '
            f'y="{100 - tall:.2f}%" height="{tall:.2f}%"/>'
        )
    shapes.append('<line class="axis" x1="0%" x2="100%" y1="100%" y2="100%"/>')
    shapes += _x_ticks(x)
    shapes += [_marker(marker, x) for marker in markers]
    return (
        f'<div class="chart"><p class="axis-label">{escape(y.label)}</p>'
        f'<div class="plot"><svg width="100%" height="{height_px}" role="img" '
        f'aria-label="{escape(title)}">{"".join(shapes)}</svg></div>'
        f'<p class="axis-label x">{escape(x.label)}</p></div>'
    )


def _x_ticks(x: Axis) -> list[str]:
    found = []
    for tick, label in ticks(x.low, x.high, 4):
        at = x.percent(tick)
        anchor = "start" if at < 4 else "end" if at > 96 else "middle"
        found.append(
            f'<text class="tick" x="{at:.2f}%" y="100%" dy="16" text-anchor="{anchor}">'
            f"{label}</text>"
        )
    return found


def _marker(marker: Marker, x: Axis) -> str:
    at = min(max(x.percent(marker.at), 0.0), 100.0)
    # The text stands on the side with more room.
    anchor, shift = ("start", 5) if at < 50 else ("end", -5)
    text = (
        f'<text class="{marker.kind}" x="{at:.2f}%" dx="{shift}" y="0%" dy="10" '
        f'text-anchor="{anchor}">{escape(marker.text)}</text>'
        if marker.text
        else ""
    )
    return f'<line class="{marker.kind}" x1="{at:.2f}%" x2="{at:.2f}%" y1="0%" y2="100%"/>{text}'


def stacked(parts: Sequence[tuple[str, float]], *, title: str) -> str:
    """One horizontal bar split by share; segment i has the CSS class `part-i`."""
    total = sum(value for _, value in parts)
    shapes, left = [], 0.0
    for index, (_, value) in enumerate(parts):
        share = 100.0 * value / total if total > 0 else 0.0
        if share > 0:
            shapes.append(
                f'<rect class="part-{index % 8}" x="{left:.3f}%" y="0" '
                f'width="{share:.3f}%" height="100%"/>'
            )
        left += share
    return (
        f'<svg class="stacked" width="100%" height="28" role="img" aria-label="{escape(title)}">'
        f"{''.join(shapes)}</svg>"
    )
