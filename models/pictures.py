"""Pictures as 8-bit pixels, and grids of them as PNG files.

Legend: N pictures, H W image.
"""

from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor


def to_bytes(images: Float[Tensor, "N 3 H W"]) -> UInt8[Tensor, "N H W 3"]:
    """[-1, 1] to 0..255, rounded to the nearest level."""
    return images.mul(127.5).add(127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def save_grid(images: Float[Tensor, "N 3 H W"], path: Path, columns: int) -> None:
    """Write images in [-1, 1], row by row, to a PNG."""
    pixels = to_bytes(images)
    n, h, w, _ = pixels.shape
    rows = -(-n // columns)
    canvas = torch.full((rows * h, columns * w, 3), 255, dtype=torch.uint8)
    for index in range(n):
        y, x = divmod(index, columns)
        canvas[y * h : (y + 1) * h, x * w : (x + 1) * w] = pixels[index]
    Image.fromarray(canvas.numpy()).save(path)
