"""Cutting an input into shards: the plan of a run.

What counts: loose pictures (`tasks.input.sample.IMAGE_SUFFIXES`) in groups of `shard_size`,
WebDataset tars (.tar, .tar.gz, .tgz) one shard each, Parquet files (.parquet, .pq) in ranges of
rows that end with a row group where they can. Names that begin with a dot (".thumbnails/",
"._a.jpg") and "_temporary/", other kinds of files and links that lead nowhere are left out, and
counted by reason.

Sample keys cannot collide: a loose picture's ends in ".png" or the like, which no other key does; a
Parquet row's is "<file>:<number>", a tar sample's "<file>:<name without a dot>". Keys that come
from a column are compared over all files here.
"""

import hashlib
import json
import logging
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np

from models.errors import ConfigError
from tasks.input.detect import finds_several
from tasks.input.footers import Footer, bytes_between, check_unique, read_footer, row_ranges
from tasks.input.parquet import PARQUET_SUFFIXES
from tasks.input.sample import IMAGE_SUFFIXES, CorruptFileError
from tasks.input.tar import TAR_SUFFIXES, count_samples
from tasks.job import InputConfig, ShardSpec
from tasks.storage.files import file_info, is_local, list_files, local_path, scheme_of

logger = logging.getLogger(__name__)

FOOTERS_AT_ONCE = 16
LONGEST_SUFFIX = 10
MAX_REASONS = 50
"""Endings that are counted by name; what follows is counted together."""
Entry = tuple[str, int, str]
"""(name relative to the input, size in bytes, etag)"""
_KINDS = (
    dict.fromkeys(IMAGE_SUFFIXES, "files")
    | {suffix.rpartition(".")[2]: "tar" for suffix in TAR_SUFFIXES}
    | {suffix.rpartition(".")[2]: "parquet" for suffix in PARQUET_SUFFIXES}
)


def plan_shards(
    input_uri: str,
    shard_size: int,
    limit: int | None = None,
    input: InputConfig | None = None,
    *,
    listing: Iterable[Entry] | None = None,
    skipped: Counter[str] | None = None,
) -> "PlannedShards":
    """Shards of a folder, prefix or single file, streaming: one shard and one page are in memory.

    Args:
        input_uri: local path or URL of a folder, a picture, a tar or a Parquet file.
        shard_size: at most so many pictures in a shard; a tar is one shard whatever it holds.
        limit: stop after so many samples. Tars are then read through to be counted.
        input: columns and fit; the columns of every Parquet file are checked here.
        listing: entries sorted by name to use instead of listing `input_uri`.
        skipped: counts of files that the listing has left out, to go on with.

    Raises:
        ConfigError: a setting is out of range, the input is missing or holds no picture, a column
            is missing, sample keys repeat. Some come only while the result is being iterated.
        NothingNewError: all that there is was left out by the listing.
        ShardError: storage fails while a file is being looked at.
    """
    if shard_size < 1:
        raise ConfigError(f"shard_size is {shard_size}; expected at least 1")
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}; expected at least 1, or none")
    scheme_of(input_uri)
    if is_local(input_uri):
        input_uri = local_path(input_uri)
    plan = _Planner(input_uri, shard_size, limit, input or InputConfig())
    if skipped is not None:
        plan.skipped, plan.has_earlier = skipped, True
    if listing is not None:
        return PlannedShards(plan, input_uri, listing)
    single = _single_file(input_uri)
    if single is not None:
        return PlannedShards(plan, input_uri.rpartition("/")[0], [single])
    files = list_files(input_uri, ConfigError, include_partial=True, include_broken=True)
    return PlannedShards(plan, input_uri, files)


class NothingNewError(ConfigError):
    """An update finds nothing to do, which is no mistake."""


class PlannedShards(Iterator[ShardSpec]):
    """The shards of a plan, made one by one.

    Attributes:
        skipped: files of the listing that are in no shard, by reason; complete at the end.
    """

    def __init__(self, plan: "_Planner", root: str, entries: Iterable[Entry]) -> None:
        self.skipped = plan.skipped
        self._shards = plan.shards(root, entries)
        self._is_open = finds_several(plan.input)

    def __next__(self) -> ShardSpec:
        spec = next(self._shards)
        # How many faces there are only looking tells.
        return replace(spec, num_samples=-1) if self._is_open else spec


