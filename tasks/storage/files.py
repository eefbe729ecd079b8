"""All storage: local paths, s3:// and memory:// behind one file.

A reader never sees half a file: local writes go to a hidden temporary name in the same folder, are
flushed to the disk and renamed; object stores receive one PUT (or one completed multipart upload).

s3:// is configured the usual way, and only that way: AWS_ENDPOINT_URL, AWS_PROFILE,
AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_DEFAULT_REGION, AWS_RETRY_MODE,
AWS_MAX_ATTEMPTS, AWS_REQUEST_CHECKSUM_CALCULATION and the profile files (FSSPEC_S3 adds s3fs
options as JSON).
"""

import hashlib
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISDIR
from typing import Any, BinaryIO, cast

import fsspec
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from models.cache import cache_folder
from models.errors import AssetError, ConfigError, LedgerError, RefineryError, ShardError
from models.files import PARTIAL_SUFFIX, atomically
from tasks.storage.errors import is_missing, storage_errors

S3_RETRIES = 8
S3_CONNECTIONS = 32
"""Small reads wait more than they work: of ten, botocore's own number, 200 take twice as long."""

_filesystems: dict[tuple[object, ...], AbstractFileSystem] = {}
_filesystems_lock = threading.Lock()


def scheme_of(uri: str) -> str:
    """ "file" (any plain path), "s3" or "memory".

    Raises:
        ConfigError: another scheme, or a URL with a missing slash.
    """
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)(://|:/(?!/))", uri)
    if not match:
        return "file"
    scheme, slashes = match.groups()
    if slashes == "://" and scheme in ("file", "s3", "memory"):
        return scheme
    hint = ""
    if scheme.lower() in ("s3", "s3a", "s3n"):
        hint = f" Write s3://{uri[match.end() :].lstrip('/')}."
    elif scheme in ("http", "https"):
        hint = (
            " For an S3 server, set AWS_ENDPOINT_URL to its address and write s3://bucket/folder."
        )
    raise ConfigError(
        f"cannot open {uri}: {match.group()} is not supported; expected a local path, "
        f"s3://bucket/... or memory://...{hint}"
    )


def open_filesystem(uri: str) -> tuple[AbstractFileSystem, str]:
    """The file system of a URL and the path on it, made in the calling process.

    s3fs does not survive a fork and remembers its credentials, so one object is kept for each
    process and each set of AWS_* variables. It keeps no listings.

    Raises:
        ConfigError: the scheme is not supported, or an s3:// URL names no bucket.
    """
    scheme = scheme_of(uri)
    if scheme == "file":
        return LocalFileSystem(auto_mkdir=True), local_path(uri)
    rest = uri.split("://", 1)[1]
    if scheme == "memory":
        return fsspec.filesystem("memory"), "/" + rest.strip("/")
    if not rest.split("/", 1)[0]:
        raise ConfigError(f"{uri} names no bucket; expected s3://bucket/folder")
    settings = tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith("AWS_")))
    key = (os.getpid(), settings)
    with _filesystems_lock:
        if key not in _filesystems:
            _filesystems[key] = _open_s3()
        return _filesystems[key], rest.rstrip("/")


def _open_s3() -> AbstractFileSystem:
    # Adaptive retries slow the caller down where the server asks for it. An explicit value here
    # would beat the environment and the profile, which belong to the user.
    retries: dict[str, object] = {}
    if "AWS_RETRY_MODE" not in os.environ:
        retries["mode"] = "adaptive"
    if "AWS_MAX_ATTEMPTS" not in os.environ:
        retries["total_max_attempts"] = S3_RETRIES
    with storage_errors("open", "s3://", ConfigError):
        return fsspec.filesystem(
            "s3",
            use_listings_cache=False,
            skip_instance_cache=True,
            config_kwargs={"max_pool_connections": S3_CONNECTIONS}
            | ({"retries": retries} if retries else {}),
        )


def is_local(uri: str) -> bool:
    return scheme_of(uri) == "file"


def local_path(uri: str) -> str:
    """The absolute path of a local URI; `~` is expanded."""
    path = uri.removeprefix("file://")
    return os.path.abspath(os.path.expanduser(path))


