"""A run's committed parts as a file system for DuckDB, for runs in object storage.

Through s3fs, DuckDB asks for the size of every file a dozen times (103 HEAD requests for a query
over three parts) and lists folders for names that hold a bracket. Names and sizes are in the commit
markers: here those questions cost nothing, and only reads reach the store.

Not an Arrow dataset: a read that fails inside one, while DuckDB scans it, never returns (pyarrow
26, DuckDB 2.0).
"""

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, cast

import pyarrow as pa
from fsspec import AbstractFileSystem

from models.errors import LedgerError
from tasks.storage.errors import storage_errors
from tasks.storage.files import join, open_filesystem

PROTOCOL = "parts"


class PartFiles(AbstractFileSystem):
    """Read-only files `parts://latents/00042-9f3c.parquet` of one run.

    Args:
        run_uri: where the run lies.
        sizes: size in bytes by path relative to the run.

    Attributes:
        problems: reads that failed, which DuckDB reports as a traceback in a text.
    """

    protocol = PROTOCOL
    cachable = False

    def __init__(self, run_uri: str, sizes: Mapping[str, int]) -> None:
        super().__init__()
        self.run_uri, self.size_of = run_uri, dict(sizes)
        self.problems: list[LedgerError] = []

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
        return PartFile(join(self.run_uri, path), self.size_of[path], self.problems)


class PartFile(io.RawIOBase):
    """A file of known size; every read is one request for just those bytes."""

    def __init__(self, uri: str, size: int, problems: list[LedgerError] | None = None) -> None:
        super().__init__()
        self._uri, self._size, self._at = uri, size, 0
        self._problems = [] if problems is None else problems
        self._filesystem, self._path = open_filesystem(uri)

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
            with storage_errors("read the committed part", self._uri, LedgerError):
                data = cast(bytes, self._filesystem.cat_file(self._path, start=self._at, end=end))
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


@contextmanager
def part_errors(uri: str) -> Iterator[None]:
    """Inside, what goes wrong with a committed part is a LedgerError."""
    try:
        with storage_errors("read", uri, LedgerError):
            yield
    except pa.ArrowException as error:
        raise LedgerError(f"cannot read {uri}: {error}; run `refinery verify`") from error
