"""Portraits of several styles in one Parquet file: a fifth of each is held out, decided by its id.

Legend: M held-out portraits, H W image.
"""

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from models.errors import ConfigError

HELD_OUT_SHARE = 5
"""One portrait in so many is never trained on."""


def is_held_out(name: str) -> bool:
    """Whether a portrait belongs to the fifth that only scores: decided by its id alone, so that
    every training and every benchmark leaves out the same ones."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % HELD_OUT_SHARE == 0


@dataclass(frozen=True, kw_only=True)
class Portraits:
    """One style, split by the hash of the identifier.

    Attributes:
        training: encoded pictures by identifier, sorted.
        held_out: pictures in [-1, 1] that no domain is adapted to.
    """

    training: Mapping[str, bytes]
    held_out: Float[Tensor, "M 3 H W"]


def read_portraits(path: str, resolution: int) -> dict[str, Portraits]:
    """Portraits by style from a Parquet file with columns `id`, `image` and `style`.

    Raises:
        ConfigError: no such file or column, or a style with fewer than two held-out pictures.
    """
    try:
        rows = pq.read_table(path, columns=["id", "image", "style"]).to_pylist()
    except (OSError, KeyError, ValueError) as error:
        found = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise ConfigError(
            f"portraits {path}: expected a Parquet file with columns id, image, style ({found})"
        ) from error
    found = {}
    for style in sorted({row["style"] for row in rows}):
        own = sorted((r for r in rows if r["style"] == style), key=lambda r: r["id"])
        held_out = [_picture(r["image"], resolution) for r in own if is_held_out(r["id"])]
        if len(held_out) < 2:
            raise ConfigError(f"portraits {path}: style {style} has fewer than 2 held out")
        found[style] = Portraits(
            training={r["id"]: _bytes(r["image"]) for r in own if not is_held_out(r["id"])},
            held_out=torch.stack(held_out),
        )
    return found


def _bytes(value: Any) -> bytes:
    return value["bytes"] if isinstance(value, dict) else value


def _picture(value: Any, resolution: int) -> Float[Tensor, "3 H W"]:
    image = Image.open(io.BytesIO(_bytes(value))).convert("RGB")
    if image.size != (resolution, resolution):
        image = image.resize((resolution, resolution), Image.Resampling.BOX)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
