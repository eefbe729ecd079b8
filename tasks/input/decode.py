"""Encoded bytes to an upright RGB square of the generator's size.

Every kind of picture becomes 8-bit RGB by one rule each:
    transparent (RGBA, LA, a palette or colour key with transparency)   laid on white
    grey, palette, CMYK, YCbCr, Lab, bilevel                            Pillow's conversion
    16-bit grey                                                         divided by 257, rounded
    16-bit colour                                                       the high byte (Pillow's own)
    32-bit integer, float                                               only 0..65535 and 0..1
    animated                                                            first frame
Colour profiles are not applied. Large JPEGs are decoded at a half, quarter or eighth where at least
twice the resolution remains.
"""

import math
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from models.errors import RefineryError, SampleError
from tasks.input.align import FFHQ, align, jpeg_size_for
from tasks.input.face import Crop
from tasks.input.limits import PIXELS, TimedBytes, too_many_bytes
from tasks.input.sample import RawSample
from tasks.input.tiff import tile_pixels
from tasks.job import InputConfig

BLOCK_BYTES = 36 * 2**20
"""Beyond the largest threshold from which glibc maps memory (32 MiB)."""

# The limit is `input.max_pixels`, read from the header below. Pillow's own is a warning, which
# cannot be caught safely while several shards are decoded in threads.
Image.MAX_IMAGE_PIXELS = None

# Blocks of pictures that malloc returns to the system at once, and does not keep for each thread.
Image.core.set_block_size(BLOCK_BYTES)

