"""All rows of a run without their codes in one compact file, and a consistent look at a run.

    metadata/000100-9f3c21d0.parquet     the rows of 100 shards, those shards' markers in the footer

Written at sealing, and every `EVERY` commits while a run is at work. It is derived: delete it, and
answers stay the same. Columns of one family lie together (keys, texts, numbers), so that a question
of metrics is one request for each 262,144 rows. What nobody but the machine reads:

    shard       of the row
    position    of an inverted row among the inverted ones of its shard: its row in images/ and
                residuals/; null for a failed one
    code_at     where its code begins in the latents part, bytes; null where parts are older than
                that layout (`tasks.run.parts`)
    sketch      of an index: of the row's vector (`tasks.run.vectors`); null for a failed one

A reader lists commits/ and metadata/. A shard whose marker is the one that a metadata file was made
from is read there, any other from its part. So the answer is the present one while workers commit,
after kills and after shards were done again; and it holds no row twice.
"""

import base64
import json
import logging
import uuid
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from models.cache import cache_folder
from models.errors import LedgerError
from tasks.run import ledger, run_json
from tasks.run.marker import Marker, Part
from tasks.run.parts import has_rows_in_place
from tasks.run.vectors import codes_of, open_vectors
from tasks.storage.files import file_info, join, list_files, list_times, open_write, remove
from tasks.storage.footer import read_footer
from tasks.storage.part_files import (
    Fetched,
    PartFile,
    Region,
    chunk_of,
    open_part,
    part_errors,
    read_part,
)

logger = logging.getLogger(__name__)

FOLDER = "metadata"
EVERY = 64
"""Commits between two metadata files of a run at work; a reader keeps so many on its machine."""
GROUP_ROWS = 2**18
FOOTER_BYTES = 2**20
READERS = 16
SKETCH = "sketch"
FAMILIES = (("image_uri", "image_sha256", "error", "seed"), ("sample_key",), (), (SKETCH,))
"""Columns that lie together; the others, all numbers or of few values, are the third family."""
_OTHERS = FAMILIES.index(())
PLACES = ("shard", "position", "code_at")
_FEW_VALUES = ("status", "error_kind", "method", "run_id")


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One metadata file.

    Attributes:
        held: the markers it was made from.
        tags: of their files, as they were listed then.
        shards: those of them whose rows count.
        fetched: its bytes as far as they were read, with what is read together.
    """

    uri: str
    bytes: int
    held: dict[int, Marker]
    tags: dict[int, str]
    shards: frozenset[int]
    fetched: Fetched
    codes: "CodeLayout"

    @property
    def is_whole(self) -> bool:
        """All its rows count."""
        return len(self.shards) == len(self.held)

    @property
    def name(self) -> str:
        return self.uri.rsplit("/", 1)[-1]


@dataclass(frozen=True, kw_only=True)
class CodeLayout:
    """How a code is stored: its shape (L, D), float16 or float32."""

    shape: tuple[int, int]
    dtype: str

    @property
    def size(self) -> int:
        return self.shape[0] * self.shape[1]

    @property
    def row_bytes(self) -> int:
        return self.size * np.dtype(self.dtype).itemsize


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What stood in a run at one moment.

    Attributes:
        record: run.json.
        commits: of each shard the latest.
        tags: of the files in commits/, as listed before they were read.
        segments: metadata files, each with the shards that are read there.
        fresh: rows of all other shards, as in a metadata file; None where there are none.
        codes: None while no row is committed.
    """

    uri: str
    record: dict[str, Any]
    declared: run_json.Declared
    commits: ledger.Commits
    tags: dict[int, str]
    quarantined: dict[int, ledger.Quarantined]
    is_sealed: bool
    segments: tuple[Segment, ...]
    fresh: pa.Table | None
    codes: CodeLayout | None

    @property
    def markers(self) -> dict[int, Marker]:
        """The commits that count, by shard, in order."""
        return self.commits.markers

    @property
    def num_rows(self) -> int:
        return sum(marker.rows for marker in self.markers.values())

    def parts(self, kind: str) -> dict[int, str]:
        """Paths of a kind of part by shard."""
        return {s: m.parts[kind].path for s, m in self.markers.items() if kind in m.parts}


