"""Alignment brings five points to the template, without aliasing, and refuses what is no face."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from models.errors import AssetError, ConfigError, SampleError
from tasks.input.align import FACE_POINTS, similarity, template_points, with_template
from tasks.input.align import align as align_all
from tasks.input.decode import decode
from tasks.input.ffhq import ffhq_points
from tasks.input.sample import RawSample
from tasks.job import InputConfig

FACE = np.array(FACE_POINTS)
ALIGN = InputConfig(fit="align", template="face")


def align(
    image: Image.Image, landmarks: np.ndarray | None, config: InputConfig, resolution: int
) -> np.ndarray:
    """The one crop's picture."""
    (crop,) = align_all(image, landmarks, config, resolution)
    if crop.error is not None:
        raise crop.error
    assert crop.picture is not None
    return crop.picture


def placed(size: tuple[int, int], side: float, degrees: float, centre: complex) -> np.ndarray:
    """Landmarks (0..1) of the template's face as a square of `side` pixels, turned, at `centre`."""
    z = (FACE[:, 0] - 0.5 + 1j * (FACE[:, 1] - 0.5)) * side * np.exp(1j * np.radians(degrees))
    z = z + centre
    return np.stack([z.real / size[0], z.imag / size[1]], axis=1)


def draw_spots(size: tuple[int, int], landmarks: np.ndarray, radius: float) -> Image.Image:
    """White Gaussian spots on black, one at each landmark."""
    y, x = np.mgrid[: size[1], : size[0]] + 0.5
    total = np.zeros(size[::-1])
    for point_x, point_y in landmarks * size:
        total += np.exp(-((x - point_x) ** 2 + (y - point_y) ** 2) / (2 * radius**2))
    values = np.clip(total * 255, 0, 255).astype(np.uint8)
    return Image.fromarray(np.repeat(values[..., None], 3, axis=2))


def spots_of(picture: np.ndarray, near: np.ndarray, reach: int) -> np.ndarray:
    """Centre of brightness of each spot, looked for around where it should be, in 0..1."""
    values, found = picture[..., 0].astype(float), []
    resolution = len(picture)
    y, x = np.mgrid[:resolution, :resolution] + 0.5
    for point in near * resolution:
        weight = values * ((x - point[0]) ** 2 + (y - point[1]) ** 2 < reach**2)
        found.append([(weight * x).sum() / weight.sum(), (weight * y).sum() / weight.sum()])
    return np.array(found) / resolution


@pytest.mark.parametrize("template", ["face", "ffhq"])
@pytest.mark.parametrize(
    ("size", "side", "degrees"),
    [
        ((64, 64), 64, 0),
        ((90, 70), 40, 15),  # enlarged
        ((300, 200), 150, -30),
        ((640, 480), 300, 75),
        ((1400, 1000), 900, 170),
        ((1000, 1400), 600, -90),
    ],
)
def test_points_come_to_the_template(
    size: tuple[int, int], side: float, degrees: float, template: str
) -> None:
    resolution = 64
    landmarks = placed(size, side, degrees, size[0] * 0.5 + 1j * size[1] * 0.52)
    image = draw_spots(size, landmarks, radius=side / 40)
    config = InputConfig(fit="align", template=template)
    picture = align(image, landmarks, config, resolution)
    assert picture.shape == (64, 64, 3)
    target = template_points(template)
    found = spots_of(picture, target, reach=6)
    assert np.abs(found - target).max() * resolution < 0.5


def test_identity_where_the_face_is_in_place() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    found = align(Image.fromarray(rgb), FACE, ALIGN, 64)
    assert np.abs(found.astype(int) - rgb).max() <= 1


