"""Fixtures shared by all suites."""

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image

from models.stylegan2.generator import Generator, GeneratorArchitecture
from tests.s3_server import S3Server

if TYPE_CHECKING:
    from tests.e2e.small_dataset import Dataset

ROOT = Path(__file__).resolve().parent.parent

os.environ["COLUMNS"] = "300"  # no line of a command's answer breaks where a test's folder is long


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real pictures and reference outputs; tests that need it skip without it."""
    path = Path(os.environ.get("REFINERY_SHARED", ROOT.parent / "shared"))
    if not path.is_dir():
        pytest.skip(f"no shared data at {path}; set REFINERY_SHARED")
    return path.resolve()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is read from or left in the user's cache, also by programs that tests start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFINERY_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def make_tiny_generator(seed: int = 0, resolution: int = 32) -> Generator:
    """A small random generator: every mechanism of a large one, milliseconds a picture."""
    widths = {res: 16 if res <= 8 else 8 for res in (4, 8, 16, 32, 64) if res <= resolution}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        generator = Generator(
            GeneratorArchitecture(
                resolution=resolution, widths=widths, z_dim=16, w_dim=16, mapping_layers=2
            )
        )
        for index in range(generator.num_convs):
            torch.nn.init.constant_(generator.conv(index).noise.weight, 0.1)
        z = torch.randn(1000, generator.z_dim)
    generator.latent_avg.copy_(generator.mapping(z)[:, 0].mean(0).detach())
    return generator.eval().requires_grad_(False)


@pytest.fixture
def tiny_generator() -> Generator:
    return make_tiny_generator()


def make_picture(seed: int, size: int = 48) -> Image.Image:
    """A smooth random picture."""
    values = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((size, size), Image.Resampling.BICUBIC)


def make_picture_bytes(seed: int) -> bytes:
    """The same, encoded as PNG."""
    return as_png(make_picture(seed))


def as_png(picture: Image.Image | np.ndarray) -> bytes:
    """Pixels may be anything that is cut off to 0..255."""
    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture.clip(0, 255).astype("uint8"))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="session")
def face_bytes() -> list[bytes]:
    """Eight encoded PNG pictures."""
    return [make_picture_bytes(seed) for seed in range(8)]


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory, face_bytes: list[bytes]) -> "Dataset":
    """Eleven loose pictures and a broken one, which nobody changes, and the config of a run."""
    from tests.e2e.small_dataset import write_dataset

    return write_dataset(tmp_path_factory.mktemp("dataset"), make_tiny_generator(), face_bytes)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """Moto's S3 server, one for the session."""
    server = S3Server()
    yield server
    server.stop()


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """URL of an empty bucket (s3://...); the environment leads every S3 client there."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server.make_bucket()
