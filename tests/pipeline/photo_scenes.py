"""Photographs with faces in known places, made when a test asks for them."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image
from skimage.data import astronaut, chelsea, coffee

from models.checkpoints.native import save_generator
from pipeline.demo_data import ASTRONAUT_POINTS_PX
from tests.conftest import make_tiny_generator

BACKGROUNDS = (coffee, chelsea)
BORDER = 0.08
"""Of a pasted square's side, over which it fades into the background."""
Square = tuple[Image.Image, np.ndarray]
"""A square picture of a face, and its five points in 0..1."""


def astronaut_square() -> Square:
    """The one face that may go anywhere, with hair and neck around it."""
    left, top, side = 140, 30, 175
    points = (np.array(ASTRONAUT_POINTS_PX) - (left, top)) / side
    return Image.fromarray(astronaut()[top : top + side, left : left + side]), points


def real_squares(shared: Path) -> list[Square]:
    """Held-out faces of the shared data, 128 px, and portraits, which lie on the same template."""
    faces = pq.read_table(shared / "data/faces/val128-000.parquet").to_pylist()
    template = np.mean([np.reshape(row["landmarks5"], (5, 2)) for row in faces], 0)
    squares = [(_open(row["image"]), np.reshape(row["landmarks5"], (5, 2))) for row in faces]
    for path in sorted((shared / "data/portraits").glob("*.parquet"))[:1]:
        rows = pq.read_table(path).slice(0, 60).to_pylist()
        squares += [(_open(row["image"]), template) for row in rows]
    return squares


def _open(value: object) -> Image.Image:
    data = value["bytes"] if isinstance(value, dict) else value
    return Image.open(io.BytesIO(data)).convert("RGB")


def scene(
    squares: list[Square], rng: np.random.Generator, size: tuple[int, int] = (960, 640)
) -> tuple[Image.Image, np.ndarray]:
    """A photograph with the squares side by side, each of another size and a little turned.

    Returns:
        The photograph, and the five points of each face in pixels [faces 5 2].
    """
    photo = Image.fromarray(BACKGROUNDS[rng.integers(len(BACKGROUNDS))]()).resize(size)
    cell, places = size[0] / len(squares), []
    for number, (picture, points) in enumerate(squares):
        side = rng.uniform(0.45, 0.75) * min(cell, size[1])
        turn = np.exp(1j * np.radians(rng.uniform(-15, 15)))
        centre = complex(cell * (number + 0.5), size[1] * rng.uniform(0.42, 0.58))
        places.append(paste_square(photo, picture, side * turn, centre, points))
    return photo, np.array(places)


def paste_square(
    photo: Image.Image, picture: Image.Image, across: complex, centre: complex, points: np.ndarray
) -> np.ndarray:
    """Draw a square picture about a place, its upper side along `across`; its points there."""
    corner = centre - across * (0.5 + 0.5j)
    step = picture.width / across
    start = -corner * step
    matrix = (step.real, -step.imag, start.real, step.imag, step.real, start.imag)
    y, x = np.mgrid[: picture.height, : picture.width] + 0.5
    inset = np.minimum(np.minimum(x, picture.width - x), np.minimum(y, picture.height - y))
    fade = Image.fromarray((np.clip(inset / picture.width / BORDER, 0, 1) * 255).astype(np.uint8))
    how = (photo.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
    photo.paste(picture.transform(*how), mask=fade.transform(*how))
    z = corner + across * (points @ [1, 1j])
    return np.stack([z.real, z.imag], 1)


def tiny_face_config(folder: Path) -> str:
    """A config of a tiny generator whose card names the template of faces, and one step."""
    path = save_generator(
        make_tiny_generator(), folder / "tiny.safetensors", {"terms": "test", "template": "face"}
    )
    config = folder / "config.toml"
    config.write_text(
        f'generator = "{path}"\nperceptual = "none"\n[[method]]\nname = "wplus"\nsteps = 1\n'
        'perceptual = "none"\n[engine]\nkind = "inline"\nshard_size = 5\n'
    )
    return str(config)


def files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())