def test_similarity_against_umeyama_by_singular_values() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        landmarks = placed((100, 80), 40, rng.uniform(-180, 180), 50 + 40j)
        landmarks += rng.normal(0, 0.02, (5, 2))
        a, b = similarity((100, 80), landmarks, FACE * 64)
        source, target = landmarks * (100, 80), FACE * 64
        s, t = source - source.mean(0), target - target.mean(0)
        u, d, v = np.linalg.svd(t.T @ s)
        sign = np.diag([1, np.sign(np.linalg.det(u @ v))])
        turn = u @ sign @ v
        scale = (d * np.diag(sign)).sum() / (s**2).sum()
        shift = target.mean(0) - scale * turn @ source.mean(0)
        np.testing.assert_allclose([a.real, a.imag], scale * turn[:, 0], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose([b.real, b.imag], shift, rtol=1e-9, atol=1e-9)


def test_outside_is_the_reflection() -> None:
    """A gradient cut at the left edge of the picture goes on as its mirror image."""
    ramp = np.tile(np.arange(64, dtype=np.uint8) * 3 + 20, (64, 1))
    image = Image.fromarray(np.repeat(ramp[..., None], 3, axis=2))
    landmarks = FACE - (0.25, 0)  # the template shows 16 pixels left of the picture
    row = align(image, landmarks, ALIGN, 64)[32, :, 0].astype(int)
    np.testing.assert_allclose(row[16:64], ramp[0, :48], atol=1)
    np.testing.assert_allclose(row[:16], ramp[0, :16][::-1], atol=1)


def test_a_face_much_larger_than_the_picture() -> None:
    image = Image.fromarray(np.full((8, 8, 3), 77, np.uint8))
    landmarks = placed((8, 8), 12, 10, 4 + 4j)
    assert (align(image, landmarks, ALIGN, 64) == 77).all()


def test_making_smaller_is_free_of_aliasing() -> None:
    board = (np.indices((1024, 1024)).sum(0) % 2 * 255).astype(np.uint8)
    image = Image.fromarray(board).convert("RGB")
    for side in (150, 500, 1000):  # 2.3 to 15.6 pixels of the picture for each of the result
        found = align(image, placed(image.size, side, 20, 512 + 512j), ALIGN, 64).astype(float)
        assert abs(found.mean() - 127.5) < 2
        assert found.std() < 4


def test_jpeg_decoded_small_agrees_with_png() -> None:
    base = np.random.default_rng(2).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    image = Image.fromarray(base).resize((1500, 1200), Image.Resampling.BICUBIC)
    landmarks = placed(image.size, 900, 12, 750 + 600j)
    found = {}
    for kind, options in (("PNG", {"compress_level": 1}), ("JPEG", {"quality": 95})):
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        sample = RawSample("key", "uri", buffer.getvalue(), landmarks.astype(np.float32))
        found[kind] = decode(sample, ALIGN, 64).astype(float)
    assert np.abs(found["PNG"] - found["JPEG"]).mean() < 1


def test_landmarks_are_those_of_the_upright_picture() -> None:
    landmarks = placed((300, 200), 120, 10, 160 + 90j)
    upright = draw_spots((300, 200), landmarks, radius=4)
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    upright.transpose(Image.Transpose.ROTATE_90).save(buffer, "JPEG", quality=95, exif=exif)
    picture = decode(RawSample("k", "u", buffer.getvalue(), landmarks), ALIGN, 32)
    found = spots_of(picture, FACE, reach=4)
    assert np.abs(found - FACE).max() * 32 < 0.5


def failure(landmarks: np.ndarray | None, config: InputConfig = ALIGN) -> str:
    with pytest.raises(SampleError) as caught:
        align(Image.new("RGB", (64, 64)), landmarks, config, 32)
    assert caught.value.kind == "align"
    return str(caught.value)


def test_degenerate_landmarks() -> None:
    assert "not finite" in failure(FACE * [[np.nan, 1]])
    assert "not finite" in failure(FACE + np.inf)
    assert "all in one place" in failure(np.full((5, 2), 0.5))
    assert "expected x and y in 0..1" in failure(FACE * 64)
    assert "expected x and y in 0..1" in failure(FACE - 3)
    assert "not arranged like a face" in failure(FACE * (-1, 1) + (1, 0))
    assert "not arranged like a face" in failure(FACE[[1, 0, 2, 4, 3]])
    assert "no landmarks: 'landmarks5' is empty here" in failure(None)


def find_spots(picture: np.ndarray) -> np.ndarray | None:
    """A detector for tests: the template's points, or nothing on a black picture."""
    assert picture.dtype == np.uint8
    return FACE if picture.any() else None


def find_wrongly(picture: np.ndarray) -> list[float]:
    return [1.0, 2.0]


def find_never(picture: np.ndarray) -> None:
    raise IndexError("a bug")


def test_detector(monkeypatch: pytest.MonkeyPatch) -> None:
    def config(name: str) -> InputConfig:
        return InputConfig(fit="align", template="face", detector=name)

    import sys

    monkeypatch.setitem(sys.modules, "spot_detector", sys.modules[__name__])
    rgb = np.random.default_rng(0).integers(1, 256, (64, 64, 3), dtype=np.uint8)
    found = align(Image.fromarray(rgb), None, config("spot_detector:find_spots"), 64)
    assert np.abs(found.astype(int) - rgb).max() <= 1
    assert "found no face" in failure(None, config("spot_detector:find_spots"))
    assert "shape [2]" in failure(None, config("spot_detector:find_wrongly"))
    assert "the detector failed: IndexError('a bug')" in failure(
        None, config("spot_detector:find_never")
    )
    for wrong in ("spot_detector:none", "no_such_module_here:f", "spot_detector", "x:"):
        with pytest.raises(ConfigError, match=r"package\.module:function"):
            align(Image.fromarray(rgb), None, config(wrong), 64)


def test_ffhq_template_by_the_published_rule() -> None:
    """Cut the face by the rule as published, in numbers, and look where its points land."""
    eye_left, eye_right, _, mouth_left, mouth_right = FACE * 1000
    eye, mouth = (eye_left + eye_right) / 2, (mouth_left + mouth_right) / 2
    x = (eye_right - eye_left) - np.flipud(mouth - eye) * [-1, 1]
    x /= np.hypot(*x)
    x *= max(np.hypot(*(eye_right - eye_left)) * 2.0, np.hypot(*(mouth - eye)) * 1.8)
    y = np.flipud(x) * [-1, 1]
    corner = eye + (mouth - eye) * 0.1 - x - y
    axes = np.stack([2 * x, 2 * y], axis=1)
    expected = np.linalg.solve(axes, (FACE * 1000 - corner).T).T
    np.testing.assert_allclose(template_points("ffhq"), expected, atol=1e-9)
    known = [[0.375, 0.475], [0.625, 0.475], [0.498, 0.627], [0.383, 0.728], [0.617, 0.727]]
    np.testing.assert_allclose(template_points("ffhq"), known, atol=1e-3)
    turned = (FACE - 0.5) @ [[0.6, 0.8], [-0.8, 0.6]] * 3 + 2
    np.testing.assert_allclose(ffhq_points(turned), expected, atol=1e-9)


def test_template_from_a_file(tmp_path: Path) -> None:
    for name, value in (("a", FACE.tolist()), ("b", {"points": FACE.tolist()})):
        (tmp_path / name).write_text(json.dumps(value))
        np.testing.assert_array_equal(template_points(str(tmp_path / name)), FACE)
    for name, text in (("c", "[[1, 2]]"), ("d", "{}"), ("e", "no json"), ("f", "[[0, 0]]")):
        (tmp_path / name).write_text(text)
        with pytest.raises(AssetError, match=r"five pairs in 0\.\.1"):
            template_points(str(tmp_path / name))
    with pytest.raises(AssetError, match="no such file"):
        template_points(str(tmp_path / "none.json"))


def test_real_faces_hardly_move(shared: Path) -> None:
    """Faces that were aligned to the template before come out nearly as they are."""
    from tasks.input.read import read_shard
    from tasks.job import ShardSpec

    uri = str(shared / "data/faces/val64-000.parquet")
    spec = ShardSpec(id=0, kind="parquet", uri=uri, row_start=0, row_stop=64)
    for sample in read_shard(spec, ALIGN):
        aligned = decode(sample, ALIGN, 64).astype(float)
        plain = decode(sample, InputConfig(), 64).astype(float)
        assert np.corrcoef(aligned.ravel(), plain.ravel())[0, 1] > 0.7


def test_a_published_checkpoint_has_no_card() -> None:
    assert with_template(InputConfig(), None) == InputConfig()
    with pytest.raises(ConfigError, match="names no template to align faces to"):
        with_template(InputConfig(fit="align"), None)