# ---------------------------------------------------------------------------- reading


def read_snapshot(run_uri: str) -> Snapshot:
    """Look at a run: two listings, run.json, the footers of its metadata files, and the parts that
    are in none of them.

    Raises:
        LedgerError: no run, a damaged marker or part, or a store that does not answer.
    """
    with ThreadPoolExecutor(READERS) as pool:
        record = pool.submit(run_json.read_run, run_uri)
        sealed = pool.submit(file_info, join(run_uri, "_SEALED.json"))
        failed = pool.submit(lambda: list(list_files(join(run_uri, "failed"), LedgerError)))
        files = pool.submit(lambda: list(list_files(join(run_uri, FOLDER), LedgerError)))
        tags, names = _listed(run_uri)  # before any marker is read: a later commit looks like new
        run = record.result()
        found = [(join(run_uri, FOLDER, name), size) for name, size, _ in files.result()]
        found += [(str(path), path.stat().st_size) for path in _cache(run).glob("*.parquet")]
        # The largest file first: of a sealed run it is the only one that is opened.
        found.sort(key=lambda file: file[0].rsplit("/", 1)[-1], reverse=True)
        segments, known = _known(found, tags)
        commits = ledger.read_commits(run_uri, names=names, known=known)
        for error in commits.damaged.values():
            logger.warning("left out: %s", error)
        left = dict(commits.markers)
        for number, segment in enumerate(segments):
            # By what they say: a run that was copied has other times on its files.
            same = {s for s, marker in left.items() if segment.held.get(s) == marker}
            segments[number] = replace(segment, shards=frozenset(same))
            left = {s: marker for s, marker in left.items() if s not in same}
        tables = list(pool.map(partial(part_rows, run_uri), (m for m in left.values() if m.rows)))
    fresh = pa.concat_tables(tables, promote_options="permissive") if tables else None
    segments = [segment for segment in segments if segment.shards]
    codes = segments[0].codes if segments else fresh and _layout(fresh.schema.metadata)
    snapshot = Snapshot(
        uri=run_uri,
        record=run,
        declared=run_json.declared_by(run, run_uri),
        commits=commits,
        tags=tags,
        quarantined=ledger.read_quarantine(run_uri, commits) if failed.result() else {},
        is_sealed=sealed.result() is not None,
        segments=tuple(segments),
        fresh=fresh,
        codes=codes or None,
    )
    _remember(snapshot, len(left))
    return snapshot


def read_markers(run_uri: str) -> dict[int, Marker]:
    """`ledger.read_markers` in fewer requests: what a metadata file holds is read there."""
    tags, names = _listed(run_uri)
    files = ((name, size) for name, size, _ in list_files(join(run_uri, FOLDER), LedgerError))
    found = [(join(run_uri, FOLDER, name), size) for name, size in sorted(files, reverse=True)]
    return ledger.read_markers(run_uri, names=names, known=_known(found, tags)[1])


def has_moved(snapshot: Snapshot) -> bool:
    """Whether the run has gone on since: a commit, or a metadata file replaced by another."""
    segments = (file_info(segment.uri) for segment in snapshot.segments)
    return None in segments or _listed(snapshot.uri)[0] != snapshot.tags


def _listed(run_uri: str) -> tuple[dict[int, str], list[str]]:
    """What says that a shard's places in commits/ are as they were, and the names there."""
    tags: dict[int, str] = {}
    names: list[str] = []
    for name, size, etag in list_files(join(run_uri, "commits"), LedgerError):
        place = ledger.place_of(name)
        if place is not None:
            names.append(name)
            tags[place[0]] = f"{tags.get(place[0], '')}{place[1]}:{size}-{etag} "
    return tags, names