def _single_file(uri: str) -> Entry | None:
    name = uri.rstrip("/").rpartition("/")[2]
    if not is_local(uri) and _kind(name) is None:
        return None
    info = file_info(uri, ConfigError)
    if info is None:
        return None
    if _kind(name) is None:
        raise ConfigError(f"{uri} is not a kind of file that can be read; {_looked_for()}")
    return name, *info


def _kind(name: str) -> str | None:
    suffix = name.rpartition(".")[2].lower()
    if suffix == "gz" and not name.lower().endswith(".tar.gz"):
        return None
    return _KINDS.get(suffix)


def _why_not(name: str, size: int) -> str | None:
    """Why a file of the listing is in no shard, or None where it is."""
    if size < 0:
        return "links that lead nowhere"
    if _is_hidden(name):
        return "hidden files"
    if _kind(name) is not None:
        return None
    stem, dot, suffix = name.rpartition("/")[2].rpartition(".")
    is_plain = suffix.isalnum() and len(suffix) <= LONGEST_SUFFIX
    return f".{suffix.lower()}" if stem and dot and is_plain else "files without a known ending"


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "_temporary/")) or "/." in name or "/_temporary/" in name


def _looked_for() -> str:
    endings = ", ".join("." + suffix for suffix in sorted(IMAGE_SUFFIXES))
    return (
        f"looked for pictures ({endings}), tars ({', '.join(TAR_SUFFIXES)}) and Parquet files "
        f"({', '.join(PARQUET_SUFFIXES)})"
    )


