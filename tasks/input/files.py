"""Loose pictures below a folder or prefix."""

import errno
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import cast

from fsspec import AbstractFileSystem

from models.errors import ShardError
from tasks.input.sample import RawSample, failed
from tasks.job import InputConfig, ShardSpec
from tasks.storage.errors import error_code, explain, is_missing
from tasks.storage.files import is_local, local_path, open_filesystem

FETCH_AT_ONCE = 32
"""Objects requested together from a store; one such group is fetched while the last is decoded."""
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
            yield _read_local(os.path.join(root, key), key)
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
                yield _sample(key, f"{folder}/{key}", value)


def _read_local(path: str, key: str) -> RawSample:
    try:
        with open(path, "rb") as file:
            return RawSample(key, path, file.read())
    except OSError as problem:
        return _sample(key, path, problem)


def _fetch(fs: AbstractFileSystem, root: str, keys: Sequence[str]) -> list[bytes | BaseException]:
    # One GET each: without `max_concurrency` s3fs asks for the size first. `fs.cat` would take
    # brackets in a key for a pattern.
    options = {"max_concurrency": 1} if "s3" in fs.protocol else {}
    paths = [f"{root}/{key}" for key in keys]
    return cast(
        list[bytes | BaseException],
        fs.cat_ranges(
            paths, [None] * len(paths), [None] * len(paths), on_error="return", **options
        ),
    )


def _sample(key: str, uri: str, value: bytes | BaseException) -> RawSample:
    if not isinstance(value, BaseException):
        return RawSample(key, uri, bytes(value))
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
