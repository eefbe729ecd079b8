"""A face in a photograph, where it stands and how it was brought onto the generator's template."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Complex128, Float64, UInt8

from models.errors import SampleError


@dataclass(frozen=True, kw_only=True)
class Face:
    """Where a face is, in pixels of the upright photograph, (0, 0) its upper left corner.

    Attributes:
        points: left eye, right eye, nose, left and right mouth corner, as the viewer sees them.
        transform: (a, b) of z -> a z + b, z = x + iy, from the photograph to the crop's pixels.
        box, score: left, top, right, bottom, and 0..1, of a detector that tells them.
    """

    points: Float64[np.ndarray, "5 2"]
    transform: tuple[complex, complex]
    box: tuple[float, float, float, float] | None = None
    score: float | None = None


@dataclass(frozen=True, kw_only=True)
class Crop:
    """A sample's picture at the generator's size, cut from a photograph or the whole of it.

    Attributes:
        number: of the face in its photograph, largest first; None where the photograph is the
            sample.
        picture: None where `error` is set.
        looks_aligned: whether the face is where the template has it; None where nobody looked.
    """

    number: int | None = None
    picture: UInt8[np.ndarray, "H W 3"] | None = None
    face: Face | None = None
    looks_aligned: bool | None = None
    error: SampleError | None = None


def as_complex(points: np.ndarray) -> Complex128[np.ndarray, "5"]:
    """(x, y) to x + iy."""
    return points[:, 0] + 1j * points[:, 1]


def as_points(places: np.ndarray) -> Float64[np.ndarray, "K 2"]:
    """x + iy to (x, y)."""
    return np.stack([np.real(places), np.imag(places)], axis=1)


def face_key(photo_key: str, number: int | None) -> str:
    """The key of a face: "photo.jpg#0"; of a photograph that is the sample, its own."""
    return photo_key if number is None else f"{photo_key}#{number}"


def photo_keys(keys: Iterable[str], known: Collection[str]) -> list[str]:
    """The photographs of samples, each once where its faces are numbered from 0 without a gap. The
    keys of others, and what looks like a face's key but has no number, come back as they are.

    Args:
        known: keys of photographs.
    """
    photos: list[str] = []
    numbers: dict[str, set[str]] = {}
    for key in keys:
        photo, _, number = key.rpartition("#")
        if key in known or photo not in known:
            photos.append(key)
        else:
            numbers.setdefault(photo, set()).add(number)
    for photo, found in numbers.items():
        faces = {number for number in found if number.isdecimal()}
        photos += [f"{photo}#{number}" for number in found - faces]
        if faces and faces == {str(number) for number in range(len(faces))}:
            photos.append(photo)
    return photos
