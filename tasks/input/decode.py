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
from contextlib import ExitStack
from types import TracebackType

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from models.errors import RefineryError, SampleError
from tasks.input.align import align, jpeg_size_for
from tasks.input.limits import PIXELS, TimedBytes, too_many_bytes
from tasks.input.sample import RawSample
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
    """The picture of a sample as uint8 RGB [resolution resolution 3]; the same bytes every time.

    Raises:
        SampleError: kind "read" (the sample came with an error), "too_large" (more pixels than
            `input.max_pixels`, told from the header, more bytes than `input.max_bytes`, or more
            time than `input.max_decode_s`), "decode" (empty, truncated, corrupt or no picture),
            "align" (no usable landmarks).
        ConfigError, AssetError: the template or detector cannot be loaded.
    """
    if sample.error is not None:
        raise sample.error
    if not sample.data:
        raise SampleError("decode", "the file is empty (0 bytes)")
    problem = too_many_bytes("the file", len(sample.data), input.max_bytes)
    if problem is not None:
        raise problem
    with ExitStack() as held:
        upright = _upright(sample, input, resolution, held)
        if input.fit == "align":
            return align(upright, sample.landmarks, input, resolution)
        return _fit(upright, input.fit == "crop", resolution)


def _upright(
    sample: RawSample, input: InputConfig, resolution: int, held: ExitStack
) -> Image.Image:
    """The whole picture as RGB; its room among the decoded ones is kept until `held` closes."""
    assert sample.data is not None
    file = TimedBytes(sample.data, input.max_decode_s)
    try:
        with _QUIET, Image.open(file, formats=FORMATS) as image:
            _check_size(image, input.max_pixels)
            whole = math.prod(image.size)
            _shrink_while_decoding(image, sample, input, resolution)
            # A progressive JPEG keeps all its coefficients, however small it is to become.
            is_streamed = "progressive" not in image.info
            held.enter_context(PIXELS.hold(math.prod(image.size) if is_streamed else whole))
            image.load()
            file.check()
            return to_rgb(_turn_upright(image))
    except (RefineryError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise SampleError("decode", _not_a_picture(sample.data)) from None
    except Exception as problem:
        # On damaged files Pillow raises OSError, SyntaxError, ValueError, struct.error, IndexError
        # and more; whatever it is, it is this picture's.
        raise SampleError("decode", f"damaged picture: {_reason(problem)}") from problem


def _check_size(image: ImageFile.ImageFile, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise SampleError(
            "too_large",
            f"{width} x {height} pixels; at most {max_pixels} are allowed (input.max_pixels)",
        )


def _shrink_while_decoding(
    image: ImageFile.ImageFile, sample: RawSample, input: InputConfig, resolution: int
) -> None:
    """Let libjpeg shrink by 2, 4 or 8 as long as twice the needed detail remains."""
    if image.format not in ("JPEG", "MPO") or min(image.size) < 4 * resolution:
        return
    wanted = (2 * resolution, 2 * resolution)
    if input.fit == "align":
        if sample.landmarks is None:  # the detector needs all of the picture
            return
        width, height = image.size
        if _orientation(image) >= 5:  # stored lying on its side
            high, wide = jpeg_size_for((height, width), sample.landmarks, input, resolution)
            wanted = (wide, high)
        else:
            wanted = jpeg_size_for((width, height), sample.landmarks, input, resolution)
    image.draft(image.mode, wanted)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a damaged EXIF block does not spoil the picture
        return 1


def _turn_upright(image: Image.Image) -> Image.Image:
    method = UPRIGHT.get(_orientation(image))
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
