"""Every kind of picture against the pixels it must give, every damage against its reason."""

import io
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from models.errors import SampleError
from tasks.input.decode import decode
from tasks.input.sample import RawSample
from tasks.job import InputConfig

SIZE = 16
CROP = InputConfig()


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(data: bytes | None, resolution: int = SIZE, config: InputConfig = CROP) -> np.ndarray:
    picture = decode(RawSample("key", "uri", data), config, resolution)
    assert picture.shape == (resolution, resolution, 3)
    assert picture.dtype == np.uint8
    assert picture.flags.writeable
    return picture


def random_rgb(height: int = SIZE, width: int = SIZE) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=2)


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None].astype(float) / 255
    return colour * share + 255 * (1 - share)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM", "WEBP", "JPEG2000"])
def test_rgb_is_untouched(kind: str) -> None:
    rgb = random_rgb()
    options = {"lossless": True} if kind == "WEBP" else {}
    np.testing.assert_array_equal(decoded(encode(Image.fromarray(rgb), kind, **options)), rgb)


def test_jpeg() -> None:
    rgb = np.full((SIZE, SIZE, 3), (200, 100, 50), np.uint8)
    found = decoded(encode(Image.fromarray(rgb), "JPEG", quality=95))
    assert np.abs(found.astype(int) - rgb).max() <= 2


@pytest.mark.skipif(not features.check("avif"), reason="Pillow without AVIF")
def test_avif() -> None:
    rgb = np.full((SIZE, SIZE, 3), (200, 100, 50), np.uint8)
    found = decoded(encode(Image.fromarray(rgb), "AVIF", quality=95))
    assert np.abs(found.astype(int) - rgb).max() <= 4


def test_grey_and_bilevel() -> None:
    values = random_rgb()[..., 0]
    np.testing.assert_array_equal(decoded(encode(Image.fromarray(values))), grey(values))
    bits = values > 127
    picture = Image.fromarray(bits)
    assert picture.mode == "1"
    np.testing.assert_array_equal(decoded(encode(picture)), grey(bits * np.uint8(255)))


