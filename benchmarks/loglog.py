"""Curves over sizes, both axes logarithmic."""

import math
from collections.abc import Mapping, Sequence

from tasks.benchmark.figures import HEIGHT, MARGIN, WIDTH, svg_line, svg_text

COLOURS = ("#1d3f66", "#3b6ea8", "#c0504d", "#4f8f4f", "#8064a2", "#d08b2f", "#5b9aa0", "#777777")
RIGHT = 230
"""Room for the names, px."""


def loglog(curves: Mapping[str, Sequence[tuple[float, float]]], across: str, up: str) -> str:
    """SVG: a curve of (x, y), both above zero, for each name; decades on both axes."""
    points = [point for curve in curves.values() for point in curve]
    decades = [
        (math.floor(math.log10(min(each))), math.ceil(math.log10(max(each))))
        for each in zip(*points, strict=True)
    ]
    pixels = ((MARGIN, WIDTH - RIGHT), (HEIGHT - MARGIN, MARGIN // 2))

    def place(axis: int, value: float) -> float:
        (low, high), (start, stop) = decades[axis], pixels[axis]
        return start + (stop - start) * (math.log10(value) - low) / max(1, high - low)

    shapes = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{up}, by {across}" font-family="sans-serif" font-size="12">'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        svg_text((MARGIN + WIDTH - RIGHT) / 2, HEIGHT - 24, across, "middle"),
        svg_text(MARGIN, 18, up, "start"),
    ]
    for decade in range(decades[0][0], decades[0][1] + 1):
        x = place(0, 10.0**decade)
        shapes.append(svg_line(x, MARGIN // 2, x, HEIGHT - MARGIN))
        shapes.append(svg_text(x, HEIGHT - MARGIN + 18, _named(decade), "middle"))
    for decade in range(decades[1][0], decades[1][1] + 1):
        y = place(1, 10.0**decade)
        shapes.append(svg_line(MARGIN, y, WIDTH - RIGHT, y))
        shapes.append(svg_text(MARGIN - 6, y + 4, _named(decade), "end"))
    for number, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[number % len(COLOURS)]
        places = [(place(0, x), place(1, y)) for x, y in curve]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        shapes.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        shapes += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>' for x, y in places]
        y = MARGIN + 20 * number
        shapes.append(f'<circle cx="{WIDTH - RIGHT + 20}" cy="{y - 4}" r="4" fill="{colour}"/>')
        shapes.append(svg_text(WIDTH - RIGHT + 30, y, name, "start"))
    return "".join([*shapes, "</svg>\n"])


def _named(decade: int) -> str:
    return f"{10**decade:,}" if decade >= 0 else f"{10.0**decade:g}"