def _known(
    files: Sequence[tuple[str, int]], tags: Mapping[int, str]
) -> tuple[list[Segment], dict[int, tuple[int, Marker]]]:
    """The metadata files that are needed, and the commits in them that are as they were."""
    segments: list[Segment] = []
    known: dict[int, tuple[int, Marker]] = {}
    for uri, size in files:
        if tags.keys() <= known.keys():
            break
        try:
            segment, made_from = _open_segment(uri, size)
        except LedgerError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                raise
            logger.warning("left out: %s", error)
            continue
        for shard, (tag, generation) in made_from.items():
            if tags.get(shard) == tag:
                known.setdefault(shard, (generation, segment.held[shard]))
        segments.append(segment)
    return segments, known


def _open_segment(uri: str, size: int) -> tuple[Segment, dict[int, tuple[str, int]]]:
    """A metadata file, and tag and generation of each commit it was made from."""
    fetched = Fetched.tail(size, FOOTER_BYTES)
    with part_errors(uri):
        footer = read_footer(cast(IO[bytes], PartFile(uri, size, fetched=fetched)))
    fetched.add(_regions(footer))
    values = footer.metadata or {}
    try:
        made_from = json.loads(zlib.decompress(base64.b64decode(values[b"markers"])))
        held: dict[int, Marker] = {}
        for shard, (_, _, text) in made_from.items():
            marker = Marker.from_json(text.encode(), uri)
            assert isinstance(marker, Marker)
            held[int(shard)] = marker
        codes = _layout(values)
        if SKETCH not in footer.schema.names and any("vectors" in m.parts for m in held.values()):
            raise ValueError("of an index, without sketches")
    except (KeyError, ValueError, zlib.error) as error:
        raise LedgerError(
            f"{uri}: not a metadata file ({type(error).__name__}: {error}); delete it: it is made "
            "from the parts, and answers do without it"
        ) from error
    segment = Segment(
        uri=uri,
        bytes=size,
        held=held,
        tags={int(shard): tag for shard, (tag, _, _) in made_from.items()},
        shards=frozenset(),
        fetched=fetched,
        codes=codes,
    )
    return segment, {int(s): (tag, generation) for s, (tag, generation, _) in made_from.items()}


def _regions(footer: pq.FileMetaData) -> Iterator[Region]:
    for number in range(footer.num_row_groups):
        group = footer.row_group(number)
        ends: dict[int, list[int]] = {}
        for column in map(group.column, range(group.num_columns)):
            start = column.dictionary_page_offset or column.data_page_offset
            ends.setdefault(_family(column.path_in_schema), []).extend(
                (start, start + column.total_compressed_size)
            )
        yield from ((min(found), max(found)) for found in ends.values())


def _family(column: str) -> int:
    return next((n for n, names in enumerate(FAMILIES) if column in names), _OTHERS)


def _layout(metadata: Mapping[bytes, bytes]) -> CodeLayout:
    found = json.loads(metadata[b"codes"])
    return CodeLayout(shape=tuple(found["shape"]), dtype=found["dtype"])


def part_rows(run_uri: str, marker: Marker) -> pa.Table:
    """The rows of one committed shard as a metadata file has them.

    Raises:
        LedgerError: the part is missing or damaged.
    """
    part = marker.parts["latents"]
    uri = join(run_uri, part.path)
    with part_errors(uri):
        file = open_part(uri, part.bytes, pre_buffer=True)
        codes = file.schema_arrow.field("w_plus")
        table = file.read([name for name in file.schema_arrow.names if name != codes.name])
    is_ok = np.array([status == "ok" for status in table["status"].to_pylist()], bool)
    if "vectors" in marker.parts:  # an index has those, and no codes
        sketches = _sketches(run_uri, marker.parts["vectors"], is_ok)
        table, is_ok = table.append_column(SKETCH, sketches), np.zeros_like(is_ok)
    position = np.cumsum(is_ok) - 1
    places = {
        "shard": pa.array(np.full(table.num_rows, marker.shard, np.int32)),
        "position": pa.array(position.astype(np.int32), mask=~is_ok),
        "code_at": pa.array(_code_offsets(file, is_ok), mask=~is_ok),
    }
    if not has_rows_in_place(codes):
        places["code_at"] = pa.nulls(table.num_rows, pa.int64())
    for name, values in places.items():
        table = table.append_column(name, values)
    shape = json.loads(codes.metadata[b"shape"])
    text = json.dumps({"shape": shape, "dtype": codes.type.value_type.to_pandas_dtype().__name__})
    return table.replace_schema_metadata({"codes": text})


