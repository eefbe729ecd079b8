"""What a training run of a moment reads."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from models.checkpoints.native import save_generator
from models.stylegan2.generator import Generator
from tasks.training.data import load_pictures
from tasks.training.trainer import TrainingConfig

SMALL: dict[str, Any] = {
    "width": 4,
    "units": (1, 1, 1, 1),
    "head_width": 8,
    "batch": 8,
    "images": 64,
    "log_images": 16,
    "checkpoint_images": 32,
    "validation_images": 4,
    "perceptual": "none",
}


@pytest.fixture
def generator_file(tmp_path: Path, tiny_generator: Generator) -> str:
    return str(save_generator(tiny_generator, tmp_path / "tiny.safetensors", {"terms": "test"}))


@pytest.fixture
def places(tmp_path: Path, generator_file: str, face_bytes: list[bytes]) -> dict[str, Any]:
    """Settings that every training has: generator, pictures, and the folder it writes to."""
    table = pa.table({"image": [{"bytes": data, "path": None} for data in face_bytes]})
    pq.write_table(table, tmp_path / "pictures.parquet")
    data = (str(tmp_path / "pictures.parquet"),)
    return {
        "generator": generator_file,
        "data": data,
        "validation": data,
        "out": str(tmp_path / "run"),
    }


def held_out(config: TrainingConfig) -> torch.Tensor:
    """What a run validates with, in [-1, 1]."""
    return load_pictures(config.validation, 32).float().div(127.5).sub(1)


def first_losses(make: Callable[[str], Any], term: str) -> tuple[float, float]:
    """The first loss of an objective, made for full and for half precision."""
    losses = []
    for precision in ("float32", "bfloat16"):
        torch.manual_seed(0)
        objective = make(precision)
        torch.manual_seed(1)
        losses.append(float(objective.step(torch.empty(0, 3, 32, 32), 0)[term].mean().detach()))
    full, half = losses
    return full, half
