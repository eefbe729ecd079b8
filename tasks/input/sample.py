"""One encoded picture as it comes out of an input, before decoding."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32

from models.errors import SampleError, ShardError

_JPEG, _TIFF, _PNM = ("jpg", "jpeg", "jpe", "jfif"), ("tif", "tiff"), ("ppm", "pgm", "pbm", "pnm")
IMAGE_SUFFIXES = frozenset((*_JPEG, "png", "webp", "bmp", "gif", *_TIFF, "jp2", "avif", *_PNM))
"""File name endings (any case) that count as pictures; what decodes is decided by the bytes."""


class CorruptFileError(ShardError):
    """A tar or Parquet file is damaged: no later try will help."""


@dataclass(frozen=True)
class RawSample:
    """One sample of a shard, readable or not.

    Attributes:
        key: unique in the run: the file's name relative to the input; `<tar name>:<member key>`;
            `<Parquet name>:<row>`, or the value of `input.key_column`.
        uri: where the picture lies: the file, `<tar>#<member>` or `<Parquet file>#row=<row>`.
        data: the encoded picture; None where `error` is set.
        landmarks: five (x, y) in 0..1 of the upright picture, or None.
        error: why the sample cannot be used.
    """

    key: str
    uri: str
    data: bytes | None
    landmarks: Float32[np.ndarray, "5 2"] | None = None
    error: SampleError | None = None


def failed(key: str, uri: str, kind: str, reason: str) -> RawSample:
    """A sample that becomes a failed row."""
    return RawSample(key, uri, None, None, SampleError(kind, reason))


def is_image_name(name: str) -> bool:
    """Whether a file name ends like a picture's."""
    return name.rpartition(".")[2].lower() in IMAGE_SUFFIXES


def parse_landmarks(value: Any) -> Float32[np.ndarray, "5 2"] | None:
    """Ten numbers or five pairs, from a column or a JSON member; None stays None.

    Raises:
        SampleError: kind "align", for any other shape or for what is no number.
    """
    if value is None:
        return None
    try:
        points = np.asarray(value, dtype=np.float32)
    except Exception as problem:  # numpy's words for nesting, size and type are many
        kind = type(value).__name__
        shown = f": {value[:80]!r}" if isinstance(value, str) else f", but a {kind}"
        raise SampleError("align", f"landmarks are not numbers{shown} ({problem})") from problem
    if points.shape not in ((10,), (5, 2)):
        raise SampleError(
            "align",
            f"landmarks have shape {list(points.shape)}; expected five (x, y) pairs: "
            "left eye, right eye, nose, left and right mouth corner",
        )
    return points.reshape(5, 2)