Image.init()
FORMATS = tuple(
    name
    for name in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "JPEG2000", "AVIF", "PPM")
    if name in Image.OPEN
)
"""Pillow knows more; some of them start other programs (EPS) or are never photographs."""
JPEGS = ("JPEG", "MPO")
HEAVY = {"WEBP": 2, "AVIF": 2, "JPEG2000": 3}
"""Whose decoders have several copies at once: so many times the memory of the others."""
REDUCING_GAP = 3.0
"""Box-shrink first, down to so many times the target, then LANCZOS: as good, and much faster."""
STRIP_PIXELS = 2**22
"""What needs several copies of a picture makes them of so much of it at a time."""
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation to what makes the picture upright."""


def decode(sample: RawSample, input: InputConfig, resolution: int) -> UInt8[np.ndarray, "H W 3"]:
    """The picture of a sample as uint8 RGB [resolution resolution 3], the largest face of it where
    faces are looked for; the same bytes every time.

    Raises:
        SampleError, ConfigError, AssetError: as `decode_all`; the face cannot be aligned.
    """
    first = decode_all(sample, input, resolution)[0]
    if first.error is not None:
        raise first.error
    assert first.picture is not None
    return first.picture


def decode_all(sample: RawSample, input: InputConfig, resolution: int) -> list[Crop]:
    """All that a sample shows: one crop, or with a detector one for each face.

    Raises:
        SampleError: kind "read" (the sample came with an error), "too_large" (more pixels than
            `input.max_pixels`, told from the header, more bytes than `input.max_bytes`, or more
            time than `input.max_decode_s`), "decode" (empty, truncated, corrupt or no picture),
            "align" (no landmarks, no face).
        ConfigError, AssetError: the template or detector cannot be loaded.
    """
    with opened(sample, input, resolution) as upright:
        with _damage(sample):
            rgb = to_rgb(upright.picture)
        if input.fit == "align":
            return align(rgb, sample.landmarks, input, resolution, upright.full_size)
        return [Crop(picture=_fit(rgb, input.fit == "crop", resolution))]


class Upright(NamedTuple):
    """A photograph as it is to be seen, in its own mode.

    Attributes:
        full_size: before it was decoded smaller.
        source: as the file has it, for its format and its information.
    """

    picture: Image.Image
    full_size: tuple[int, int]
    source: ImageFile.ImageFile


@contextmanager
def opened(sample: RawSample, input: InputConfig, resolution: int | None) -> Iterator[Upright]:
    """A sample's picture; its room among the decoded ones is kept as long as the block lasts.

    Args:
        resolution: that is to be made of it: large JPEGs are decoded smaller; None for all of it.

    Raises:
        SampleError: see `decode_all`; whatever goes wrong with the picture while it is decoded.
    """
    if sample.error is not None:
        raise sample.error
    if not sample.data:
        raise SampleError("decode", "the file is empty (0 bytes)")
    problem = too_many_bytes("the file", len(sample.data), input.max_bytes)
    if problem is not None:
        raise problem
    with ExitStack() as held:
        yield _upright(sample, input, resolution, held)


def _upright(
    sample: RawSample, input: InputConfig, resolution: int | None, held: ExitStack
) -> Upright:
    assert sample.data is not None
    file = TimedBytes(sample.data, input.max_decode_s)
    with _damage(sample), _QUIET:
        image = held.enter_context(Image.open(file, formats=FORMATS))
        whole = _check_size(image, sample.data, input.max_pixels)
        full = image.size if orientation(image) < 5 else (image.height, image.width)
        if resolution is not None:
            _shrink_while_decoding(image, sample, input, resolution)
            # A progressive JPEG keeps all its coefficients, however small it is to become.
            if image.format in JPEGS and "progressive" not in image.info:
                whole = math.prod(image.size)
        held.enter_context(PIXELS.hold(whole * HEAVY.get(image.format or "", 1)))
        image.load()
        file.check()
        return Upright(turn_upright(image), full, image)


@contextmanager
def _damage(sample: RawSample) -> Iterator[None]:
    """Inside, whatever goes wrong is the picture's."""
    try:
        yield
    except (RefineryError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise SampleError("decode", _not_a_picture(sample.data or b"")) from None
    except Exception as problem:
        # On damaged files Pillow raises OSError, SyntaxError, ValueError, struct.error, IndexError
        # and more; whatever it is, it is this picture's.
        raise SampleError("decode", f"damaged picture: {_reason(problem)}") from problem


def _check_size(image: ImageFile.ImageFile, data: bytes, max_pixels: int) -> int:
    """Pixels that the decoder will have in memory, told from the header."""
    width, height = image.size
    tile = tile_pixels(data) if image.format == "TIFF" else 0
    if max(width * height, tile) > max_pixels:
        raise SampleError(
            "too_large",
            f"{width} x {height} pixels{f' in tiles of {tile}' if tile else ''}; at most "
            f"{max_pixels} are allowed (input.max_pixels)",
        )
    return max(width * height, tile)


def _shrink_while_decoding(
    image: ImageFile.ImageFile, sample: RawSample, input: InputConfig, resolution: int
) -> None:
    """Let libjpeg shrink by 2, 4 or 8 as long as twice the needed detail remains."""
    if image.format not in JPEGS or min(image.size) < 4 * resolution:
        return
    wanted = (2 * resolution, 2 * resolution)
    if input.fit == "align":
        if sample.landmarks is None or input.template == FFHQ:
            return  # the detector, and the recipe, need all of the picture
        width, height = image.size
        if orientation(image) >= 5:  # stored lying on its side
            high, wide = jpeg_size_for((height, width), sample.landmarks, input, resolution)
            wanted = (wide, high)
        else:
            wanted = jpeg_size_for((width, height), sample.landmarks, input, resolution)
    image.draft(image.mode, wanted)


def orientation(image: Image.Image) -> int:
    """How the EXIF block says the picture lies, 1 (upright) to 8."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a damaged EXIF block does not spoil the picture
        return 1


def turn_upright(image: Image.Image) -> Image.Image:
    """The picture as its EXIF orientation says it is to be seen."""
    method = UPRIGHT.get(orientation(image))
    return image if method is None else image.transpose(method)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to 8-bit RGB, by the table at the top of this file.

    Raises:
        SampleError: kind "decode": 32-bit values without a defined range.
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith(("I", "F")):
        _check_range(image)
        return _by_strips(image, _wide_to_rgb)
    if image.has_transparency_data:
        return _by_strips(image, _on_white)
    return image.convert("RGB")


def _by_strips(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """What makes RGB of each pixel by itself, in little memory."""
    found = Image.new("RGB", image.size)
    for top, strip in _strips(image):
        found.paste(convert(strip), (0, top))
    return found


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _on_white(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")


def _check_range(image: Image.Image) -> None:
    ends = [(np.asarray(strip).min(), np.asarray(strip).max()) for _, strip in _strips(image)]
    low, high = np.min(ends), np.max(ends)
    kind, most = ("float", 1) if image.mode == "F" else ("32-bit", 65535)
    if not (low >= 0 and high <= most):  # also for NaN
        raise SampleError("decode", f"{kind} values from {low} to {high}; expected 0 to {most}")


def _wide_to_rgb(image: Image.Image) -> Image.Image:
    values = np.asarray(image)
    if image.mode == "F":
        grey = np.rint(values * 255).astype(np.uint8)
    else:
        grey = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


def _fit(image: Image.Image, is_cropped: bool, resolution: int) -> UInt8[np.ndarray, "H W 3"]:
    width, height = image.size
    left = top = 0
    if is_cropped:
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        width = height = side
    box = (left, top, left + width, top + height)
    if (width, height) != (resolution, resolution):
        image = image.resize(
            (resolution, resolution), Image.Resampling.LANCZOS, box, reducing_gap=REDUCING_GAP
        )
    elif image.size != (resolution, resolution):
        image = image.crop(box)
    return np.array(image)


def _not_a_picture(data: bytes) -> str:
    start = data[:12]
    return f"not a picture that can be read: {len(data)} bytes beginning with {start!r}"


def _reason(problem: Exception) -> str:
    text = " ".join(str(problem).split())[:200]
    return text or type(problem).__name__


class _Quiet:
    """Silences Pillow's warnings while any thread is inside.

    `warnings.catch_warnings` swaps the filters of the whole process, so the first to enter swaps
    and the last to leave swaps back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_inside = 0
        self._filters = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if self._num_inside == 0:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")
            self._num_inside += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._lock:
            self._num_inside -= 1
            if self._num_inside == 0:
                self._filters.__exit__(kind, problem, trace)


_QUIET = _Quiet()