def test_transparency_is_laid_on_white() -> None:
    rgb = random_rgb()
    alpha = np.tile(np.array([0, 85, 170, 255], np.uint8), (SIZE, SIZE // 4))
    rgba = decoded(encode(Image.fromarray(np.dstack([rgb, alpha]))))
    np.testing.assert_allclose(rgba, on_white(rgb, alpha), atol=1)
    assert (rgba[:, 0] == 255).all()
    np.testing.assert_array_equal(rgba[:, 3], rgb[:, 3])
    la = decoded(encode(Image.fromarray(np.dstack([rgb[..., 0], alpha]), "LA")))
    np.testing.assert_allclose(la, on_white(grey(rgb[..., 0]), alpha), atol=1)


def palette_picture() -> Image.Image:
    picture = Image.fromarray(np.tile(np.arange(4, dtype=np.uint8), (SIZE, SIZE // 4)), "P")
    picture.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 8, 7])
    return picture


def test_palette() -> None:
    expected = [[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 8, 7]]
    for kind in ("PNG", "GIF", "BMP", "TIFF"):
        np.testing.assert_array_equal(decoded(encode(palette_picture(), kind))[5, :4], expected)


def test_palette_with_transparency() -> None:
    one_clear = decoded(encode(palette_picture(), transparency=1))
    np.testing.assert_array_equal(one_clear[0, :3], [[255, 0, 0], [255, 255, 255], [0, 0, 255]])
    half_clear = decoded(encode(palette_picture(), transparency=bytes([255, 0, 127, 255])))
    np.testing.assert_array_equal(
        half_clear[0, :4], [[255, 0, 0], [255, 255, 255], [128, 128, 255], [9, 8, 7]]
    )
    clear_gif = decoded(encode(palette_picture(), "GIF", transparency=2))
    np.testing.assert_array_equal(clear_gif[0, 1:3], [[0, 255, 0], [255, 255, 255]])


def test_colour_key() -> None:
    rgb = np.full((SIZE, SIZE, 3), (10, 20, 30), np.uint8)
    rgb[:, 1] = (1, 2, 3)
    found = decoded(encode(Image.fromarray(rgb), transparency=(1, 2, 3)))
    np.testing.assert_array_equal(found[0, :2], [[10, 20, 30], [255, 255, 255]])


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
def test_cmyk(kind: str) -> None:
    inks = np.zeros((SIZE, SIZE, 4), np.uint8)
    inks[:, :8] = (255, 0, 0, 0)
    inks[:, 8:] = (0, 0, 0, 128)
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    found = decoded(encode(Image.fromarray(inks, "CMYK"), kind, **options)).astype(int)
    assert np.abs(found[:, 2] - (0, 255, 255)).max() <= 2
    assert np.abs(found[:, 13] - (127, 127, 127)).max() <= 2


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_is_scaled_and_not_clipped(kind: str) -> None:
    values = np.linspace(0, 65535, SIZE * SIZE).astype(np.uint16).reshape(SIZE, SIZE)
    picture = Image.fromarray(values)
    assert picture.mode == "I;16"
    expected = np.rint(values / 257).astype(np.uint8)
    assert expected.max() == 255
    assert expected.min() == 0
    np.testing.assert_array_equal(decoded(encode(picture, kind)), grey(expected))


def test_16_bit_big_endian() -> None:
    values = (np.arange(SIZE * SIZE).reshape(SIZE, SIZE) * 256).astype(">u2")
    picture = Image.frombytes("I;16B", (SIZE, SIZE), values.tobytes())
    found = decoded(encode(picture, "TIFF"))
    np.testing.assert_array_equal(found, grey(np.rint(values / 257).astype(np.uint8)))


def test_32_bit_and_float() -> None:
    whole = np.linspace(0, 65535, SIZE * SIZE).astype(np.int32).reshape(SIZE, SIZE)
    found = decoded(encode(Image.fromarray(whole), "TIFF"))
    np.testing.assert_array_equal(found, grey(np.rint(whole / 257).astype(np.uint8)))
    share = np.linspace(0, 1, SIZE * SIZE, dtype=np.float32).reshape(SIZE, SIZE)
    found = decoded(encode(Image.fromarray(share), "TIFF"))
    np.testing.assert_array_equal(found, grey(np.rint(share * 255).astype(np.uint8)))
    for values in (whole * 2, share * 2, share * np.float32("nan")):
        with pytest.raises(SampleError, match="expected 0 to"):
            decoded(encode(Image.fromarray(values), "TIFF"))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animated_gives_the_first_frame(kind: str) -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    frames = [Image.new("RGB", (SIZE, SIZE), colour) for colour in colours]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    with Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 3
    assert (decoded(data) == colours[0]).all()


def test_two_pictures_in_one_jpeg_give_the_first() -> None:
    frames = [Image.new("RGB", (SIZE, SIZE), colour) for colour in ("red", "blue")]
    data = encode(frames[0], "MPO", save_all=True, append_images=frames[1:], quality=100)
    assert np.abs(decoded(data).astype(int) - (255, 0, 0)).max() <= 2


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(orientation: int, kind: str) -> None:
    """Stored turned, tagged with how to turn it back: comes out upright."""
    upright = np.array(Image.fromarray(random_rgb(2, 2)).resize((SIZE, SIZE), Image.NEAREST))
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: np.rot90(upright, 2).transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"exif": exif}
    options |= {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(
        kind, {}
    )
    found = decoded(encode(Image.fromarray(np.ascontiguousarray(stored)), kind, **options))
    assert np.abs(found.astype(int) - upright).max() <= (3 if kind == "JPEG" else 0)


def test_orientation_turns_the_crop_and_the_shape() -> None:
    """A wide picture stored tall: the middle of the upright one is cut out."""
    upright = np.zeros((SIZE, 3 * SIZE, 3), np.uint8)
    upright[:, SIZE : 2 * SIZE] = random_rgb()
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = np.ascontiguousarray(np.rot90(upright, 1))
    found = decoded(encode(Image.fromarray(stored), exif=exif))
    np.testing.assert_array_equal(found, random_rgb())


def test_damaged_exif_is_ignored() -> None:
    data = encode(Image.fromarray(random_rgb()), exif=b"Exif\0\0MM\0*\0\0\xff\xff broken")
    np.testing.assert_array_equal(decoded(data), random_rgb())


def test_crop_and_resize() -> None:
    rgb = np.zeros((SIZE, 2 * SIZE + 1, 3), np.uint8)
    rgb[:, SIZE // 2 : SIZE // 2 + SIZE] = random_rgb()
    data = encode(Image.fromarray(rgb))
    np.testing.assert_array_equal(decoded(data), random_rgb())
    stretched = decoded(data, config=InputConfig(fit="resize"))
    reference = Image.fromarray(rgb).resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(stretched, np.asarray(reference))
    assert stretched[:, :2].max() <= 8  # the black left quarter, but for ringing


def test_making_smaller_is_free_of_aliasing() -> None:
    """A fine checkerboard has one mean and no pattern, whatever decodes and shrinks it."""
    board = (np.indices((512, 512)).sum(0) % 2 * 255).astype(np.uint8)
    for kind in ("PNG", "JPEG"):
        found = decoded(encode(Image.fromarray(board), kind), 32).astype(float)
        assert abs(found.mean() - 127.5) < 1
        assert found.std() < 3


def test_large_jpegs_keep_their_detail() -> None:
    """Decoding at an eighth and then LANCZOS differs little from LANCZOS alone."""
    base = Image.fromarray(random_rgb(9, 9)).resize((1600, 1200), Image.Resampling.BICUBIC)
    data = encode(base, "JPEG", quality=95)
    found = decoded(data, 64).astype(float)
    reference = base.crop((200, 0, 1400, 1200)).resize((64, 64), Image.Resampling.LANCZOS)
    assert np.abs(found - np.asarray(reference, float)).mean() < 1


def test_same_bytes_every_time() -> None:
    data = encode(Image.fromarray(random_rgb(100, 130)), "JPEG")
    first = decoded(data)
    with ThreadPoolExecutor(4) as pool:
        for again in pool.map(decoded, [data] * 20):
            np.testing.assert_array_equal(again, first)


def failure(data: bytes | None, config: InputConfig = CROP) -> SampleError:
    with pytest.raises(SampleError) as caught:
        decoded(data, config=config)
    return caught.value


def test_too_large_is_told_from_the_header() -> None:
    config = InputConfig(max_pixels=1000)
    data = encode(Image.new("RGB", (100, 11)))
    error = failure(data[:60], config)  # nothing behind the header: the pixels were not read
    assert error.kind == "too_large"
    assert str(error) == "100 x 11 pixels; at most 1000 are allowed (input.max_pixels)"
    assert decoded(encode(Image.new("RGB", (100, 10))), config=config).max() == 0


def test_decompression_bomb_is_a_row_without_a_warning() -> None:
    header = encode(Image.new("L", (8, 8)))
    bomb = header[:16] + (60_000).to_bytes(4, "big") * 2 + header[24:]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        error = failure(bomb[:29] + _crc(bomb[12:29]) + bomb[33:])
    assert error.kind == "too_large"
    assert "60000 x 60000" in str(error)
    assert caught == []


def _crc(chunk: bytes) -> bytes:
    import zlib

    return zlib.crc32(chunk).to_bytes(4, "big")


def test_pillow_warnings_stay_inside_and_filters_come_back() -> None:
    picture = palette_picture()
    data = encode(picture, transparency=bytes([255, 0, 127, 255]))
    filters = list(warnings.filters)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(decoded, [data] * 20))
    assert caught == []
    assert warnings.filters == filters


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_truncated(kind: str) -> None:
    data = encode(Image.fromarray(random_rgb(200, 200)), kind)
    for share in (0.1, 0.5, 0.9):
        error = failure(data[: int(len(data) * share)])
        assert error.kind == "decode"
        assert str(error).startswith(("damaged picture: ", "not a picture"))


def test_flipped_bytes_never_escape_as_another_error() -> None:
    rng = np.random.default_rng(0)
    num_whole = 0
    for kind in ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "JPEG2000"):
        data = encode(Image.fromarray(random_rgb(32, 32)), kind)
        for _ in range(60):
            damaged = bytearray(data)
            for position in rng.integers(0, len(data), 8):
                damaged[position] = rng.integers(256)
            # Any other exception than SampleError fails the test.
            with suppress(SampleError):
                decoded(bytes(damaged))
                num_whole += 1
    assert 20 < num_whole < 320


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty (0 bytes)"),
        (None, "the file is empty (0 bytes)"),
        (
            b"<html>no</html>",
            "not a picture that can be read: 15 bytes beginning with b'<html>no</ht'",
        ),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
    ],
)
def test_no_picture(data: bytes | None, reason: str) -> None:
    error = failure(data)
    assert error.kind == "decode"
    assert str(error).startswith(reason)


def test_error_of_reading_is_passed_on() -> None:
    error = SampleError("read", "gone")
    with pytest.raises(SampleError) as caught:
        decode(RawSample("key", "uri", None, None, error), CROP, SIZE)
    assert caught.value is error
