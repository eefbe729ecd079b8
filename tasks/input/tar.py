"""WebDataset tars: consecutive members that share a name up to the first dot are one sample.

`.tar`, and `.tar.gz` / `.tgz`, read once from front to back. The first member of a key with a
picture's ending is the picture. Landmarks come from a `<key>.json` object (the entry named by
`input.landmarks_column`) or from `<key>.<landmarks column>.json` / `.npy`. A member that comes
twice, side by side, is a failed sample of its own, `<key>#2`.
"""

import gzip
import io
import json
import math
import os
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from tarfile import BLOCKSIZE, HeaderError, ReadError
from typing import IO, Any, cast

import numpy as np

from models.errors import RefineryError, SampleError, ShardError
from tasks.input.limits import (
    FREE_BYTES,
    MAX_MEMBERS,
    SMALL_FILE_BYTES,
    Unpacked,
    too_many_bytes,
)
from tasks.input.sample import CorruptFileError, RawSample, failed, is_image_name, parse_landmarks
from tasks.job import InputConfig, ShardSpec
from tasks.storage.errors import storage_errors
from tasks.storage.files import is_local, local_path, open_filesystem

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
READ_AHEAD_BYTES = 8 * 2**20
HEADERS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
"""Types of members that only say something of those after them."""
Member = bytes | SampleError | None
"""The content of a member, why it cannot be used, or None where it is of no use."""


class _StrictMember(tarfile.TarInfo):
    """A header that must be whole: tarfile takes damage after the first member for the end. Also,
    tarfile reads headers of any size, and expands a sparse member to whatever size it claims."""

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

    def _proc_member(self, tarfile: tarfile.TarFile) -> "_StrictMember":
        if self.type in HEADERS and self.size > SMALL_FILE_BYTES:
            raise ReadError(f"a header of {self.size} bytes")
        if len(cast(Any, tarfile).pax_headers) > MAX_MEMBERS:
            raise ReadError("too many PAX records")
        return cast(Any, super())._proc_member(tarfile)

    def _proc_sparse(self, tarfile: tarfile.TarFile) -> "_StrictMember":
        """The header of a member of GNU's own sparse kind, its map skipped."""
        file = cast(Any, tarfile).fileobj
        _, is_extended, self.real_size = cast(Any, self)._sparse_structs
        while is_extended:
            block = file.read(BLOCKSIZE)
            is_extended = len(block) == BLOCKSIZE and block[504]
        cast(Any, self).sparse, self.offset_data = [], file.tell()
        tarfile.offset = self.offset_data + cast(Any, self)._block(self.size)
        return self

    def _skip_map(self, following: tarfile.TarInfo, *_: object) -> None:
        cast(Any, following).sparse = []

    _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _skip_map


def read_tar(spec: ShardSpec, config: InputConfig) -> Iterator[RawSample]:
    """The samples in the tar's order; the first `spec.row_stop` where that is not 0.

    A key without a picture, or with one that is too large, comes out as a failed sample.

    Raises:
        ShardError: the tar is missing, cut off, damaged or expands too much, or a key comes again.
    """
    name = spec.members[0] if spec.members else spec.uri.rsplit("/", 1)[-1]
    wanted = config.landmarks_column if config.fit == "align" else None
    seen: set[str] = set()
    for key, members in _groups(spec.uri, wanted, config):
        if key in seen:
            raise ShardError(
                f"tar {spec.uri}: the key {key!r} comes twice, not side by side. "
                "Write the members of a sample one after the other, under a key of its own"
            )
        seen.add(key)
        yield _sample(f"{name}:{key}", spec.uri, members, wanted)
        if len(seen) == spec.row_stop:
            return


def count_samples(uri: str, at_most: int, config: InputConfig) -> int:
    """How many samples a tar holds, reading no further than `at_most` of them.

    Raises:
        ShardError: as `read_tar`.
    """
    count = 0
    for count, _ in enumerate(_groups(uri, None, config), start=1):
        if count == at_most:
            break
    return count


def _groups(
    uri: str, wanted: str | None, config: InputConfig
) -> Iterator[tuple[str, dict[str, Member]]]:
    """(key, {member name: content}) in order."""
    current, members, has_picture = "", dict[str, Member](), False
    repeated: list[str] = []
    with ExitStack() as stack:
        archive, end = _open(uri, stack, config)
        walk = iter(archive)
        while (member := _next(archive, walk, end, uri)) is not None:
            cast(Any, archive).members.clear()  # else one entry a member stays in memory
            name = member.name.removeprefix("./")
            folder, _, base = name.rpartition("/")
            if not member.isreg() or base.startswith("."):
                continue
            stem = base.partition(".")[0]
            key = f"{folder}/{stem}" if folder else stem
            if members and key != current:
                yield from _sample_and_repeated(current, members, repeated)
                members, has_picture, repeated = {}, False, []
            current = key
            if name in members or len(members) >= MAX_MEMBERS:
                repeated += [name] if is_image_name(base) else []
                continue
            is_picture = is_image_name(base) and not has_picture
            has_picture = has_picture or is_picture
            is_point_list = wanted is not None and base.endswith((".json", f".{wanted}.npy"))
            members[name] = None
            if is_picture:
                members[name] = _content(archive, member, uri, config.max_bytes)
            elif is_point_list:
                members[name] = _content(archive, member, uri, SMALL_FILE_BYTES)
    if members:
        yield from _sample_and_repeated(current, members, repeated)


