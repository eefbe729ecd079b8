"""Loose pictures below a folder or prefix."""

import errno
import os
import stat
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import cast

from fsspec import AbstractFileSystem

from models.errors import SampleError, ShardError
from tasks.input.limits import too_many_bytes
from tasks.input.sample import RawSample, failed
from tasks.job import InputConfig, ShardSpec
from tasks.storage.errors import error_code, explain, is_missing
from tasks.storage.files import is_local, local_path, open_filesystem

FETCH_AT_ONCE = 32
"""Objects requested together from a store; one such group is fetched while the last is decoded."""
FIRST_BYTES = 8 * 2**20
"""Of each: what is larger is looked at, and fetched whole when its turn comes."""
AGAIN_AFTER_S = (1.0, 4.0)
"""Waits before objects are asked for again that the store refuses one by one."""
MACHINE_ERRORS = {errno.ESTALE, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE, errno.ENOMEM}
"""Errors of the machine or mount, not of the file: the shard is tried again."""


def read_files(spec: ShardSpec, config: InputConfig) -> Iterator[RawSample]:
    """The members in order. One that is missing or unreadable comes out with its error.

    Raises:
        ShardError: storage as a whole fails (credentials, bucket, network).
    """
    if is_local(spec.uri):
        root = local_path(spec.uri)
        for key in spec.members:
            yield _read_local(os.path.join(root, key), key, config.max_bytes)
        return
    fs, root = open_filesystem(spec.uri)
    # The name is put together by hand: a key such as "a//b.png" must reach the store unchanged.
    folder = spec.uri.rstrip("/")
    groups = [
        spec.members[start : start + FETCH_AT_ONCE]
        for start in range(0, len(spec.members), FETCH_AT_ONCE)
    ]
    with ThreadPoolExecutor(1, thread_name_prefix="fetch") as ahead:
        coming = ahead.submit(_fetch, fs, root, groups[0]) if groups else None
        for at, group in enumerate(groups):
            assert coming is not None
            fetched = coming.result()
            if at + 1 < len(groups):
                coming = ahead.submit(_fetch, fs, root, groups[at + 1])
            for key, value in zip(group, fetched, strict=True):
                if isinstance(value, bytes) and len(value) == FIRST_BYTES:
                    value = _whole(fs, f"{root}/{key}", value, config.max_bytes)
                yield _sample(key, f"{folder}/{key}", value)


def _read_local(path: str, key: str, most: int) -> RawSample:
    try:
        # Without waiting: a pipe has no data until somebody writes.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                return failed(key, path, "read", "not a regular file")
            problem = too_many_bytes("the file", status.st_size, most)
            if problem is not None:
                return RawSample(key, path, None, None, problem)
            return RawSample(key, path, file.read())
    except OSError as problem:
        return _sample(key, path, problem)


def _fetch(fs: AbstractFileSystem, root: str, keys: Sequence[str]) -> list[bytes | BaseException]:
    """The first `FIRST_BYTES` of each, or why not."""
    # One GET each, which a start and an end also see to. `fs.cat` would take brackets in a key for
    # a pattern.
    paths = [f"{root}/{key}" for key in keys]
    found = fs.cat_ranges(paths, 0, FIRST_BYTES, on_error="return")
    for wait_s in AGAIN_AFTER_S:
        refused = [at for at, value in enumerate(found) if _code(value) == "AccessDenied"]
        if not refused:
            break
        time.sleep(wait_s)
        again = fs.cat_ranges([paths[at] for at in refused], 0, FIRST_BYTES, on_error="return")
        for at, value in zip(refused, again, strict=True):
            found[at] = value
    return [b"" if _code(value) in ("InvalidRange", "416") else value for value in found]


def _code(value: bytes | BaseException) -> str:
    """The store's code for what came instead of an object, or ""; of a range without a first byte,
    which is an empty object, it is InvalidRange or 416."""
    return error_code(value) if isinstance(value, BaseException) else ""


def _whole(fs: AbstractFileSystem, path: str, beginning: bytes, most: int) -> bytes | BaseException:
    """A large object, whose beginning is there, unless it is larger than `most`."""
    try:
        size = int(fs.info(path)["size"])
        problem = too_many_bytes("the object", size, most)
        if problem is not None or size == len(beginning):
            return problem or beginning
        return beginning + bytes(cast(bytes, fs.cat_file(path, start=len(beginning), end=size)))
    except Exception as problem:  # sorted out with the others
        return problem


def _sample(key: str, uri: str, value: bytes | BaseException) -> RawSample:
    if not isinstance(value, BaseException):
        return RawSample(key, uri, bytes(value))
    if isinstance(value, SampleError):
        return RawSample(key, uri, None, None, value)
    if is_missing(value):
        return failed(key, uri, "read", "the file is gone: it was there when the run was planned")
    if isinstance(value, OSError) and _is_own_fault(value, uri):
        return failed(key, uri, "read", f"cannot read the file: {value.strerror or value}")
    why = explain(value, uri)
    if why is None:
        raise value
    raise ShardError(f"cannot read {uri}: {why}") from value


def _is_own_fault(problem: OSError, uri: str) -> bool:
    """Whether only this file is concerned, and not the machine or the whole store."""
    if is_local(uri):
        return problem.errno not in MACHINE_ERRORS
    return error_code(problem) == "AccessDenied"
