"""The benchmark's plot and its grid of pictures.

Legend: K pictures, M methods, E edits, H W image.
"""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image, ImageDraw
from torch import Tensor

from models.pictures import to_bytes
from tasks.report.charts import ticks

WIDTH, HEIGHT, MARGIN = 760, 460, 70
RADII = (5.0, 22.0)
"""Of the circles of the fastest and the slowest method, px."""
LABEL_PX = 110

LABEL_WIDTH, LABEL_HEIGHT = 7, 13
"""Room of one letter and of one line, px."""


def scatter(result: Mapping[str, Any]) -> str:
    """SVG: distortion to the right, quality under edit upwards (both: lower is better), a circle's
    area growing with the logarithm of its seconds per image."""
    points = [
        (name, row[result["perceptual"]], row["frechet_edited"], row["seconds_per_image"])
        for name, row in result["rows"].items()
        if row.get("frechet_edited") is not None
    ]
    title = "Distortion, quality under edit and time of every method"
    shapes = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{title}" font-family="sans-serif" font-size="12">'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>'
    ]
    if points:
        shapes += _axes_and_points(points, result["perceptual"])
    return "".join([*shapes, "</svg>\n"])


def _axes_and_points(
    points: Sequence[tuple[str, float, float, float]], perceptual: str
) -> list[str]:
    x_of = _scale([p[1] for p in points], MARGIN, WIDTH - MARGIN)
    y_of = _scale([p[2] for p in points], HEIGHT - MARGIN, MARGIN // 2)
    shapes = []
    for value, text in ticks(*x_of.span, 6):
        x = x_of(value)
        shapes.append(svg_line(x, MARGIN // 2, x, HEIGHT - MARGIN))
        shapes.append(svg_text(x, HEIGHT - MARGIN + 18, text, "middle"))
    for value, text in ticks(*y_of.span, 6):
        y = y_of(value)
        shapes.append(svg_line(MARGIN, y, WIDTH - MARGIN, y))
        shapes.append(svg_text(MARGIN - 6, y + 4, text, "end"))
    shapes.append(svg_text(WIDTH / 2, HEIGHT - 24, f"{perceptual} of reconstructions", "middle"))
    shapes.append(svg_text(MARGIN, 18, "Frechet trunk distance of edited pictures", "start"))
    shapes.append(
        svg_text(
            WIDTH / 2,
            HEIGHT - 6,
            "circle: seconds per image, logarithmic; lower left is best",
            "middle",
        )
    )
    times = [math.log10(max(p[3], 1e-4)) for p in points]
    low, span = min(times), max(max(times) - min(times), 1e-9)
    labels: list[tuple[float, float, str]] = []
    for (name, distortion, quality, _), at in zip(points, times, strict=True):
        radius = RADII[0] + (RADII[1] - RADII[0]) * (at - low) / span
        x, y = x_of(distortion), y_of(quality)
        shapes.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" fill="#3b6ea8" '
            'fill-opacity=".35" stroke="#1d3f66"/>'
        )
        labels.append((x + radius + 3, y + 4, name))
    return shapes + [svg_text(x, y, name, "start") for x, y, name in _apart(labels)]


def _apart(labels: Sequence[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """Labels (x, y, text) from the top down, each moved below those that it would cover."""
    placed: list[tuple[float, float, str]] = []
    for x, y, text in sorted(labels, key=lambda label: label[1]):
        # From the top down, so that moving below one label can meet only labels further down.
        for other_x, other_y, other in placed:
            is_beside = x < other_x + LABEL_WIDTH * len(other) and other_x < x + LABEL_WIDTH * len(
                text
            )
            if is_beside and y < other_y + LABEL_HEIGHT:
                y = other_y + LABEL_HEIGHT
        placed.append((x, y, text))
    return placed


class _scale:
    """Values to pixels, with a little room on both sides."""

    def __init__(self, values: Sequence[float], start: float, stop: float) -> None:
        low, high = min(values), max(values)
        room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        self.span = (low - room, high + room)
        self.start, self.stop = start, stop

    def __call__(self, value: float) -> float:
        low, high = self.span
        return self.start + (self.stop - self.start) * (value - low) / (high - low)


def svg_line(x1: float, y1: float, x2: float, y2: float) -> str:
    """A thin line of a grid."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#dddddd"/>'


def svg_text(x: float, y: float, text: str, anchor: str) -> str:
    """One line of text; `anchor` is start, middle or end."""
    words = html.escape(text)
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#222222">{words}</text>'


def grid(
    inputs: Float[Tensor, "K 3 H W"],
    shown: Mapping[str, Sequence[Float[Tensor, "K 3 H W"]]],
    edits: Sequence[str],
) -> Image.Image:
    """All methods side by side: a row each, for every picture input, reconstruction and edits."""
    size, columns = inputs.shape[2], 2 + len(edits)
    width = LABEL_PX + len(inputs) * (columns * size + 4)
    canvas = Image.new("RGB", (width, 16 + size * len(shown)), "white")
    draw = ImageDraw.Draw(canvas)
    for at, title in enumerate(("input", "found", *edits)):
        draw.text((LABEL_PX + at * size + 2, 2), title, fill="black")
    for row, (name, versions) in enumerate(shown.items()):
        y = 16 + row * size
        draw.text((2, y + size // 2 - 6), name, fill="black")
        for picture in range(len(inputs)):
            x = LABEL_PX + picture * (columns * size + 4)
            tiles = torch.stack([inputs[picture], *(version[picture] for version in versions)])
            for column, pixels in enumerate(to_bytes(tiles).numpy()):
                canvas.paste(Image.fromarray(pixels), (x + column * size, y))
    return canvas
