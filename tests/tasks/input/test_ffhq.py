"""The FFHQ crop is the published one, to the pixel.

The pictures beside this file were cut from `skimage.data.astronaut()` (public domain) by
`recreate_aligned_images` of NVIDIA's ffhq-dataset at output_size 32, transform_size 128, with the
points of points.json less half a pixel: it counts from the centre of the first pixel.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage.data import astronaut

from tasks.input.align import align
from tasks.input.ffhq import ffhq_points
from tasks.job import InputConfig

RECORDED = Path(__file__).with_name("ffhq")
POINTS = json.loads((RECORDED / "points.json").read_text())


@pytest.mark.parametrize("name", ["inside", "border", "large"])
def test_a_crop_is_the_published_one(name: str) -> None:
    photo, points = Image.fromarray(astronaut()), np.array(POINTS[name])
    config = InputConfig(fit="align", template="ffhq")
    (crop,) = align(photo, points / photo.size, config, 32)
    expected = np.array(Image.open(RECORDED / f"{name}.png"))
    np.testing.assert_array_equal(crop.picture, expected)


@pytest.mark.parametrize("name", ["inside", "border", "large"])
def test_the_transform_says_where_the_points_went(name: str) -> None:
    """Shrinking by whole numbers moves the crop; the transform knows, to a fifth of a pixel."""
    photo, points = Image.fromarray(astronaut()), np.array(POINTS[name])
    config = InputConfig(fit="align", template="ffhq")
    (crop,) = align(photo, points / photo.size, config, 32)
    assert crop.face is not None
    a, b = crop.face.transform
    placed = a * (points @ [1, 1j]) + b
    ideal = ffhq_points(points) * 32 @ [1, 1j]
    assert np.abs(placed - ideal).max() < 0.5
    np.testing.assert_allclose(crop.face.points, points)
