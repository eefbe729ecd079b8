"""What an input may cost, whatever it claims of itself.

Limits of one picture (pixels, bytes, seconds) and of a packed file (expansion) are settings of
`InputConfig`: they decide which rows fail. Those here bound what a worker holds at one time, and
what no honest file comes near.
"""

import io
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import IO, Protocol, TypeVar

from models.errors import SampleError
from tasks.input.sample import CorruptFileError

E = TypeVar("E", bound="Encoded")

AHEAD_BYTES = 256 * 2**20
"""Encoded pictures of a shard in memory at one time, besides the one that goes beyond."""
PIXELS_AT_ONCE = 100_000_000
"""Pixels decoded at one time by all threads of a process: 8 to 12 bytes each."""
FREE_BYTES = 64 * 2**20
"""Unpacked bytes of a file before its expansion counts: a small drawing may shrink a lot."""
SMALL_FILE_BYTES = 64 * 2**10
"""A tar's header of one member (its name, PAX records), or a file of five points."""
MAX_MEMBERS = 1000
"""Members of one sample of a tar that are looked at, and PAX records for all members."""
MAX_VALUES = 64
"""Values of a list column for each row of a Parquet row group; landmarks are ten."""
FREE_ROWS = 10_000
"""Rows of a Parquet row group that may take less than a byte each."""


class Gate:
    """Lets threads work side by side as long as what they hold together is below a limit.

    Args:
        limit: what may be inside; one that is larger goes in alone.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.inside = limit, 0
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, amount: int) -> Iterator[None]:
        """Wait for room, and keep it until the block ends."""
        with self._changed:
            self._changed.wait_for(lambda: not self.inside or self.inside + amount <= self.limit)
            self.inside += amount
        try:
            yield
        finally:
            with self._changed:
                self.inside -= amount
                self._changed.notify_all()


PIXELS = Gate(PIXELS_AT_ONCE)
"""Of this process."""


class TimedBytes(io.BytesIO):
    """A picture's bytes, which end when its decoder has used up its time.

    Time is the thread's processor time, so a busy machine fails no picture. Decoders that read as
    they go (PNG, JPEG, GIF, BMP, PPM) are stopped inside; the others take their bytes at once.
    """

    def __init__(self, data: bytes, seconds: float) -> None:
        super().__init__(data)
        self.seconds, self.started = seconds, time.thread_time()

    def read(self, size: int | None = -1, /) -> bytes:
        self.check()
        return super().read(size)

    def check(self) -> None:
        """
        Raises:
            SampleError: kind "too_large": the time is over.
        """
        if time.thread_time() - self.started > self.seconds:
            raise SampleError(
                "too_large",
                f"decoding takes more than {self.seconds:g} s of processor time "
                "(input.max_decode_s)",
            )


class Unpacked:
    """A decompressed stream that ends where a file expands beyond all measure.

    Args:
        packed: the file itself, whose position tells how much has been read.
        ratio: unpacked by packed bytes, allowed after `FREE_BYTES`.
    """

    def __init__(self, stream: IO[bytes], packed: IO[bytes], ratio: float, uri: str) -> None:
        self.stream, self.packed, self.ratio, self.uri = stream, packed, ratio, uri
        self.num_bytes = 0

    def read(self, size: int) -> bytes:
        """
        Raises:
            CorruptFileError: the file expands too much.
        """
        data = self.stream.read(size)
        self.num_bytes += len(data)
        packed = self.packed.tell()
        if self.num_bytes > FREE_BYTES + self.ratio * packed:
            raise CorruptFileError(
                f"{self.uri}: its first {packed} bytes unpack to {self.num_bytes} and more, over "
                f"{self.ratio:g} times as many (input.max_expansion); that is no file of pictures"
            )
        return data


def too_many_bytes(what: str, num_bytes: int, most: int) -> SampleError | None:
    """The error of a picture of more than `most` encoded bytes (`input.max_bytes`)."""
    if num_bytes <= most:
        return None
    return SampleError(
        "too_large", f"{what}: {num_bytes} bytes; at most {most} are allowed (input.max_bytes)"
    )


class Encoded(Protocol):
    """What holds a picture as its file has it."""

    @property
    def data(self) -> bytes | None: ...


def chunks(samples: Iterable[E], count: int) -> Iterator[list[E]]:
    """At most `count` samples, and about `AHEAD_BYTES`, at a time, in order."""
    samples = iter(samples)
    for first in samples:
        chunk, held = [], 0
        for sample in chain([first], samples):
            chunk.append(sample)
            held += len(sample.data or b"")
            if len(chunk) == count or held >= AHEAD_BYTES:
                break
        yield chunk