def _sample_and_repeated(
    key: str, members: dict[str, Member], repeated: list[str]
) -> Iterator[tuple[str, dict[str, Member]]]:
    yield key, members
    for number, name in enumerate(repeated, start=2):
        reason = f"{name} comes again: its first copy is the sample {key!r}"
        yield f"{key}#{number}", {name: SampleError("read", reason)}


def _open(
    uri: str, stack: ExitStack, config: InputConfig
) -> tuple[tarfile.TarFile, tuple[float, str]]:
    """The archive, a position beyond which it cannot go on, and why."""
    with _tar_errors(uri):
        if is_local(uri):
            file = cast(IO[bytes], stack.enter_context(open(local_path(uri), "rb")))  # noqa: SIM115
        else:
            fs, path = open_filesystem(uri)
            options = {"block_size": READ_AHEAD_BYTES, "cache_type": "readahead"}
            file = cast(IO[bytes], stack.enter_context(fs.open(path, "rb", **options)))
        end: float = file.seek(0, os.SEEK_END)
        file.seek(0)
        stream, reason = file, "unexpected end of data"
        if not uri.lower().endswith(".tar"):
            unzipped = stack.enter_context(gzip.GzipFile(fileobj=file, mode="rb"))
            end = FREE_BYTES + config.max_expansion * end
            reason = f"unpacks to more than {end:.0f} bytes, as input.max_expansion allows"
            # Read forwards alone, a stream needs no more than `read`.
            bounded = Unpacked(cast(IO[bytes], unzipped), file, config.max_expansion, uri)
            stream = cast(IO[bytes], bounded)
        archive = tarfile.open(  # noqa: SIM115
            fileobj=stream, mode="r|", tarinfo=_StrictMember, errors="backslashreplace"
        )
        return stack.enter_context(archive), (end, reason)


def _next(
    archive: tarfile.TarFile, walk: Iterator[tarfile.TarInfo], end: tuple[float, str], uri: str
) -> tarfile.TarInfo | None:
    position, reason = end
    with _tar_errors(uri):
        member = next(walk, None)
        # tarfile would go there block by block, past the end of the file.
        if member is not None and archive.offset > position + BLOCKSIZE:
            raise ReadError(reason)
        return member


def _content(
    archive: tarfile.TarFile, member: tarfile.TarInfo, uri: str, most: int
) -> bytes | SampleError:
    name = member.name.removeprefix("./")
    if cast(Any, member).sparse is not None:
        return SampleError("read", f"{name} is a sparse member; write the tar without --sparse")
    problem = too_many_bytes(name, member.size, most)
    if problem is not None:
        return problem
    with _tar_errors(uri):
        file = archive.extractfile(member)
        assert file is not None, "only regular members get here"
        return file.read()


@contextmanager
def _tar_errors(uri: str) -> Iterator[None]:
    try:
        with storage_errors("read tar", uri):
            yield
    except ShardError as problem:
        if isinstance(problem.__cause__, gzip.BadGzipFile):
            raise _corrupt(uri, problem.__cause__) from problem
        raise
    except (RefineryError, MemoryError):
        raise
    except Exception as problem:
        # On damaged files tarfile raises its own errors, ValueError, EOFError, RecursionError and
        # more, and zlib its own; whatever it is, it is this file's.
        raise _corrupt(uri, problem) from problem


def _corrupt(uri: str, problem: BaseException) -> CorruptFileError:
    return CorruptFileError(
        f"tar {uri} is corrupt ({problem}). Write or copy the file again, then run again"
    )


def _sample(key: str, uri: str, members: dict[str, Member], wanted: str | None) -> RawSample:
    found = next(((n, d) for n, d in members.items() if d is not None and is_image_name(n)), None)
    if found is None:
        names = ", ".join(name.rpartition("/")[2] for name in members)
        return failed(key, f"{uri}#{next(iter(members))}", "read", f"no picture among: {names}")
    name, data = found
    place = f"{uri}#{name}"
    if isinstance(data, SampleError):
        return RawSample(key, place, None, None, data)
    if wanted is None:
        return RawSample(key, place, data)
    try:
        return RawSample(key, place, data, landmarks_of(members, wanted))
    except SampleError as problem:
        return RawSample(key, place, None, None, problem)


def landmarks_of(members: Mapping[str, Member], wanted: str) -> Any:
    """The five points [5 2] of one sample, or None where no member holds them.

    Args:
        members: content by name.
        wanted: `input.landmarks_column`.

    Raises:
        SampleError: kind "align": the member that should hold them does not.
    """
    for name, data in members.items():
        extension = name.rpartition("/")[2].partition(".")[2]
        if data is None or not extension.endswith(("json", "npy")):
            continue
        if isinstance(data, SampleError):
            raise SampleError("align", f"landmarks in {name} cannot be read: {data}")
        try:
            if extension == f"{wanted}.npy":
                return parse_landmarks(_read_array(data))
            if extension == f"{wanted}.json":
                return parse_landmarks(json.loads(data))
            value = json.loads(data) if extension == "json" else None
            if isinstance(value, dict) and wanted in value:
                return parse_landmarks(value[wanted])
        except SampleError:
            raise
        except Exception as problem:  # a header or nesting that no reader foresaw is this file's
            reason = " ".join(str(problem).split())[:200] or type(problem).__name__
            raise SampleError("align", f"landmarks in {name} cannot be read: {reason}") from None
    return None


def _read_array(data: bytes) -> np.ndarray:
    """A .npy file, once its header claims no more than there is: numpy would first make room."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read_header = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, _, kind = read_header(file)
    if math.prod(shape) * kind.itemsize > len(data):
        raise ValueError(f"its header says {kind} {list(shape)}, and it has {len(data)} bytes")
    return np.load(io.BytesIO(data), allow_pickle=False)
