"""Putting a face back into the photograph that it was cut from, at the photograph's resolution.

A crop's pixel u comes from the photograph's place z with u = a z + b (`tasks.input.align`). So each
pixel of the photograph asks where in the crop it lies, how much of it belongs to the face (the
mask), and takes that share of the new face. Where the mask is 0 nothing is written.

Legend: H W the part of the photograph around the face, C its channels, R side of the crop.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge, Le
from jaxtyping import Complex128, Float32, Float64, UInt8
from PIL import Image
from scipy.ndimage import gaussian_filter

from tasks.input.face import Face, as_complex

OVAL = (1.18, 1.32, 0.42)
"""Half width of a face in eye distances, half height and how far its centre lies below the eyes in
distances from eyes to mouth."""
RIM = 0.04
"""Of the crop's side, on which every mask fades out: there is no picture beyond."""
MATCH_REACH = 0.2
"""How far a difference of colour at the seam reaches into the face, in sides of the crop."""
MATCH_SIDE = 96
"""The difference is smooth: it is computed on so many pixels a side at most."""


@dataclass(frozen=True, kw_only=True)
class PasteConfig:
    """How a face is put back."""

    __pydantic_config__ = {"extra": "forbid"}

    mask: Literal["face", "square"] = "face"
    """face: the oval about the five points; square: all of the crop."""
    feather: Annotated[float, Ge(0.02), Le(1.0)] = 0.35
    """Width of the soft border, as a share of the mask's radius."""
    match: Annotated[float, Ge(0.0), Le(1.0)] = 1.0
    """How much of the difference of colour at the seam is taken out of the face."""
    content: Literal["auto", "face", "change"] = "auto"
    """face: the picture itself; change: what it changed of its inversion is added to the
    photograph, whose own detail stays; auto: change for edits by directions alone, else face."""


def paste(
    photo: UInt8[np.ndarray, "PH PW C"],
    face: Face,
    picture: UInt8[np.ndarray, "R R C"],
    inversion: UInt8[np.ndarray, "R R C"] | None,
    config: PasteConfig,
) -> float:
    """Write a face into an upright photograph, in place.

    Args:
        inversion: to add what the picture changed of it, instead of the picture.

    Returns:
        The mean difference of colour along the seam before it was matched, 0..255; 0 where the face
        lies outside.
    """
    side = len(picture)
    box = _bounds(face, side, photo.shape)
    if box is None:
        return 0.0
    left, top, right, bottom = box
    around = photo[top:bottom, left:right]
    mask = _mask(face, side, box, config)
    before = around.astype(np.float32)
    after = _drawn(picture, face, box)
    if inversion is not None:
        after += before - _drawn(inversion, face, box)
    density = abs(face.transform[0])  # crop's pixels for one of the photograph
    shift, seam = _seam(before - after, mask, MATCH_REACH * side / density)
    after += config.match * shift
    mixed = before + mask[..., None] * (after - before)
    written = mask > 0
    around[written] = np.clip(np.rint(mixed[written]), 0, 255).astype(np.uint8)
    return seam


def _bounds(face: Face, side: int, shape: tuple[int, ...]) -> tuple[int, int, int, int] | None:
    """Left, top, right, bottom of the crop in the photograph."""
    a, b = face.transform
    corners = (np.array([0, side, 1j * side, side * (1 + 1j)]) - b) / a
    left, top = max(0, math.floor(corners.real.min())), max(0, math.floor(corners.imag.min()))
    right = min(shape[1], math.ceil(corners.real.max()))
    bottom = min(shape[0], math.ceil(corners.imag.max()))
    return (left, top, right, bottom) if left < right and top < bottom else None


