"""Five points of a face onto the five points of a template.

Points are left eye, right eye, nose, left and right mouth corner, as the viewer sees them, (x, y)
in 0..1 of width and height of the upright picture. The map is the least-squares similarity
(Umeyama, "Least-squares estimation of transformation parameters between two point patterns", 1991):
turn, scale and shift, no mirroring. In complex numbers it is z -> a z + b, with
a = sum(conj(z - mean z) (t - mean t)) / sum |z - mean z|^2.
"""

import importlib
import json
import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from jaxtyping import Complex128, Float64, UInt8
from PIL import Image

from models.errors import AssetError, ConfigError, SampleError
from tasks.input.sample import parse_landmarks
from tasks.job import InputConfig
from tasks.storage.files import read_bytes

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
) -> UInt8[np.ndarray, "H W 3"]:
    """Turn, scale and shift an upright RGB picture so that its face fits the template.

    What the template shows of the outside of the picture is its reflection. Making smaller is free
    of aliasing: LANCZOS to twice the target density, bicubic warp at twice the resolution, LANCZOS.

    Raises:
        SampleError: kind "align": no landmarks, none found, or no face can have them.
        ConfigError: the detector cannot be loaded. AssetError: the template cannot.
    """
    if landmarks is None:
        landmarks = _detect(image, input)
    a, b = similarity(image.size, landmarks, template_points(input.template) * resolution)
    return _warp(image, a, b, resolution)


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
    z, t = _complex(points * size), _complex(target)
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
    """The five target points in 0..1: "face", "ffhq", or a JSON file of five (x, y) pairs.

    Raises:
        AssetError: the file is missing or does not hold five pairs of numbers.
    """
    if template == "face":
        return np.array(FACE_POINTS)
    if template == "ffhq":
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


def ffhq_points(face: Float64[np.ndarray, "5 2"]) -> Float64[np.ndarray, "5 2"]:
    """Where the crop of the FFHQ data set puts the five points of a given average face.

    The rule (Karras et al., "Progressive growing of GANs", 2018, appendix C): with e the vector
    between the eyes and m the one from the eyes' middle to the mouth's, the crop's x axis is along
    e - rot90(m), half its side is max(2 |e|, 1.8 |m|), and its centre lies at the eyes' middle
    + 0.1 m.
    """
    z = _complex(face)
    eyes, mouth = (z[0] + z[1]) / 2, (z[3] + z[4]) / 2
    e, m = z[1] - z[0], mouth - eyes
    axis = e - 1j * m
    half = axis / abs(axis) * max(2.0 * abs(e), 1.8 * abs(m))
    placed = (z - (eyes + 0.1 * m)) / (2 * half)  # the crop is -1/2..1/2 along its own axes
    return np.stack([placed.real + 0.5, placed.imag + 0.5], axis=1)


def _detect(image: Image.Image, input: InputConfig) -> np.ndarray:
    if input.detector is None:
        raise SampleError(
            "align",
            f"no landmarks: {input.landmarks_column!r} is empty here and input.detector is not set",
        )
    detector = load_detector(input.detector)
    try:
        points = parse_landmarks(detector(np.array(image)))
    except SampleError:
        raise
    except Exception as problem:
        raise SampleError("align", f"the detector failed: {problem!r}") from problem
    if points is None:
        raise SampleError("align", f"{input.detector} found no face")
    return points


@lru_cache(maxsize=4)
def load_detector(path: str) -> Callable[[np.ndarray], object]:
    """The function behind "package.module:function": uint8 [H W 3] -> five (x, y) in 0..1, or None.

    Raises:
        ConfigError: there is no such module or function.
    """
    module, _, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as problem:
        raise ConfigError(
            f"input.detector {path!r} cannot be loaded ({problem}); expected "
            '"package.module:function" of an installed package'
        ) from problem
    if not callable(found):
        raise ConfigError(f"input.detector {path!r} is a {type(found).__name__}, not a function")
    return found


def _complex(points: np.ndarray) -> Complex128[np.ndarray, "5"]:
    return points[:, 0] + 1j * points[:, 1]


def _in_words(points: np.ndarray) -> str:
    return " ".join(f"({x:.3f},{y:.3f})" for x, y in points)
