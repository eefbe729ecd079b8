"""Files that are created once: of all writers of a name one wins, and nothing replaces its file.

Local folders: a link to a complete file, which fails where the name is taken. S3: a PUT with
`If-None-Match: *`. A server that ignores the header is found out by a probe; there, the name is
looked at before and after a plain PUT, which leaves a gap that only time closes (`creates_once`).
"""

import errno
import logging
import os
import threading
import time
import uuid
from contextlib import nullcontext

from fsspec import AbstractFileSystem

from models.errors import LedgerError
from models.files import atomically
from tasks.storage.errors import error_code, storage_errors
from tasks.storage.files import (
    find_bytes,
    is_local,
    local_path,
    open_filesystem,
    scheme_of,
    write_bytes,
)

logger = logging.getLogger(__name__)

_TAKEN = {"PreconditionFailed", "412"}
_AT_WORK = {"ConditionalRequestConflict", "OperationAborted", "409"}
"""Another conditional write of the same name is being decided; S3 asks to try again."""
_UNKNOWN = {"NotImplemented", "501"}
_TRIES, _WAIT_S = 8, 0.1
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)

_is_kept: dict[tuple[int, str], bool] = {}
"""Whether the server obeys, by client and bucket."""
_memory_lock = threading.Lock()


class _Taken(Exception):
    """The name has a file."""


def create_bytes(uri: str, data: bytes) -> bool:
    """Write a whole file, atomically for readers, where there is none of this name.

    A write whose answer was lost may have been repeated on the way: False can mean that the file is
    this caller's own. Read it back.

    Returns:
        Whether this call created it.

    Raises:
        LedgerError: storage fails; the file may have been created, or may be later.
    """
    if not creates_once(uri):
        if find_bytes(uri) is not None:
            return False
        write_bytes(uri, data)
        return find_bytes(uri) == data
    with storage_errors("create", uri, LedgerError):
        try:
            if is_local(uri):
                with atomically(local_path(uri), _link) as file:
                    file.write(data)
            else:
                with _memory_lock if scheme_of(uri) == "memory" else nullcontext():
                    _put_new(*open_filesystem(uri), data)
        except _Taken:
            return False
    return True


def creates_once(uri: str) -> bool:
    """Whether the store keeps the first file of a name against all later `create_bytes`.

    Raises:
        LedgerError: storage cannot be written.
    """
    if scheme_of(uri) != "s3":
        return True
    fs, path = open_filesystem(uri)
    key = (id(fs), path.split("/", 1)[0])
    if key not in _is_kept:
        with storage_errors("write", uri, LedgerError):
            _is_kept[key] = _obeys(fs, f"{path.rpartition('/')[0]}/.probe-{uuid.uuid4().hex}")
        if not _is_kept[key]:
            logger.warning(
                "the server of %s ignores If-None-Match: a worker that comes back late may replace "
                "a commit by an equal one, so files of unfinished attempts are kept for a day",
                uri,
            )
    return _is_kept[key]


def _obeys(fs: AbstractFileSystem, probe: str) -> bool:
    try:
        _put_new(fs, probe, b"first")
        _put_new(fs, probe, b"second")
    except _Taken:
        return True
    except OSError as problem:
        if error_code(problem) not in _UNKNOWN:
            raise
        return False
    finally:
        try:
            fs.rm_file(probe)
        except OSError:
            logger.debug("%s stays behind", probe)
    return False


def _put_new(fs: AbstractFileSystem, path: str, data: bytes) -> None:
    for attempt in range(_TRIES):
        try:
            fs.pipe_file(path, data, mode="create")
            return
        except FileExistsError as problem:  # memory://
            raise _Taken from problem
        except OSError as problem:
            code = error_code(problem)
            if code in _TAKEN:
                raise _Taken from problem
            if code not in _AT_WORK or attempt == _TRIES - 1:
                raise
            time.sleep(_WAIT_S * 2**attempt)


def _link(temporary: str, path: str) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError as problem:
        raise _Taken from problem
    except OSError as problem:
        if problem.errno not in _NO_LINKS:
            raise
        _copy_new(temporary, path)
    os.unlink(temporary)


def _copy_new(temporary: str, path: str) -> None:
    """For file systems without links. A crash in here leaves a torn file, which reads as damaged
    and is nobody's commit."""
    try:
        with open(temporary, "rb") as source, open(path, "xb") as file:
            file.write(source.read())
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError as problem:
        raise _Taken from problem
