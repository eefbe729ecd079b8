"""One sample on its way from the reader to the Parquet parts: a row, failed or complete.

Legend: N batch, L num_ws, D w_dim, H W picture.
"""

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from tasks.job import THUMBNAIL_PX

if TYPE_CHECKING:
    from tasks.input.face import Face

SUFFIX = {"png": "png", "webp": "webp", "jpeg": "jpg"}
THUMBNAIL_QUALITY = 85


@dataclass(kw_only=True)
class Row:
    """One sample.

    Attributes:
        image_sha256: of the encoded input, None where it could not be read.
        seed: of the sample's random stream.
        error_kind, error: set together; a failed row has no codes, scores or pictures.
        w_plus: float32 [L D].
        metrics: by column name.
        pictures: encoded, by column name ("input", "inversion").
        doors: float16 arrays by column name; 8-bit codes of tuned weights.
        vectors: what an index keeps: "code", uint8, and "exact", float16.
        face: where it stands in its photograph, of samples that were aligned.
        looks_aligned: of those that were not: whether the face is where the template has it; None
            where nobody looked.
        texts: by column name.
    """

    sample_key: str
    image_uri: str
    image_sha256: str | None
    seed: int
    error_kind: str | None = None
    error: str | None = None
    w_plus: np.ndarray | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    pictures: dict[str, bytes] = field(default_factory=dict)
    doors: dict[str, np.ndarray] = field(default_factory=dict)
    vectors: dict[str, np.ndarray] = field(default_factory=dict)
    face: "Face | None" = None
    looks_aligned: bool | None = None
    texts: dict[str, str] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Of codes, doors and pictures."""
        arrays = [*self.doors.values(), *([] if self.w_plus is None else [self.w_plus])]
        return sum(map(len, self.pictures.values())) + sum(array.nbytes for array in arrays)

    def fail(self, kind: str, reason: str) -> None:
        """Mark the row as failed."""
        # Python prints addresses in some messages; they would differ from run to run.
        self.error_kind, self.error = kind, re.sub(r" at 0x[0-9a-f]+", "", reason)[:2000]
        self.pictures.clear()


def encode_picture(pixels: np.ndarray, picture_format: str, quality: int | None = None) -> bytes:
    """Encode uint8 [H W 3]: png, webp without loss; jpeg at quality 95, chroma not subsampled.

    Args:
        quality: 1 to 100, of jpeg; with it webp is lossy.
    """
    from PIL import Image

    buffer = io.BytesIO()
    options: Mapping[str, Any] = {
        "png": {"compress_level": 3},  # 3x faster than the default 6, 6-16 % larger
        "webp": {"quality": quality, "method": 4}
        if quality
        else {"lossless": True, "quality": 20, "method": 1},
        "jpeg": {"quality": quality or 95, "subsampling": 0},
    }[picture_format]
    Image.fromarray(pixels).save(buffer, picture_format.upper(), **options)
    return buffer.getvalue()


def encode_thumbnail(pixels: np.ndarray) -> bytes:
    """uint8 [H W 3], at most `THUMBNAIL_PX` a side, as JPEG."""
    from PIL import Image

    image = Image.fromarray(pixels)
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.LANCZOS)
    return encode_picture(np.asarray(image), "jpeg", THUMBNAIL_QUALITY)


def picture_suffix(name: str, picture_format: str) -> str:
    """Of files of a column of images/."""
    return SUFFIX["jpeg" if name == "thumbnail" else picture_format]
