"""Encoded pictures as data URIs, small enough that a page of them opens on a phone."""

import base64
import io

from PIL import Image

MAX_SIDE_PX = 384
"""Larger pictures are reduced for the page; smaller ones are embedded as they are stored."""
PIXELATED_SIDE_PX = 128
"""Up to this size a picture is shown with its pixels, enlarged; above, smooth."""

_TYPES = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}


def is_pixelated(encoded: bytes) -> bool:
    """Whether a picture is so small that its pixels should be seen as squares."""
    with Image.open(io.BytesIO(encoded)) as image:
        return max(image.size) <= PIXELATED_SIDE_PX


def data_uri(encoded: bytes) -> str:
    """A picture for an `img` element."""
    with Image.open(io.BytesIO(encoded)) as image:
        kind = _TYPES.get(image.format or "")
        if kind is None or max(image.size) > MAX_SIDE_PX:
            image.thumbnail((MAX_SIDE_PX, MAX_SIDE_PX), Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, "JPEG", quality=90)
            encoded, kind = buffer.getvalue(), "image/jpeg"
    return f"data:{kind};base64,{base64.b64encode(encoded).decode()}"