def _mask(
    face: Face, side: int, box: tuple[int, int, int, int], config: PasteConfig
) -> Float32[np.ndarray, "H W"]:
    """0..1, smooth, 0 outside of the crop."""
    a, b = face.transform
    left, top, right, bottom = box
    x, y = np.arange(left, right) + 0.5, np.arange(top, bottom) + 0.5
    u = (a * (x[None] + 1j * y[:, None]) + b) / side
    inset = np.minimum(np.minimum(u.real, 1 - u.real), np.minimum(u.imag, 1 - u.imag))
    if config.mask == "square":
        return _smooth(inset / (0.5 * config.feather))
    return _smooth(inset / RIM) * _smooth((1 - _oval(face, side, u)) / config.feather)


def _oval(face: Face, side: int, u: Complex128[np.ndarray, "H W"]) -> Float64[np.ndarray, "H W"]:
    """Distance from the face's middle in the crop (0..1), 1 on its outline."""
    a, b = face.transform
    eye_left, eye_right, _, *mouth = (a * as_complex(face.points) + b) / side
    eyes, lips = (eye_left + eye_right) / 2, sum(mouth) / 2
    wide, high, below = OVAL
    # A profile's eyes are close together, and its face is as wide as others.
    height = abs(lips - eyes)
    width = max(abs(eye_right - eye_left), 0.8 * height)
    down = (lips - eyes) / height
    placed = (u - (eyes + below * (lips - eyes))) / (down / 1j)
    return np.hypot(placed.real / (wide * width), placed.imag / (high * height))


def _smooth(x: np.ndarray) -> Float32[np.ndarray, "H W"]:
    """0 below 0, 1 above 1, with a smooth slope between."""
    x = np.clip(x, 0, 1)
    return (x * x * (3 - 2 * x)).astype(np.float32)


def _drawn(
    picture: UInt8[np.ndarray, "R R C"], face: Face, box: tuple[int, int, int, int]
) -> Float32[np.ndarray, "H W C"]:
    """The crop as it lies in a part of the photograph: bicubic, and LANCZOS where it gets smaller.
    Beyond its border the last pixels go on."""
    a, b = face.transform
    left, top, right, bottom = box
    side = len(picture)
    shown = Image.fromarray(picture.squeeze())
    if abs(a) > 1:
        small = max(1, round(side / abs(a)))
        shown = shown.resize((small, small), Image.Resampling.LANCZOS)
        a, b, side = a * small / side, b * small / side, small
    pad = 3
    edged = Image.fromarray(
        np.pad(
            np.asarray(shown).reshape(side, side, -1), ((pad, pad), (pad, pad), (0, 0)), "edge"
        ).squeeze()
    )
    start = a * complex(left, top) + b + pad * (1 + 1j)
    matrix = (a.real, -a.imag, start.real, a.imag, a.real, start.imag)
    size = (right - left, bottom - top)
    drawn = edged.transform(size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
    return np.asarray(drawn, dtype=np.float32).reshape(*size[::-1], -1)


def _seam(
    difference: Float32[np.ndarray, "H W C"], mask: Float32[np.ndarray, "H W"], reach: float
) -> tuple[Float32[np.ndarray, "H W C"], float]:
    """What the difference along the seam says of everything inside: its Gaussian mean, by nearness.
    And its mean size."""
    weight = mask * (1 - mask)
    total = float(weight.sum())
    if not total:
        return np.zeros_like(difference), 0.0
    seam = float(np.abs((difference * weight[..., None]).sum((0, 1)) / total).mean())
    height, width = mask.shape
    shrink = max(1.0, max(height, width) / MATCH_SIDE)
    size = (max(1, round(width / shrink)), max(1, round(height / shrink)))

    def spread(values: np.ndarray) -> np.ndarray:
        small = Image.fromarray(values).resize(size, Image.Resampling.BOX)
        return gaussian_filter(np.asarray(small), reach / shrink, mode="constant")

    near = spread(weight) + 1e-6
    fields = [
        Image.fromarray(spread(difference[..., channel] * weight) / near).resize(
            (width, height), Image.Resampling.BILINEAR
        )
        for channel in range(difference.shape[2])
    ]
    return np.stack([np.asarray(each) for each in fields], axis=2), seam
