"""Files that are whole or not there."""

import errno
import hashlib
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

PARTIAL_SUFFIX = ".partial"
"""Ends the hidden names of files being written; no reader's pattern matches it."""


@contextmanager
def atomically(
    path: str | Path, publish: Callable[[str, str], None] | None = None
) -> Iterator[BinaryIO]:
    """A file to write to that gets its name when the block ends, and never where it fails.

    Folders are made as needed; the name survives a power cut.

    Args:
        publish: gives the complete file of the first name the second one; by default it replaces.
    """
    folder, name = os.path.split(path)
    os.makedirs(folder or ".", exist_ok=True)
    temporary = os.path.join(folder, f".{name[:150]}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        (publish or os.replace)(temporary, str(path))
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    _sync_folder(folder or ".")


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: str) -> None:
    """Make a rename survive a power cut. Network mounts may refuse: that promise is then void."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as problem:
        if problem.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)
