"""The crop of the FFHQ data set, step by step as its makers cut it, to the pixel.

The rule (Karras et al., "Progressive growing of GANs", 2018, appendix C): with e the vector
between the eyes and m the one from the eyes' middle to the mouth's, the crop's x axis is along
e - i m, half its side is max(2 |e|, 1.8 |m|), and its centre lies at the eyes' middle + 0.1 m. What
lies outside of the photograph is its reflection, blurred and faded to the median colour. Encoders
that were trained on FFHQ have learned these borders too.
"""

import math

import numpy as np
from jaxtyping import Complex128, Float64, UInt8
from PIL import Image

from tasks.input.face import as_complex, as_points

OVERSAMPLE = 4
"""The quadrilateral is sampled at 4096 pixels a side for a crop of 1024."""
CORNERS = np.array([-1 - 1j, -1 + 1j, 1 + 1j, 1 - 1j])
"""Of the crop, in halves of its side from its centre, in the order of Pillow's QUAD."""


def ffhq_square(points: Float64[np.ndarray, "5 2"]) -> tuple[complex, complex]:
    """Centre of the crop and the vector from there to the middle of its right side."""
    z = as_complex(points)
    eyes, mouth = (z[0] + z[1]) / 2, (z[3] + z[4]) / 2
    e, m = z[1] - z[0], mouth - eyes
    axis = e - 1j * m
    return eyes + 0.1 * m, axis / abs(axis) * max(2.0 * abs(e), 1.8 * abs(m))


def ffhq_points(face: Float64[np.ndarray, "5 2"]) -> Float64[np.ndarray, "5 2"]:
    """Where the crop puts the five points of a given face, in 0..1."""
    centre, half = ffhq_square(face)
    placed = (as_complex(face) - centre) / (2 * half)  # the crop is -1/2..1/2 along its own axes
    return as_points(placed) + 0.5


def ffhq_crop(
    image: Image.Image, points: Float64[np.ndarray, "5 2"], resolution: int
) -> tuple[UInt8[np.ndarray, "H W 3"], complex, complex]:
    """The crop of an RGB picture, and (a, b) of z -> a z + b from the picture to the crop.

    Args:
        points: in pixels, (0, 0) the picture's upper left corner.
    """
    # The published code counts from the centre of the first pixel.
    centre, half = ffhq_square(points - 0.5)
    quad, side = centre + half * CORNERS, 2 * abs(half)
    full = image.size
    shrink = math.floor(side / resolution * 0.5)
    if shrink > 1:
        small = np.rint(np.array(full) / shrink).astype(int)
        image = image.resize((int(small[0]), int(small[1])), Image.Resampling.LANCZOS)
        quad, side = quad / shrink, side / shrink
    scale = (image.width / full[0], image.height / full[1])
    border = max(int(np.rint(side * 0.1)), 3)
    image, at = _cropped(image, quad, border)
    padded, pad = _padded(image, quad - at, border, side)
    moved = quad - at + pad + (0.5 + 0.5j)
    fine = OVERSAMPLE * resolution
    sampled = padded.transform(
        (fine, fine),
        Image.Transform.QUAD,
        as_points(moved).flatten().tolist(),
        Image.Resampling.BILINEAR,
    )
    crop = sampled.resize((resolution, resolution), Image.Resampling.LANCZOS)
    # Where the corners lie in the picture itself: shrinking by whole numbers has moved them a bit.
    drawn = (quad.real + 0.5) / scale[0] + 1j * (quad.imag + 0.5) / scale[1]
    a = resolution * 2 / complex(drawn[3] - drawn[0] + (drawn[1] - drawn[0]) / 1j)
    return np.array(crop), a, resolution * (0.5 + 0.5j) - a * complex(drawn.mean())


def _bounds(quad: Complex128[np.ndarray, "4"]) -> tuple[int, int, int, int]:
    low, high = as_points(quad).min(0), as_points(quad).max(0)
    return math.floor(low[0]), math.floor(low[1]), math.ceil(high[0]), math.ceil(high[1])


def _cropped(
    image: Image.Image, quad: Complex128[np.ndarray, "4"], border: int
) -> tuple[Image.Image, complex]:
    """The part around the crop, and where its upper left corner is."""
    left, top, right, bottom = _bounds(quad)
    box = (
        max(left - border, 0),
        max(top - border, 0),
        min(right + border, image.width),
        min(bottom + border, image.height),
    )
    if box[2] - box[0] < image.width or box[3] - box[1] < image.height:
        return image.crop(box), complex(box[0], box[1])
    return image, 0j


def _padded(
    image: Image.Image, quad: Complex128[np.ndarray, "4"], border: int, side: float
) -> tuple[Image.Image, complex]:
    """The picture with what the crop needs outside of it, and how far its corner has moved."""
    left, top, right, bottom = _bounds(quad)
    needed = (-left, -top, right - image.width, bottom - image.height)
    beyond = [max(length + border, 0) for length in needed]
    if max(beyond) <= border - 4:
        return image, 0j
    left, top, right, bottom = (max(length, int(np.rint(side * 0.3))) for length in beyond)
    pixels = np.pad(
        np.asarray(image, dtype=np.float32), ((top, bottom), (left, right), (0, 0)), mode="reflect"
    )
    height, width, _ = pixels.shape
    y, x = np.float32(np.arange(height)[:, None, None]), np.float32(np.arange(width)[:, None])
    fade = np.maximum(
        1.0 - np.minimum(x / left, (width - 1 - x) / right),
        1.0 - np.minimum(y / top, (height - 1 - y) / bottom),
    )
    blur = side * 0.02
    from scipy.ndimage import gaussian_filter  # takes as long to load as a small run

    pixels += (gaussian_filter(pixels, [blur, blur, 0]) - pixels) * np.clip(fade * 3.0 + 1.0, 0, 1)
    pixels += (np.median(pixels, axis=(0, 1)) - pixels) * np.clip(fade, 0.0, 1.0)
    rounded = np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
    return Image.fromarray(rounded), complex(left, top)
