"""One sample on its way from the reader to the Parquet parts: a row, failed or complete.

Legend: N batch, L num_ws, D w_dim, H W picture.
"""

import hashlib
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from models.errors import SampleError
from models.inversion.base import Inversion, sample_seed
from tasks.input.decode import decode
from tasks.input.read import RawSample
from tasks.job import JobConfig
from tasks.work.invert import Inverted

SUFFIX = {"png": "png", "webp": "webp", "jpeg": "jpg"}


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
        doors: float16 arrays by column name (`stored_doors`).
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

    def fail(self, kind: str, reason: str) -> None:
        """Mark the row as failed."""
        # Python prints addresses in some messages; they would differ from run to run.
        self.error_kind, self.error = kind, re.sub(r" at 0x[0-9a-f]+", "", reason)[:2000]
        self.pictures.clear()


def decode_row(raw: RawSample, job: JobConfig, resolution: int) -> tuple[Row, np.ndarray | None]:
    """The row of a sample and its picture, uint8 [H W 3]; a failed row has none."""
    row = Row(
        sample_key=raw.key,
        image_uri=raw.uri,
        image_sha256=None if raw.data is None else hashlib.sha256(raw.data).hexdigest(),
        seed=sample_seed(job.seed, raw.key),
    )
    try:
        if raw.error is not None:
            raise raw.error
        return row, decode(raw, job.input, resolution)
    except SampleError as error:
        row.fail(error.kind, str(error))
        return row, None


def fill_row(inverted: Inverted, job: JobConfig, at: int, sample: tuple[Row, np.ndarray]) -> None:
    """Put result number `at` of a batch into its sample's row, pictures encoded."""
    row, picture = sample
    if at in inverted.failures:
        row.fail(*inverted.failures[at])
        return
    row.w_plus = inverted.inversion.w_plus[at].numpy()
    row.metrics = {name: float(values[at]) for name, values in inverted.metrics.items()}
    row.doors = stored_doors(inverted.inversion, at)
    found = {"input": picture, "inversion": inverted.pictures[at]}
    row.pictures = {
        name: encode_picture(found[name], job.output.picture_format) for name in job.output.pictures
    }


def stored_doors(inversion: Inversion, at: int) -> dict[str, np.ndarray]:
    """The doors of row `at` besides w_plus, named as `Inversion.tensors` does: float16 arrays, and
    the 8-bit codes of tuned weights."""
    tensors = inversion.stored().tensors()
    return {
        name: (value[at].half() if value.is_floating_point() else value[at]).numpy()
        for name, value in tensors.items()
        if name != "w_plus"
    }


def encode_picture(pixels: np.ndarray, picture_format: str) -> bytes:
    """Encode uint8 [H W 3]: png, webp without loss; jpeg at quality 95, chroma not subsampled."""
    buffer = io.BytesIO()
    options: Mapping[str, Any] = {
        "png": {"compress_level": 3},  # 3x faster than the default 6, 6-16 % larger
        "webp": {"lossless": True, "quality": 20, "method": 1},
        "jpeg": {"quality": 95, "subsampling": 0},
    }[picture_format]
    Image.fromarray(pixels).save(buffer, picture_format.upper(), **options)
    return buffer.getvalue()
