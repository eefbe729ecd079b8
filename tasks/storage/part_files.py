"""Committed parts as a file system for DuckDB, for runs in object storage.

Through s3fs, DuckDB asks for the size of every file a dozen times (103 HEAD requests for a query
over three parts) and lists folders for names that hold a bracket. Names and sizes are in the commit
markers: here those questions cost nothing, and only reads reach the store.

Not an Arrow dataset: a read that fails inside one, while DuckDB scans it, never returns (pyarrow
26, DuckDB 2.0).
"""

import io
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem

from models.errors import LedgerError
from tasks.storage.errors import error_code, is_missing, is_unreachable, storage_errors
from tasks.storage.files import is_local, open_filesystem

PROTOCOL = "parts"
TAIL_BYTES = 2**16
"""The end of a Parquet file, fetched as one: its footer, and of a small part everything."""
TRIES, WAIT_S = 6, 0.05
"""Of one read; the wait doubles each time."""
Region = tuple[int, int]
"""Bytes [start, stop) that are fetched together when the first of them is asked for."""


class PartFiles(AbstractFileSystem):
    """Read-only files `parts://<name>`, wherever they lie; those of `add` and no other.

    Attributes:
        problems: reads that failed, which DuckDB reports as a traceback in a text.
    """

    protocol = PROTOCOL
    cachable = False

    def __init__(self) -> None:
        super().__init__()
        self.size_of: dict[str, int] = {}
        self.problems: list[LedgerError] = []
        self._uris: dict[str, str] = {}
        self._fetched: dict[str, Fetched] = {}

    def add(self, name: str, uri: str, size: int, fetched: "Fetched | None" = None) -> str:
        """Make a file known.

        Args:
            name: what DuckDB shall call it, without pattern characters.
            fetched: what is known of its bytes; its end is fetched together without it.

        Returns:
            Its URL in SQL.
        """
        self.size_of[name], self._uris[name] = size, uri
        self._fetched[name] = fetched or Fetched.tail(size)
        return f"{PROTOCOL}://{name}"

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        path = cast(str, self._strip_protocol(path))
        if path not in self.size_of:
            raise FileNotFoundError(path)
        return {"name": path, "size": self.size_of[path], "type": "file"}

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        folder = cast(str, self._strip_protocol(path)).rstrip("/") + "/"
        found = [self.info(name) for name in self.size_of if name.startswith(folder)]
        return found if detail else [entry["name"] for entry in found]

    def modified(self, path: str) -> datetime:
        """The same for all: parts never change."""
        return datetime.fromtimestamp(0, UTC)

    def glob(self, path: str, maxdepth: int | None = None, **kwargs: Any) -> list[str]:
        """The file itself: part names hold no pattern characters."""
        path = cast(str, self._strip_protocol(path))
        return [path] if path in self.size_of else []

    def _open(  # type: ignore[override]
        self, path: str, mode: str = "rb", **kwargs: Any
    ) -> "PartFile":
        assert mode == "rb"
        return PartFile(self._uris[path], self.size_of[path], self.problems, self._fetched[path])


class Fetched:
    """Regions of one file that are kept once they were fetched; safe for several threads."""

    def __init__(self, regions: Iterable[Region] = ()) -> None:
        self._locks: dict[Region, threading.Lock] = {}
        self._bytes: dict[Region, bytes] = {}
        self.add(regions)

    @classmethod
    def tail(cls, size: int, length: int = TAIL_BYTES) -> "Fetched":
        """The end of a file of `size` bytes."""
        return cls([(max(size - length, 0), size)])

    def __reduce__(self) -> tuple[Any, ...]:
        """For other processes: without the bytes, which they fetch themselves."""
        return Fetched, (tuple(self._locks),)

    def add(self, regions: Iterable[Region]) -> None:
        """Further regions; they may overlap those that are there, which come first."""
        self._locks |= {region: threading.Lock() for region in regions}

    def read(self, uri: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop): out of a region that holds them all, else one request for these."""
        for region, lock in self._locks.items():
            if region[0] <= start and stop <= region[1]:
                with lock:
                    if region not in self._bytes:
                        self._bytes[region] = read_range(uri, *region)
                return self._bytes[region][start - region[0] : stop - region[0]]
        return read_range(uri, start, stop)


def read_range(uri: str, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of a file that has so many, by one request; an answer that breaks off
    is asked for again, as is a server that is busy.

    Raises:
        LedgerError: they cannot be read, or the file ends before.
    """
    with storage_errors("read the committed part", uri, LedgerError):
        fs, path = open_filesystem(uri)
        data = b""
        for attempt in range(1, TRIES + 1):
            try:
                data = cast(bytes, fs.cat_file(path, start=start, end=stop))
            except Exception as problem:
                if is_missing(problem):
                    raise LedgerError(
                        f"{uri} is missing although it is committed; run `refinery verify`"
                    ) from problem
                if attempt == TRIES or not _may_pass(problem):
                    raise
            else:
                if len(data) == stop - start:
                    return data
                if is_local(uri):
                    break
            time.sleep(WAIT_S * 2**attempt)
        raise LedgerError(
            f"{uri}: bytes {start} to {stop} are wanted, the file gives {len(data)} of them; run "
            "`refinery verify`, which lists all damage"
        )


def _may_pass(problem: BaseException) -> bool:
    busy = ("SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout", "503", "500")
    return is_unreachable(problem) or error_code(problem) in busy


class PartFile(io.RawIOBase):
    """A file of known size; every read is one request for just those bytes, but for what lies in a
    region."""

    def __init__(
        self,
        uri: str,
        size: int,
        problems: list[LedgerError] | None = None,
        fetched: Fetched | None = None,
    ) -> None:
        super().__init__()
        self._uri, self._size, self._at = uri, size, 0
        self._problems = [] if problems is None else problems
        self._fetched = fetched or Fetched()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = base + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        end = self._size if size < 0 else min(self._size, self._at + size)
        if end <= self._at:
            return b""
        try:
            data = self._fetched.read(self._uri, self._at, end)
        except LedgerError as error:
            self._problems.append(error)
            raise
        self._at += len(data)
        return data

    def readall(self) -> bytes:
        return self.read()

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def open_part(uri: str, size: int, *, pre_buffer: bool = False) -> pq.ParquetFile:
    """A committed part, whose footer is one read; later reads want `part_errors` around them.

    Args:
        pre_buffer: columns that are asked for together are read together.

    Raises:
        LedgerError: it is missing or damaged.
    """
    with part_errors(uri):
        file = PartFile(uri, size, fetched=Fetched.tail(size))
        return pq.ParquetFile(file, pre_buffer=pre_buffer)


def chunk_of(file: pq.ParquetFile, group: int, column: str) -> pq.ColumnChunkMetaData:
    """The one chunk of a column, which may be a list, in a row group."""
    chunks = file.metadata.row_group(group)
    found = map(chunks.column, range(chunks.num_columns))
    return next(chunk for chunk in found if chunk.path_in_schema.split(".")[0] == column)


def read_part(uri: str, size: int, columns: list[str] | None = None) -> pa.Table:
    """A committed part, or some of its columns.

    Raises:
        LedgerError: it is missing or damaged.
    """
    with part_errors(uri):
        return open_part(uri, size).read(columns)


@contextmanager
def part_errors(uri: str) -> Iterator[None]:
    """Inside, what goes wrong with a committed part is a LedgerError."""
    try:
        with storage_errors("read", uri, LedgerError):
            yield
    except pa.ArrowException as error:
        raise LedgerError(f"cannot read {uri}: {error}; run `refinery verify`") from error