def join(uri: str, *parts: str) -> str:
    """`uri` with parts added, one slash between them."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def read_bytes(uri: str, error: type[RefineryError] = ShardError) -> bytes:
    """The whole file.

    Raises:
        error: it cannot be read. Where it is missing, `__cause__` is a FileNotFoundError.
    """
    with storage_errors("read", uri, error):
        if is_local(uri):
            return Path(local_path(uri)).read_bytes()
        fs, path = open_filesystem(uri)
        # One GET: s3fs asks for the size first where it may fetch a file in pieces.
        one = {"max_concurrency": 1} if scheme_of(uri) == "s3" else {}
        return cast(bytes, fs.cat_file(path, **one))


def find_bytes(uri: str, error: type[RefineryError] = LedgerError) -> bytes | None:
    """The whole file, or None where there is none: one request.

    Raises:
        error: it is there, or may be, and cannot be read.
    """
    try:
        return read_bytes(uri, error)
    except error as problem:
        cause = problem.__cause__
        if cause is None or not (is_missing(cause) or isinstance(cause, NotADirectoryError)):
            raise
        return None


def write_bytes(uri: str, data: bytes, error: type[RefineryError] = LedgerError) -> None:
    """Write a whole file, atomically for readers; folders are made as needed.

    Raises:
        error: it cannot be written (full disk, no permission, no bucket). Nothing new is visible.
    """
    if is_local(uri):
        with open_write(uri, error) as file:
            file.write(data)
        return
    with storage_errors("write", uri, error):
        fs, path = open_filesystem(uri)
        fs.pipe_file(path, data)


@contextmanager
def open_write(uri: str, error: type[RefineryError] = LedgerError) -> Iterator[BinaryIO]:
    """A file to write to, visible under its name only after the block ends without an exception.

    Object stores: the bytes wait in a temporary local file and are uploaded when the block ends.

    Raises:
        error: as `write_bytes`. Exceptions of the block itself that are not storage's pass through.
    """
    with storage_errors("write", uri, error):
        if is_local(uri):
            with atomically(local_path(uri)) as file:
                yield file
            return
        fs, path = open_filesystem(uri)
        with tempfile.NamedTemporaryFile(prefix="refinery-upload-") as file:
            yield cast(BinaryIO, file)
            file.flush()
            fs.put_file(file.name, path)


def exists(uri: str) -> bool:
    """Whether a file (not a folder) has this name.

    Raises:
        LedgerError: storage cannot tell (credentials, network, bucket).
    """
    return file_info(uri) is not None


def file_info(uri: str, error: type[RefineryError] = LedgerError) -> tuple[int, str] | None:
    """Size in bytes and etag of one file, or None where there is no file of this name.

    Raises:
        error: storage cannot tell (credentials, network, bucket).
    """
    with storage_errors("look at", uri, error):
        if is_local(uri):
            try:
                status = os.stat(local_path(uri))
            except (FileNotFoundError, NotADirectoryError):
                return None
            return None if S_ISDIR(status.st_mode) else (status.st_size, _local_etag(status))
        fs, path = open_filesystem(uri)
        try:
            info = fs.info(path)
        except FileNotFoundError as problem:
            if is_missing(problem):
                return None
            raise
        if info["type"] != "file":
            return None
        return int(info["size"]), _etag_of(info)


def remove(uris: list[str]) -> None:
    """Delete files; those already gone are no error.

    Raises:
        LedgerError: one of them cannot be deleted.
    """
    for uri in uris:
        with storage_errors("delete", uri, LedgerError), suppress(FileNotFoundError):
            if is_local(uri):
                os.unlink(local_path(uri))
            else:
                fs, path = open_filesystem(uri)
                fs.rm_file(path)


def list_files(
    uri: str,
    error: type[RefineryError] = ShardError,
    include_partial: bool = False,
    include_broken: bool = False,
) -> Iterator[tuple[str, int, str]]:
    """Every file below a folder or prefix: (name relative to it, size in bytes, etag), streaming.

    Sorted by the UTF-8 bytes of the name on every store, so that a plan is the same wherever the
    files lie. Memory: one page of an object store, or the names of the local folders being walked.
    A missing folder is empty, as it is on an object store. Files being written are left out unless
    `include_partial`, links that lead nowhere unless `include_broken`: those have size -1.

    Raises:
        error: storage cannot be listed (bucket, credentials, network, permission).
    """
    with storage_errors("list", uri, error):
        for name, size, etag, _ in _list_any(uri):
            is_wanted = include_partial or not name.endswith(PARTIAL_SUFFIX)
            if is_wanted and (include_broken or size >= 0):
                yield name, size, etag


def list_times(uri: str) -> Iterator[tuple[str, int, float]]:
    """As `list_files` with files being written: (name, size in bytes, when it was written, seconds
    by the clock of the store, which may not be ours)."""
    with storage_errors("list", uri, LedgerError):
        for name, size, _, written in _list_any(uri):
            if size >= 0:
                yield name, size, written


_Listed = tuple[str, int, str, float]
"""Name, size (-1 for a link that leads nowhere), etag, time of writing."""


def _list_any(uri: str) -> Iterator[_Listed]:
    if is_local(uri):
        root = local_path(uri)
        if os.path.isdir(root):
            yield from _list_local(root, "", ())
        return
    fs, path = open_filesystem(uri)
    if scheme_of(uri) == "s3":
        yield from _list_s3(fs, path)
        return
    found = cast(dict[str, dict[str, object]], fs.find(path, detail=True))
    prefix = path.rstrip("/") + "/"
    for name in sorted(found, key=os.fsencode):
        info = found[name]
        size, written = int(cast(int, info["size"])), cast(float, info["created"])
        yield name.removeprefix(prefix), size, _etag_of(info), written


def _list_local(folder: str, prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[_Listed]:
    """Depth first in key order: a folder sorts as its name with a slash, as in an object store."""
    status = os.stat(folder)
    identity = (status.st_dev, status.st_ino)
    if identity in above:  # a symbolic link back up
        return
    with os.scandir(folder) as entries:
        names = [
            os.fsencode(entry.name) + (b"/" if os.path.isdir(entry.path) else b"")
            for entry in entries
        ]
    names.sort()
    for encoded in names:
        name = os.fsdecode(encoded)
        path = os.path.join(folder, name)
        if name.endswith("/"):
            yield from _list_local(path[:-1], prefix + name, (*above, identity))
            continue
        try:
            status = os.stat(path)
        except OSError:
            if os.path.islink(path):  # leads nowhere, or in a circle
                yield prefix + name, -1, "", 0.0
                continue
            if os.path.lexists(path):
                raise
            continue  # deleted since the listing
        yield prefix + name, status.st_size, _local_etag(status), status.st_mtime


def _list_s3(fs: AbstractFileSystem, path: str) -> Iterator[_Listed]:
    # `fs.find` would hold every entry of the prefix at once: about 2 GB for a million keys.
    for page, prefix in s3_pages(fs, path):
        for entry in page.get("Contents", ()):
            etag, written = entry["ETag"].strip('"'), entry["LastModified"].timestamp()
            yield entry["Key"].removeprefix(prefix), int(entry["Size"]), etag, written


def s3_pages(fs: Any, path: str, **options: str) -> Iterator[tuple[dict[str, Any], str]]:
    """The pages of a listing of a bucket or a folder of it, with the prefix of all its keys."""
    bucket, _, prefix = path.partition("/")
    prefix = prefix + "/" if prefix else ""
    request = {"Bucket": bucket, "Prefix": prefix, **options}
    while True:
        page = fs.call_s3("list_objects_v2", **request)
        yield page, prefix
        if not page.get("IsTruncated"):
            return
        request["ContinuationToken"] = page["NextContinuationToken"]


def _local_etag(status: os.stat_result) -> str:
    return f"{status.st_mtime_ns:x}-{status.st_size:x}"


def _etag_of(info: dict[str, object]) -> str:
    etag = info.get("ETag")
    if etag:
        return str(etag).strip('"')
    return f"{info.get('created', '')}-{info.get('size', 0)}"


def localise(uri: str) -> Path:
    """A local path of a file: itself, or a copy kept in the cache under its URL and etag.

    The cache is `models.cache.cache_folder`.

    Raises:
        AssetError: the file is missing or cannot be fetched.
    """
    info = file_info(uri, AssetError)
    if info is None:
        raise AssetError(f"cannot open {uri}: there is no such file. Check the spelling")
    if is_local(uri):
        return Path(local_path(uri))
    name = hashlib.sha256(f"{uri}\0{info[1]}".encode()).hexdigest()[:24]
    target = cache_folder() / "files" / name / uri.rsplit("/", 1)[-1]
    if not target.is_file() or target.stat().st_size != info[0]:
        fs, path = open_filesystem(uri)
        with storage_errors("fetch", uri, AssetError), atomically(str(target)) as file:
            fs.get_file(path, file.name)
    return target