def _sketches(run_uri: str, part: Part, is_ok: np.ndarray) -> pa.Array:
    """Of an index's part, at the rows that have one."""
    given = codes_of(open_vectors(run_uri, part), SKETCH)
    found = np.zeros((len(is_ok), given.shape[1]), np.uint8)
    found[is_ok] = given
    kind = pa.binary(given.shape[1])
    is_there = pa.py_buffer(np.packbits(is_ok, bitorder="little"))
    return pa.Array.from_buffers(kind, len(found), [is_there, pa.py_buffer(found)])


def _code_offsets(file: pq.ParquetFile, is_ok: np.ndarray) -> np.ndarray:
    """Where each inverted row's code begins: codes are the last bytes of their column chunk."""
    kind = file.schema_arrow.field("w_plus").type
    row_bytes = kind.list_size * kind.value_type.bit_width // 8
    found, row = np.zeros(len(is_ok), np.int64), 0
    for number in range(file.num_row_groups):
        chunk = chunk_of(file, number, "w_plus")
        num_rows = file.metadata.row_group(number).num_rows
        rows = row + np.flatnonzero(is_ok[row : row + num_rows])
        end = chunk.data_page_offset + chunk.total_compressed_size
        found[rows] = end - row_bytes * np.arange(len(rows), 0, -1)
        row += num_rows
    return found


# ---------------------------------------------------------------------------- writing


def write_metadata(run_uri: str, keep_earlier: bool = False) -> str | None:
    """One file of all rows that are committed, in order of shards; earlier ones are removed.

    Args:
        keep_earlier: they stay for who is reading them, until `remove_superseded`.

    Returns:
        Its URI, or None where no row is committed.

    Raises:
        LedgerError: a part is missing or damaged, or the file cannot be written.
    """
    snapshot = read_snapshot(run_uri)
    markers = {s: m for s, m in snapshot.markers.items() if m.rows}
    if not markers:
        return None
    if len(snapshot.segments) == 1 and snapshot.fresh is None:
        only = snapshot.segments[0]
        is_own = only.uri.startswith(join(run_uri, FOLDER))
        if is_own and only.is_whole and only.tags.items() <= snapshot.tags.items():
            return only.uri

    def tables() -> Iterator[pa.Table]:
        waiting = list(markers.values())
        with ThreadPoolExecutor(READERS) as pool:
            for at in range(0, len(waiting), 2 * READERS):
                some = waiting[at : at + 2 * READERS]
                yield from pool.map(lambda marker: part_rows(run_uri, marker), some)

    folder = join(run_uri, FOLDER)
    earlier = list_files(folder, LedgerError) if keep_earlier else ()
    kept = [name for name, _, _ in earlier]
    return _replace_segments(snapshot, folder, tables(), markers, kept)


def remove_superseded(run_uri: str, older_than_s: float) -> list[str]:
    """Delete all files of metadata but the latest.

    Args:
        older_than_s: those written less than so long before it stay, by the store's clock.

    Returns:
        The removed paths, relative to the run.
    """
    files = sorted((written, name) for name, _, written in list_times(join(run_uri, FOLDER)))
    now = files[-1][0] if files else 0.0
    old = [f"{FOLDER}/{name}" for written, name in files[:-1] if now - written >= older_than_s]
    remove([join(run_uri, path) for path in old])
    return old


def refresh_metadata(run_uri: str) -> None:
    """The same for a run at work: a further file of what is new, smaller earlier ones folded in.

    Raises:
        LedgerError: as `write_metadata`.
    """
    snapshot = read_snapshot(run_uri)
    if snapshot.fresh is None:
        return
    folder = join(run_uri, FOLDER)
    own = [segment for segment in snapshot.segments if segment.uri.startswith(folder)]
    _fold(snapshot, own, folder)


