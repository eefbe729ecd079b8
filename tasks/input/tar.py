"""WebDataset tars: consecutive members that share a name up to the first dot are one sample.

`.tar`, and `.tar.gz` / `.tgz`, read once from front to back. The first member of a key with a
picture's ending is the picture. Landmarks come from a `<key>.json` object (the entry named by
`input.landmarks_column`) or from `<key>.<landmarks column>.json` / `.npy`.
"""

import gzip
import io
import json
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from tarfile import HeaderError, ReadError
from typing import IO, Any, cast

import numpy as np

from models.errors import SampleError, ShardError
from tasks.input.sample import CorruptFileError, RawSample, failed, is_image_name, parse_landmarks
from tasks.job import InputConfig, ShardSpec
from tasks.storage.errors import storage_errors
from tasks.storage.files import is_local, local_path, open_filesystem

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
READ_AHEAD_BYTES = 8 * 2**20


class _StrictMember(tarfile.TarInfo):
    """A header that must be whole: tarfile takes damage after the first member for the end."""

    @classmethod
    def fromtarfile(cls, tarfile: tarfile.TarFile) -> "_StrictMember":
        try:
            return cast("_StrictMember", super().fromtarfile(tarfile))
        except HeaderError as problem:
            name = type(problem).__name__
            if name == "EOFHeaderError":  # the block of zeros that ends an archive
                raise
            if name == "EmptyHeaderError":
                raise ReadError("cut off: the end-of-archive mark is missing") from problem
            raise ReadError(f"damaged header: {problem}") from problem


def read_tar(spec: ShardSpec, config: InputConfig) -> Iterator[RawSample]:
    """The samples in the tar's order; the first `spec.row_stop` where that is not 0.

    A key without a picture comes out as a failed sample.

    Raises:
        ShardError: the tar is missing, cut off or damaged, or holds a key twice.
    """
    name = spec.members[0] if spec.members else spec.uri.rsplit("/", 1)[-1]
    wanted = config.landmarks_column if config.fit == "align" else None
    seen: set[str] = set()
    for key, members in _groups(spec.uri, wanted):
        if key in seen:
            raise ShardError(
                f"tar {spec.uri}: the key {key!r} comes twice, not side by side. "
                "Write the members of a sample one after the other, under a key of its own"
            )
        seen.add(key)
        yield _sample(f"{name}:{key}", spec.uri, members, wanted)
        if len(seen) == spec.row_stop:
            return


def count_samples(uri: str, at_most: int) -> int:
    """How many samples a tar holds, reading no further than `at_most` of them.

    Raises:
        ShardError: as `read_tar`.
    """
    count = 0
    for count, _ in enumerate(_groups(uri, None), start=1):
        if count == at_most:
            break
    return count


def _groups(uri: str, wanted: str | None) -> Iterator[tuple[str, dict[str, bytes | None]]]:
    """(key, {member name: content, None where it is of no use}) in order."""
    current, members, has_picture = "", dict[str, bytes | None](), False
    with ExitStack() as stack:
        archive = _open(uri, stack)
        walk = iter(archive)
        while (member := _next(walk, uri)) is not None:
            cast(Any, archive).members.clear()  # else one entry a member stays in memory
            name = member.name.removeprefix("./")
            folder, _, base = name.rpartition("/")
            if not member.isreg() or base.startswith("."):
                continue
            stem = base.partition(".")[0]
            key = f"{folder}/{stem}" if folder else stem
            if members and key != current:
                yield current, members
                members, has_picture = {}, False
            current = key
            is_picture = is_image_name(base) and not has_picture
            has_picture = has_picture or is_picture
            is_point_list = wanted is not None and base.endswith((".json", f".{wanted}.npy"))
            useful = is_picture or is_point_list
            members[name] = _content(archive, member, uri) if useful else None
    if members:
        yield current, members


def _open(uri: str, stack: ExitStack) -> tarfile.TarFile:
    with _tar_errors(uri):
        if is_local(uri):
            file = cast(IO[bytes], stack.enter_context(open(local_path(uri), "rb")))  # noqa: SIM115
        else:
            fs, path = open_filesystem(uri)
            options = {"block_size": READ_AHEAD_BYTES, "cache_type": "readahead"}
            file = cast(IO[bytes], stack.enter_context(fs.open(path, "rb", **options)))
        if not uri.lower().endswith(".tar"):
            unzipped = stack.enter_context(gzip.GzipFile(fileobj=file, mode="rb"))
            file = cast(IO[bytes], unzipped)
        archive = tarfile.open(  # noqa: SIM115
            fileobj=file, mode="r|", tarinfo=_StrictMember, errors="backslashreplace"
        )
        return stack.enter_context(archive)


def _next(walk: Iterator[tarfile.TarInfo], uri: str) -> tarfile.TarInfo | None:
    with _tar_errors(uri):
        return next(walk, None)


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo, uri: str) -> bytes:
    with _tar_errors(uri):
        file = archive.extractfile(member)
        assert file is not None, "only regular members get here"
        return file.read()


@contextmanager
def _tar_errors(uri: str) -> Iterator[None]:
    try:
        with storage_errors("read tar", uri):
            yield
    except (tarfile.TarError, EOFError, zlib.error) as problem:
        raise _corrupt(uri, problem) from problem
    except ShardError as problem:
        if isinstance(problem.__cause__, gzip.BadGzipFile):
            raise _corrupt(uri, problem.__cause__) from problem
        raise


def _corrupt(uri: str, problem: BaseException) -> CorruptFileError:
    return CorruptFileError(
        f"tar {uri} is corrupt ({problem}). Write or copy the file again, then run again"
    )


def _sample(key: str, uri: str, members: dict[str, bytes | None], wanted: str | None) -> RawSample:
    found = next(((n, d) for n, d in members.items() if d is not None and is_image_name(n)), None)
    if found is None:
        names = ", ".join(name.rpartition("/")[2] for name in members)
        return failed(key, f"{uri}#{next(iter(members))}", "read", f"no picture among: {names}")
    name, data = found
    place = f"{uri}#{name}"
    if wanted is None:
        return RawSample(key, place, data)
    try:
        return RawSample(key, place, data, _landmarks(members, wanted))
    except SampleError as problem:
        return RawSample(key, place, None, None, problem)


def _landmarks(members: dict[str, bytes | None], wanted: str) -> Any:
    """The five points of one sample, or None where no member holds them."""
    for name, data in members.items():
        extension = name.rpartition("/")[2].partition(".")[2]
        if data is None:
            continue
        try:
            if extension == f"{wanted}.npy":
                return parse_landmarks(np.load(io.BytesIO(data), allow_pickle=False))
            if extension == f"{wanted}.json":
                return parse_landmarks(json.loads(data))
            value = json.loads(data) if extension == "json" else None
            if isinstance(value, dict) and wanted in value:
                return parse_landmarks(value[wanted])
        except (ValueError, EOFError) as problem:
            raise SampleError("align", f"landmarks in {name} cannot be read: {problem}") from None
    return None
