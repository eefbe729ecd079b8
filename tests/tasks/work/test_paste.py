"""A face put back: where the mask says, in the photograph's colours, and nowhere else."""

import numpy as np
import pytest
from PIL import Image

from tasks.input.align import FACE_POINTS, align
from tasks.input.face import Face
from tasks.job import InputConfig
from tasks.work.paste import PasteConfig, paste

SIDE = 64
FACE = np.array(FACE_POINTS)


def placed(size: tuple[int, int], side: float, degrees: float, centre: complex) -> np.ndarray:
    """Landmarks (0..1) of the template's face as a turned square of `side` pixels at `centre`."""
    z = (FACE @ [1, 1j] - (0.5 + 0.5j)) * side * np.exp(1j * np.radians(degrees)) + centre
    return np.stack([z.real / size[0], z.imag / size[1]], axis=1)


def smooth_photo(seed: int = 0) -> np.ndarray:
    small = np.random.default_rng(seed).integers(40, 216, (7, 9, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize((300, 200), Image.Resampling.BICUBIC))


def cut(photo: np.ndarray, side: float, degrees: float, centre: complex) -> tuple[Face, np.ndarray]:
    landmarks = placed((300, 200), side, degrees, centre)
    config = InputConfig(fit="align", template="face")
    (crop,) = align(Image.fromarray(photo), landmarks, config, SIDE)
    assert crop.face is not None
    assert crop.picture is not None
    return crop.face, crop.picture


def inside(face: Face, shape: tuple[int, ...], margin: float = 0.0) -> np.ndarray:
    """Pixels of the photograph in the crop."""
    y, x = np.mgrid[: shape[0], : shape[1]] + 0.5
    u = (face.transform[0] * (x + 1j * y) + face.transform[1]) / SIDE
    return (np.minimum(u.real, u.imag) > margin) & (np.maximum(u.real, u.imag) < 1 - margin)


@pytest.mark.parametrize("mask", ["face", "square"])
@pytest.mark.parametrize(
    ("side", "degrees", "centre"),
    [(100, 0, 150 + 100j), (40, 30, 80 + 60j), (150, -100, 150 + 100j), (120, 10, 20 + 190j)],
)
def test_what_was_cut_out_goes_back_where_it_was(
    mask: str, side: float, degrees: float, centre: complex
) -> None:
    """The crop itself put back changes nothing but by resampling; nothing changes beyond it."""
    before = smooth_photo()
    face, picture = cut(before, side, degrees, centre)
    after = before.copy()
    paste(after, face, picture, None, PasteConfig(mask=mask, match=0.0))  # type: ignore[arg-type]
    assert np.abs(after.astype(int) - before).max() <= 6
    white = before.copy()
    paste(white, face, np.full_like(picture, 255), None, PasteConfig(mask=mask, match=0.0))  # type: ignore[arg-type]
    changed = (white != before).any(2)
    assert changed.any()
    assert not (changed & ~inside(face, before.shape)).any()
    if mask == "square":
        assert (white[inside(face, before.shape, 0.2)] == 255).all()


def test_the_mask_covers_the_five_points_and_is_soft() -> None:
    before = np.zeros((200, 300, 3), np.uint8)
    face, picture = cut(before, 120, 15, 150 + 100j)
    after = before.copy()
    paste(after, face, np.full_like(picture, 200), None, PasteConfig(match=0.0))
    for x, y in face.points:
        assert after[int(y), int(x)].min() >= 190
    steps = np.abs(np.diff(after[..., 0].astype(int), axis=1))
    assert 0 < steps.max() < 40


def test_colours_are_matched_at_the_seam() -> None:
    """A face 40 levels too bright comes back as it was, and the seam says by how much."""
    before = smooth_photo() // 2 + 40
    face, picture = cut(before, 110, 0, 150 + 100j)
    brighter = picture + 40
    after = before.copy()
    seam = paste(after, face, brighter, None, PasteConfig())
    assert seam == pytest.approx(40, abs=3)
    assert np.abs(after.astype(int) - before)[inside(face, before.shape)].mean() < 3
    plain = before.copy()
    paste(plain, face, brighter, None, PasteConfig(match=0.0))
    assert np.abs(plain.astype(int) - before)[inside(face, before.shape, 0.35)].mean() > 35


def test_a_change_keeps_the_detail_of_the_photograph() -> None:
    noise = np.random.default_rng(2).integers(-30, 31, (200, 300, 1))
    before = np.clip(smooth_photo().astype(int) + noise, 0, 255).astype(np.uint8)
    face, picture = cut(before, 200, 0, 150 + 100j)
    after = before.copy()
    paste(after, face, picture, picture, PasteConfig())
    np.testing.assert_array_equal(after, before)
    edited = np.clip(picture.astype(int) + np.array([0, 0, 20]), 0, 255).astype(np.uint8)
    paste(after, face, edited, picture, PasteConfig(match=0.0))
    middle = np.s_[80:120, 130:170]
    moved = after[middle].astype(int) - before[middle]
    assert np.abs(moved[..., :2]).max() <= 1
    assert moved[..., 2].mean() > 12


def test_a_face_outside_of_the_photograph_changes_nothing() -> None:
    before = smooth_photo()
    face = Face(points=FACE * 60 - 500, transform=(1 + 0j, 500 + 500j))
    after = before.copy()
    assert paste(after, face, np.zeros((SIDE, SIDE, 3), np.uint8), None, PasteConfig()) == 0.0
    np.testing.assert_array_equal(after, before)
