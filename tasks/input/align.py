"""Five points of a face onto the five points of a template.

Points are left eye, right eye, nose, left and right mouth corner, as the viewer sees them, (x, y)
in 0..1 of width and height of the upright picture. The map is the least-squares similarity
(Umeyama, "Least-squares estimation of transformation parameters between two point patterns", 1991):
turn, scale and shift, no mirroring. In complex numbers it is z -> a z + b, with
a = sum(conj(z - mean z) (t - mean t)) / sum |z - mean z|^2.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Float64, UInt8
from PIL import Image

from models.errors import AssetError, ConfigError, SampleError
from tasks.input.detect import MTCNN, Found, find_faces, load_mtcnn
from tasks.input.face import Crop, Face, as_complex
from tasks.input.ffhq import ffhq_crop, ffhq_points
from tasks.job import InputConfig
from tasks.storage.files import read_bytes

AUTO, FACE, FFHQ = "auto", "face", "ffhq"
FACE_POINTS = ((0.299, 0.290), (0.690, 0.291), (0.492, 0.528), (0.312, 0.686), (0.678, 0.685))
"""The template of the bundled generator: where its training faces have the five points."""
LEAST_LIKENESS = 0.5
"""Correlation of the points with the template, below which they are no face at all. A thousand
training faces lie between 0.95 and 1; left and right swapped give 0.05."""
FURTHEST = 0.5
"""Landmarks may lie so far outside of the picture, in widths and heights."""
OVERSAMPLE = 2
"""Samples a side for each output pixel where the picture is made smaller."""


def align(
    image: Image.Image,
    landmarks: np.ndarray | None,
    input: InputConfig,
    resolution: int,
    full_size: tuple[int, int] | None = None,
) -> list[Crop]:
    """Turn, scale and shift an upright RGB photograph so that its face fits the template; with a
    detector, each of its faces. One that cannot be aligned is a crop with its error.

    What the template shows of the outside of the picture is its reflection. Making smaller is free
    of aliasing: LANCZOS to twice the target density, bicubic warp at twice the resolution, LANCZOS.
    For "ffhq" it is the published recipe instead, see `tasks.input.ffhq`.

    Args:
        landmarks: in 0..1; None to look for faces.
        full_size: of the photograph, where it was decoded smaller.

    Raises:
        SampleError: kind "align": no landmarks, none found.
        ConfigError, AssetError: the detector or the template cannot be loaded.
    """
    found = [Found(points=landmarks)] if landmarks is not None else find_faces(image, input)
    return [_cut(image, face, input, resolution, full_size or image.size) for face in found]


def _cut(
    image: Image.Image, found: Found, input: InputConfig, resolution: int, full: tuple[int, int]
) -> Crop:
    points, target = found.points, template_points(input.template) * resolution
    try:
        a, b = similarity(full, points, target)
        if input.template == FFHQ:
            picture, a, b = ffhq_crop(image, points * full, resolution)
        else:
            picture = _warp(image, *similarity(image.size, points, target), resolution)
    except SampleError as error:
        return Crop(number=found.number, error=error)
    face = Face(
        points=np.asarray(points * full, dtype=np.float64),
        transform=(a, b),
        box=found.box,
        score=found.score,
    )
    return Crop(number=found.number, picture=picture, face=face)


def with_template(input: InputConfig, card: Mapping[str, Any] | None) -> InputConfig:
    """The settings with the template that a generator's card names in the place of "auto".

    Args:
        card: None of a checkpoint that has none, as the published ones.

    Raises:
        ConfigError: pictures are to be aligned, and it names none.
    """
    if input.template != AUTO:
        return input
    named = card.get("template") if card else None
    if named is None and input.fit == "align":
        raise ConfigError(
            "input.template: the generator's card names no template to align faces to; set "
            'input.template to "face" (the bundled generator\'s), "ffhq", or a JSON file of five '
            "points"
        )
    return input if named is None else replace(input, template=named)


def input_hashes(input: InputConfig) -> dict[str, str]:
    """sha256 by name of what decides the crops as much as weights decide the codes.

    Raises:
        AssetError: the template's file or the detector's weights are missing.
    """
    if input.fit != "align":
        return {}
    found = {}
    if input.template not in (FACE, FFHQ):
        template = read_bytes(input.template, AssetError)
        found["input.template"] = hashlib.sha256(template).hexdigest()
    if input.detector == MTCNN:
        found["input.detector"] = load_mtcnn().hash
    return found


def similarity(
    size: tuple[int, int], landmarks: np.ndarray, target: Float64[np.ndarray, "5 2"]
) -> tuple[complex, complex]:
    """(a, b) with target = a z + b, z = x + iy in pixels of a picture of size (width, height).

    Raises:
        SampleError: kind "align": the landmarks are not finite, not in 0..1, all in one place, or
            not arranged like a face.
    """
    points = np.asarray(landmarks, dtype=np.float64)
    if not np.isfinite(points).all():
        raise SampleError("align", f"landmarks are not finite: {_in_words(points)}")
    if points.min() < -FURTHEST or points.max() > 1 + FURTHEST:
        raise SampleError(
            "align",
            f"landmarks lie outside of the picture: {_in_words(points)}; expected x and y in 0..1 "
            "of its width and height (not in pixels)",
        )
    z, t = as_complex(points * size), as_complex(target)
    z_mean, t_mean = z.mean(), t.mean()
    z, t = z - z_mean, t - t_mean
    spread = float(np.sum(np.abs(z) ** 2))
    if spread < 1.0:  # all within half a pixel
        raise SampleError("align", f"landmarks are all in one place: {_in_words(points)}")
    product = complex(np.sum(np.conj(z) * t))
    likeness = abs(product) / math.sqrt(spread * float(np.sum(np.abs(t) ** 2)))
    if likeness < LEAST_LIKENESS:
        raise SampleError(
            "align",
            f"landmarks are not arranged like a face (likeness {likeness:.2f}): "
            f"{_in_words(points)}; expected left eye, right eye, nose, left and right mouth corner "
            "as the viewer sees them",
        )
    a = product / spread
    return a, complex(t_mean) - a * complex(z_mean)


def jpeg_size_for(
    size: tuple[int, int], landmarks: np.ndarray, input: InputConfig, resolution: int
) -> tuple[int, int]:
    """The smallest decoded size that leaves two pixels for each output pixel of the face.

    Raises:
        SampleError, AssetError: as `align`.
    """
    a, _ = similarity(size, landmarks, template_points(input.template) * resolution)
    scale = min(1.0, OVERSAMPLE * abs(a))
    return math.ceil(size[0] * scale), math.ceil(size[1] * scale)


def _warp(
    image: Image.Image, a: complex, b: complex, resolution: int
) -> UInt8[np.ndarray, "H W 3"]:
    density = 1 / abs(a)  # source pixels for each output pixel
    sampling = OVERSAMPLE if density > 1 else 1
    corners = np.array([0, resolution, 1j * resolution, resolution * (1 + 1j)])
    source = (corners - b) / a
    # Bicubic sampling reaches two pixels out, LANCZOS three of the reduced ones.
    margin = 4 * max(1.0, density / OVERSAMPLE)
    box = (
        math.floor(source.real.min() - margin),
        math.floor(source.imag.min() - margin),
        math.ceil(source.real.max() + margin),
        math.ceil(source.imag.max() + margin),
    )
    inside = _inside(box, image.size)
    patch = image.crop(inside)
    shrink_x = shrink_y = 1.0
    if density > OVERSAMPLE:
        width = max(1, round(patch.width * OVERSAMPLE / density))
        height = max(1, round(patch.height * OVERSAMPLE / density))
        shrink_x, shrink_y = patch.width / width, patch.height / height
        patch = patch.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)
    pad_left = math.ceil((inside[0] - box[0]) / shrink_x)
    pad_top = math.ceil((inside[1] - box[1]) / shrink_y)
    pad_right = math.ceil((box[2] - inside[2]) / shrink_x)
    pad_bottom = math.ceil((box[3] - inside[3]) / shrink_y)
    if pad_left or pad_top or pad_right or pad_bottom:
        # "symmetric" mirrors at the edge of the picture, not at the centre of its last pixel.
        pads = ((pad_top, pad_bottom), (pad_left, pad_right), (0, 0))
        patch = Image.fromarray(np.pad(np.asarray(patch), pads, mode="symmetric"))
    # Output sample u of resolution * sampling lies at z = (u / sampling - b) / a of the picture.
    step, start = 1 / (a * sampling), -b / a
    coefficients = (
        step.real / shrink_x,
        -step.imag / shrink_x,
        (start.real - inside[0]) / shrink_x + pad_left,
        step.imag / shrink_y,
        step.real / shrink_y,
        (start.imag - inside[1]) / shrink_y + pad_top,
    )
    side = resolution * sampling
    warped = patch.transform(
        (side, side), Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC
    )
    if sampling > 1:
        warped = warped.resize((resolution, resolution), Image.Resampling.LANCZOS)
    return np.array(warped)


def _inside(box: tuple[int, int, int, int], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The part of a box that the picture covers.

    Raises:
        SampleError: kind "align": none.
    """
    inside = (max(box[0], 0), max(box[1], 0), min(box[2], size[0]), min(box[3], size[1]))
    if inside[0] >= inside[2] or inside[1] >= inside[3]:
        raise SampleError("align", "the face lies outside of the picture")
    return inside


@lru_cache(maxsize=16)
def template_points(template: str) -> Float64[np.ndarray, "5 2"]:
    """The five target points in 0..1: "face", "ffhq" (those of the average face of "face"), or a
    JSON file of five (x, y) pairs.

    Raises:
        AssetError: the file is missing or does not hold five pairs of numbers.
    """
    if template == FACE:
        return np.array(FACE_POINTS)
    if template == FFHQ:
        return ffhq_points(np.array(FACE_POINTS))
    data = read_bytes(template, AssetError)
    expected = 'expected [[x, y], ...] or {"points": [[x, y], ...]}, five pairs in 0..1'
    try:
        value = json.loads(data)
        points = np.asarray(value["points"] if isinstance(value, dict) else value, dtype=np.float64)
    except (ValueError, KeyError, TypeError) as problem:
        raise AssetError(f"input.template {template}: {problem!r}; {expected}") from problem
    if points.shape != (5, 2) or not np.isfinite(points).all() or np.ptp(points, axis=0).min() == 0:
        raise AssetError(f"input.template {template}: found shape {points.shape}; {expected}")
    return points


def _in_words(points: np.ndarray) -> str:
    return " ".join(f"({x:.3f},{y:.3f})" for x, y in points)
