"""Faces are found where they are, however the photograph is turned; elsewhere none are."""

import numpy as np
import pytest
from PIL import Image
from skimage.data import astronaut, coffee

from models.detection import mtcnn
from models.detection.mtcnn import Mips, load_mtcnn, suppressed, upright_squares
from models.errors import AssetError
from pipeline.demo_data import ASTRONAUT_POINTS_PX

pytest.importorskip("joblib")
PHOTO = Image.fromarray(astronaut())
KNOWN = np.array(ASTRONAUT_POINTS_PX)
TURNS = {
    "upright": (None, lambda p: p),
    "left": (Image.Transpose.ROTATE_90, lambda p: np.stack([p[:, 1], 512 - p[:, 0]], 1)),
    "over": (Image.Transpose.ROTATE_180, lambda p: 512 - p),
    "right": (Image.Transpose.ROTATE_270, lambda p: np.stack([512 - p[:, 1], p[:, 0]], 1)),
}


@pytest.mark.parametrize("name", TURNS)
def test_the_five_points_of_a_photograph(name: str) -> None:
    turn, moved = TURNS[name]
    photo = PHOTO if turn is None else PHOTO.transpose(turn)
    (face,) = load_mtcnn().find(photo)
    off = np.hypot(*(face.points - moved(KNOWN)).T)  # the eyes are 43 pixels apart
    assert off[:2].max() < 2
    assert off.max() < 5
    assert face.score > 0.99
    left, top, right, bottom = face.box
    assert (moved(KNOWN) > (left, top)).all()
    assert (moved(KNOWN) < (right, bottom)).all()
    assert 60 < face.side < 150


def test_the_same_photograph_gives_the_same_bytes() -> None:
    (first,), (second,) = (load_mtcnn().find(PHOTO) for _ in range(2))
    np.testing.assert_array_equal(first.points, second.points)
    assert (first.box, first.score) == (second.box, second.score)


def test_where_there_is_no_face_none_is_found() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    for picture in (noise, np.full((40, 40, 3), 90, np.uint8), coffee()):
        assert load_mtcnn().find(Image.fromarray(picture)) == []


def test_faces_smaller_than_asked_for_are_left_out() -> None:
    assert load_mtcnn().find(PHOTO, min_face=200) == []


def test_a_face_looked_at_in_its_place_and_beside_it() -> None:
    (corner,), (across,) = upright_squares((KNOWN @ [1, 1j])[None])
    points, score = load_mtcnn().look(PHOTO, corner, across)
    assert score > 0.99
    assert np.abs(points - KNOWN @ [1, 1j]).max() < 4
    assert load_mtcnn().look(PHOTO, corner + 250j, across)[1] < 0.1


def test_suppression() -> None:
    boxes = np.array([[0, 0, 10, 10], [1, 0, 11, 10], [20, 0, 30, 10], [2, 2, 5, 5]], float)
    scores = np.array([0.8, 0.9, 0.7, 0.6])
    assert suppressed(boxes, scores, 0.5).tolist() == [1, 2, 3]
    assert suppressed(boxes, scores, 0.5, is_of_smaller=True).tolist() == [1, 2]
    assert suppressed(boxes, scores, 0.9).tolist() == [1, 0, 2, 3]


def test_a_patch_shows_its_square_without_aliasing() -> None:
    """A gradient keeps its values through halving and turning; a fine board turns grey."""
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None], 256, 0)
    gradient = Mips(Image.fromarray(np.stack([ramp, ramp.T, ramp], 2)))
    (patch,) = gradient.patches(np.array([160 + 40j]), np.array([96j]), 24)
    x, y = np.meshgrid(np.arange(24) + 0.5, np.arange(24) + 0.5)
    expected = np.stack([160 - 4 * y, 40 + 4 * x], 2) - 0.5
    assert np.abs(np.asarray(patch)[..., :2] - expected).max() < 2
    board = (np.indices((512, 512)).sum(0) % 2 * 255).astype(np.uint8)
    mips = Mips(Image.fromarray(board).convert("RGB"))
    (patch,) = mips.patches(np.array([60 + 20j]), np.array([400 + 30j]), 24)
    assert np.asarray(patch).std() < 3


def test_a_detector_that_is_missing_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mtcnn, "PACKAGE", "no_such_package_here")
    load_mtcnn.cache_clear()
    with pytest.raises(AssetError, match=r"pip install -c constraints.txt 'style-refinery\[faces"):
        load_mtcnn()
    monkeypatch.undo()
    assert load_mtcnn() is load_mtcnn()