@dataclass
class _Planner:
    """The running state of one pass over a listing."""

    input_uri: str
    shard_size: int
    limit: int | None
    input: InputConfig
    has_earlier: bool = False
    num_shards: int = 0
    num_planned: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    kinds: set[str] = field(default_factory=set)
    keys: list[tuple[str, np.ndarray]] = field(default_factory=list)

    @property
    def room(self) -> int:
        """Samples that the limit still allows."""
        return 2**62 if self.limit is None else self.limit - self.num_planned

    def shards(self, root: str, entries: Iterable[Entry]) -> Iterator[ShardSpec]:
        """The shards of the entries, pictures grouped, in the order in which they are complete."""
        group: list[Entry] = []
        with ThreadPoolExecutor(FOOTERS_AT_ONCE, thread_name_prefix="footer") as pool:
            for kind, entry, footer in _look_ahead(self._useful(entries), pool, root, self.input):
                if self.room <= len(group):
                    break
                if kind == "files":
                    group.append(entry)
                    if len(group) == self.shard_size:
                        yield self._files_shard(root, group)
                        group = []
                elif footer is not None:
                    yield from self._parquet_shards(root, entry, footer, self.room - len(group))
                else:
                    yield from self._tar_shards(root, entry, self.room - len(group))
            pool.shutdown(cancel_futures=True)
        group = group[: self.room]
        if group:
            yield self._files_shard(root, group)
        self._finish()

    def _useful(self, entries: Iterable[Entry]) -> Iterator[tuple[str, Entry]]:
        for entry in entries:
            name = entry[0]
            reason = _why_not(name, entry[1])
            if reason is not None:
                is_known = reason in self.skipped or len(self.skipped) < MAX_REASONS
                if not name.endswith("/"):
                    self.skipped[reason if is_known else "other files"] += 1
                continue
            kind = _kind(name)
            assert kind is not None
            if kind not in self.kinds:
                self.kinds.add(kind)
                self._check_kinds(kind)
            if not name.isascii():
                _check_name(name, self.input_uri)
            yield kind, entry

    def _check_kinds(self, kind: str) -> None:
        if kind == "files" and self.input.fit == "align" and self.input.detector is None:
            raise ConfigError(
                f"input.fit is 'align', and {self.input_uri} holds loose pictures, which have no "
                "landmarks. Set input.detector, or input.fit to 'crop' or 'resize'"
            )
        if self.input.key_column is not None and len(self.kinds) > 1 and "parquet" in self.kinds:
            raise ConfigError(
                f"input.key_column is {self.input.key_column!r}, and {self.input_uri} holds "
                "Parquet files and other inputs, whose keys are file names: keys could collide. "
                "Leave key_column out, or run them apart"
            )

    def _files_shard(self, root: str, group: list[Entry]) -> ShardSpec:
        return self._spec(
            "files",
            root,
            members=tuple(name for name, _, _ in group),
            num_samples=len(group),
            num_bytes=sum(size for _, size, _ in group),
            etag=entries_etag(group),
        )

    def _tar_shards(self, root: str, entry: Entry, room: int) -> Iterator[ShardSpec]:
        name, size, _ = entry
        uri, num_samples, stop = f"{root}/{name}", -1, 0
        if self.limit is not None:
            try:
                num_samples = count_samples(uri, room, self.input)
                stop = num_samples if num_samples == room else 0
            except CorruptFileError as problem:  # found again, and quarantined, when it is its turn
                logger.warning("planned although it cannot be counted: %s", problem)
        etag = entries_etag([entry], 0, stop)
        yield self._spec("tar", uri, (name,), 0, stop, num_samples, size, etag)

    def _parquet_shards(
        self, root: str, entry: Entry, footer: "Future[Footer | None]", room: int
    ) -> Iterator[ShardSpec]:
        name, size, _ = entry
        uri = f"{root}/{name}"
        found = footer.result()
        if found is None:  # corrupt: one shard, quarantined when it is its turn
            yield self._spec("parquet", uri, (name,), 0, 0, -1, size, entries_etag([entry]))
            return
        first = 0
        for start, stop in row_ranges(found.group_rows, self.shard_size):
            stop = min(stop, room)
            if stop <= start:
                break
            num_bytes = bytes_between(found, start, stop)
            etag = entries_etag([entry], start, stop)
            yield self._spec("parquet", uri, (name,), start, stop, stop - start, num_bytes, etag)
            first = stop
        if found.key_hashes is not None:
            self.keys.append((uri, found.key_hashes[:first]))

    def _spec(
        self,
        kind: str,
        uri: str,
        members: tuple[str, ...],
        row_start: int = 0,
        row_stop: int = 0,
        num_samples: int = -1,
        num_bytes: int = 0,
        etag: str = "",
    ) -> ShardSpec:
        spec = ShardSpec(
            id=self.num_shards,
            kind=kind,  # type: ignore[arg-type]
            uri=uri,
            members=members,
            row_start=row_start,
            row_stop=row_stop,
            num_samples=num_samples,
            num_bytes=num_bytes,
            etag=etag,
        )
        self.num_shards += 1
        self.num_planned += max(0, num_samples)
        return spec

    def _finish(self) -> None:
        if not self.num_shards:
            counts = in_words(self.skipped)
            if self.has_earlier and self.skipped:
                raise NothingNewError(f"{self.input_uri}: nothing new to do; left alone: {counts}")
            found = f"found only {counts}" if counts else "found nothing"
            if is_local(self.input_uri) and not os.path.exists(local_path(self.input_uri)):
                raise ConfigError(f"{self.input_uri}: there is no such file or folder")
            raise ConfigError(
                f"no pictures in {self.input_uri}: {_looked_for()}; {found}. Check the path"
            )
        if self.input.key_column is not None:
            check_unique(self.keys, self.input.key_column)


def in_words(skipped: Mapping[str, int]) -> str:
    """ "3 .heic, 1 hidden files", most frequent first."""
    return ", ".join(f"{count} {reason}" for reason, count in Counter(skipped).most_common())


def _look_ahead(
    entries: Iterable[tuple[str, Entry]], pool: ThreadPoolExecutor, root: str, config: InputConfig
) -> Iterator[tuple[str, Entry, "Future[Footer | None] | None"]]:
    """Each entry and its kind, with its footer being read where it is a Parquet file."""
    window: deque[tuple[str, Entry, Future[Footer | None] | None]] = deque()
    for kind, entry in entries:
        future = None
        if kind == "parquet":
            future = pool.submit(read_footer, f"{root}/{entry[0]}", config)
        window.append((kind, entry, future))
        if len(window) > FOOTERS_AT_ONCE:
            yield window.popleft()
    yield from window


def entries_etag(entries: Sequence[Entry], *rows: int) -> str:
    """Identity of files as far as a listing tells it, and of a range of rows in them."""
    digest = hashlib.sha256(json.dumps([entries, rows]).encode())
    return digest.hexdigest()


def _check_name(name: str, uri: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ConfigError(
            f"{uri}: the file name {name.encode(errors='backslashreplace').decode()!r} is not "
            "UTF-8, so it cannot be a sample key. Rename the file"
        ) from None