def _fold(snapshot: Snapshot, own: Sequence[Segment], folder: str) -> None:
    """A file in `folder` of what is fresh, and of those of the folder that hold no more shards."""
    assert snapshot.fresh is not None
    shards = set(snapshot.fresh["shard"].unique().to_pylist())
    folded = [segment for segment in own if len(segment.shards) <= len(shards)]
    kept = [segment for segment in own if segment not in folded]
    tables = [*(segment_rows(segment) for segment in folded), snapshot.fresh]
    shards |= {shard for segment in folded for shard in segment.shards}
    markers = {shard: snapshot.markers[shard] for shard in sorted(shards)}
    names = {segment.name for segment in kept}
    _replace_segments(snapshot, folder, tables, markers, names)


def segment_rows(segment: Segment) -> pa.Table:
    """The rows of a metadata file that count."""
    table = read_part(segment.uri, segment.bytes)
    if not segment.is_whole:
        wanted = np.isin(table["shard"].to_numpy(), list(segment.shards))
        table = table.filter(pa.array(wanted))
    layout = json.dumps({"shape": segment.codes.shape, "dtype": segment.codes.dtype})
    return table.replace_schema_metadata({"codes": layout})


def _replace_segments(
    snapshot: Snapshot,
    folder: str,
    tables: Iterable[pa.Table],
    markers: Mapping[int, Marker],
    kept: Iterable[str] = (),
) -> str:
    earlier = [name for name, _, _ in list_files(folder, LedgerError) if name not in kept]
    uri = join(folder, f"{len(markers):06d}-{uuid.uuid4().hex[:8]}.parquet")
    generations = snapshot.commits.counted
    made_from = {
        shard: (snapshot.tags[shard], generations[shard], marker.to_json().decode())
        for shard, marker in markers.items()
    }
    text = base64.b64encode(zlib.compress(json.dumps(made_from).encode()))
    with open_write(uri) as file:
        writer: pq.ParquetWriter | None = None
        codes = b""
        for table in _in_groups(tables):
            if writer is None:
                writer = _writer(file, table.schema)
                codes = (table.schema.metadata or {})[b"codes"]
            writer.write_table(table.cast(writer.schema), row_group_size=GROUP_ROWS)
        assert writer is not None
        writer.add_key_value_metadata({b"markers": text, b"codes": codes})
        writer.close()
    remove([join(folder, name) for name in earlier])
    return uri


def _in_groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Tables of `GROUP_ROWS` rows, the last one smaller; columns by family."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        while sum(found.num_rows for found in waiting) >= GROUP_ROWS:
            joined = pa.concat_tables(waiting, promote_options="permissive")
            yield _by_family(joined.slice(0, GROUP_ROWS))
            waiting = [joined.slice(GROUP_ROWS)]
    if waiting and sum(found.num_rows for found in waiting):
        yield _by_family(pa.concat_tables(waiting, promote_options="permissive"))


def _by_family(table: pa.Table) -> pa.Table:
    return table.select(sorted(table.column_names, key=_family))


def _writer(file: Any, schema: pa.Schema) -> pq.ParquetWriter:
    floats = [field.name for field in schema if pa.types.is_floating(field.type)]
    encodings = dict.fromkeys(floats, "BYTE_STREAM_SPLIT")
    encodings |= dict.fromkeys(PLACES, "DELTA_BINARY_PACKED")
    return pq.ParquetWriter(
        file,
        schema.with_metadata(None),
        compression={  # type: ignore[arg-type]  # a name for each column is allowed too
            name: "none" if name == SKETCH else "zstd" for name in schema.names
        },
        use_dictionary=list(_FEW_VALUES),  # type: ignore[arg-type]  # columns are allowed here too
        column_encoding=encodings,
    )


# ---------------------------------------------------------------------------- this machine's copy


def _cache(record: Mapping[str, Any]) -> Path:
    """Where a reader keeps the rows of a run that has not written them itself yet."""
    return cache_folder() / FOLDER / record["run_id"]


def _remember(snapshot: Snapshot, read: int) -> None:
    folder = _cache(snapshot.record)
    own = [segment for segment in snapshot.segments if segment.uri.startswith(str(folder))]
    if snapshot.fresh is not None and read >= EVERY:
        with suppress(LedgerError):  # a home that cannot be written to: it is read again next time
            _fold(snapshot, own, str(folder))
