"""Pictures for training, held in memory as bytes.

Legend: M pictures, H W image.
"""

import io
from collections.abc import Sequence

import numpy as np
import pyarrow.parquet as pq
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from models.errors import AssetError


def load_pictures(paths: Sequence[str], resolution: int) -> UInt8[Tensor, "M 3 H W"]:
    """Read the `image` column (bytes, or {bytes, path}) of Parquet files, resized to a square.

    Raises:
        AssetError: a file is missing, has no `image` column, or there is no picture at all.
    """
    pictures: list[np.ndarray] = []
    for path in paths:
        try:
            column = pq.read_table(path, columns=["image"])["image"].to_pylist()
        except (OSError, KeyError, ValueError) as error:
            why = " ".join(str(error).split())[:200]
            raise AssetError(
                f"training data {path}: expected Parquet with a column `image`, found none ({why})"
            ) from error
        for value in column:
            data = value["bytes"] if isinstance(value, dict) else value
            image = Image.open(io.BytesIO(data)).convert("RGB")
            if image.size != (resolution, resolution):
                image = image.resize((resolution, resolution), Image.Resampling.BOX)
            pictures.append(np.asarray(image))
    if not pictures:
        raise AssetError(f"training data: no picture in {list(paths)}")
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()
