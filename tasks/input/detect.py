"""Looking for faces in a photograph, and whether a picture shows one where the template has it."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from models.errors import AssetError, ConfigError, SampleError
from tasks.input.face import as_complex
from tasks.input.sample import parse_landmarks
from tasks.job import InputConfig

if TYPE_CHECKING:
    from models.detection.mtcnn import Mtcnn

MTCNN = "mtcnn"
LEAST_SCORE = 0.5
"""Of what stands in the template's place; the 255 held-out faces have more than 0.85."""
FURTHEST_OFF = 0.08
"""Mean distance of the five points from where an upright face has them, in sides of the square;
held-out faces stay below 0.06, turned by 30 degrees or 1.5 times as large they exceed it."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """A face before it is cut out.

    Attributes:
        number: among the photograph's, largest first; None where the photograph is the sample.
        points: in 0..1 of width and height.
        box, score: see `tasks.input.face.Face`.
    """

    points: np.ndarray
    number: int | None = None
    box: tuple[float, float, float, float] | None = None
    score: float | None = None


def find_faces(image: Image.Image, input: InputConfig) -> list[Found]:
    """The faces of an upright RGB photograph that become samples.

    Raises:
        SampleError: kind "align": no detector is set, it found none, or it failed.
        ConfigError, AssetError: it cannot be loaded.
    """
    if input.detector is None:
        raise SampleError(
            "align",
            f"no landmarks: {input.landmarks_column!r} is empty here and input.detector is not set",
        )
    if input.detector != MTCNN:
        return [Found(points=_ask(load_function(input.detector), image, input.detector))]
    faces = load_mtcnn().find(image, input.min_face)
    if not faces:
        raise SampleError("align", f"mtcnn found no face of {input.min_face} pixels or more")
    found = [
        Found(points=face.points / image.size, number=number, box=face.box, score=face.score)
        for number, face in enumerate(faces)
    ]
    if finds_several(input):
        return found
    return [Found(points=found[0].points, box=found[0].box, score=found[0].score)]


def finds_several(input: InputConfig) -> bool:
    """Whether a photograph may become several samples."""
    return input.fit == "align" and input.detector == MTCNN and input.faces == "all"


def shows_face(picture: Image.Image, corner: complex, across: complex) -> bool:
    """Whether a face stands upright in a square of an RGB picture: the last network of mtcnn alone,
    a few milliseconds.

    Args:
        corner, across: the square, see `Mtcnn.look`.
    """
    points, score = load_mtcnn().look(picture, corner, across)
    off = (points - corner) / across - upright_points()
    return score > LEAST_SCORE and float(np.abs(off).mean()) < FURTHEST_OFF


def face_square(template: np.ndarray) -> tuple[complex, complex]:
    """Corner and upper side of the square in which mtcnn sees a face on a template."""
    squares = importlib.import_module("models.detection.mtcnn").upright_squares
    corner, across = squares(as_complex(template)[None])
    return complex(corner[0]), complex(across[0])


def upright_points() -> np.ndarray:
    """Where an upright face has its five points in the square that mtcnn puts about it, x + iy."""
    return importlib.import_module("models.detection.mtcnn").UPRIGHT_POINTS


def has_mtcnn() -> bool:
    """Whether its weights are installed."""
    try:
        load_mtcnn()
    except AssetError:
        return False
    return True


def load_mtcnn() -> "Mtcnn":
    """The detector; torch is loaded with it.

    Raises:
        AssetError: its weights are not installed; says what to install.
    """
    return importlib.import_module("models.detection.mtcnn").load_mtcnn()


@lru_cache(maxsize=4)
def load_function(path: str) -> Callable[[np.ndarray], object]:
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
            '"mtcnn", or "package.module:function" of an installed package'
        ) from problem
    if not callable(found):
        raise ConfigError(f"input.detector {path!r} is a {type(found).__name__}, not a function")
    return found


def _ask(detector: Callable[[np.ndarray], object], image: Image.Image, name: str) -> np.ndarray:
    try:
        points = parse_landmarks(detector(np.array(image)))
    except SampleError:
        raise
    except Exception as problem:
        raise SampleError("align", f"the detector failed: {problem!r}") from problem
    if points is None:
        raise SampleError("align", f"{name} found no face")
    return points
