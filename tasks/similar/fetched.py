"""Keys, scores and sketches of an index on an object store: all that is fetched of every row.

They lie side by side in the metadata files (`tasks.run.metadata`), a read for each group of rows.
What was read of a file is kept on this machine, where the next process maps it.
"""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import IO, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from models.cache import cache_folder
from models.errors import LedgerError
from models.files import atomically
from tasks.run.metadata import READERS, SKETCH, Segment, Snapshot, has_moved, read_snapshot
from tasks.storage.footer import read_footer
from tasks.storage.part_files import Fetched, PartFile, part_errors

_TRIES = 3


def read_index(index_uri: str) -> tuple[Snapshot, list[pa.Table]]:
    """What is committed of an index; sample_key, scores and sketch of each part of vectors.

    Raises:
        LedgerError: there is no run, or something of it is damaged.
    """
    for _ in range(_TRIES - 1):
        snapshot = read_snapshot(index_uri)
        try:
            return snapshot, _rows(snapshot)
        except LedgerError:
            if not has_moved(snapshot):
                raise
    snapshot = read_snapshot(index_uri)
    return snapshot, _rows(snapshot)


def _rows(snapshot: Snapshot) -> list[pa.Table]:
    columns = ["shard", "sample_key", *snapshot.declared.metrics, SKETCH]
    folder = cache_folder() / "similar" / snapshot.record["run_id"]
    places = [folder / f"{segment.name}.arrow" for segment in snapshot.segments]
    found: dict[int, pa.Table] = {}
    for place, segment in zip(places, snapshot.segments, strict=True):
        each = _by_shard(_kept(place, segment, columns, places))
        found |= {shard: rows for shard, rows in each.items() if shard in segment.shards}
    if snapshot.fresh is not None:
        found |= _by_shard(_indexed(snapshot.fresh.select(columns)))
    return [found[shard] for shard in snapshot.parts("vectors")]


def _kept(path: Path, segment: Segment, columns: Sequence[str], needed: Sequence[Path]) -> pa.Table:
    """All indexed rows of a metadata file, as this machine has them or will have them; what is kept
    of files that are not needed any more goes then."""
    with suppress(OSError, pa.ArrowInvalid):  # not there, or damaged
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    table = _fetched(segment, columns)
    # The answer need not wait for it.
    threading.Thread(target=_keep, args=(path, table, needed)).start()
    return table


def _keep(path: Path, table: pa.Table, needed: Sequence[Path]) -> None:
    with suppress(OSError):  # a home that cannot be written to: it is read again next time
        with atomically(str(path)) as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        for other in {*path.parent.glob("*.arrow")} - {*needed}:
            other.unlink(missing_ok=True)


def _fetched(segment: Segment, columns: Sequence[str]) -> pa.Table:
    def open_file(fetched: Fetched) -> IO[bytes]:
        return cast(IO[bytes], PartFile(segment.uri, segment.bytes, fetched=fetched))

    def read(number: int) -> pa.Table:
        group = footer.row_group(number)
        chunks = [
            c for c in map(group.column, range(group.num_columns)) if c.path_in_schema in columns
        ]
        starts = [c.dictionary_page_offset or c.data_page_offset for c in chunks]
        stops = [a + c.total_compressed_size for a, c in zip(starts, chunks, strict=True)]
        together = open_file(Fetched([(min(starts), max(stops))]))
        return pq.ParquetFile(together, metadata=footer).read_row_group(number, list(columns))

    with part_errors(segment.uri), ThreadPoolExecutor(READERS) as pool:
        footer = read_footer(open_file(segment.fetched))
        return _indexed(pa.concat_tables(pool.map(read, range(footer.num_row_groups))))


def _indexed(table: pa.Table) -> pa.Table:
    """Without the failed rows."""
    if table[SKETCH].null_count:
        table = table.filter(table[SKETCH].is_valid())
    return table.replace_schema_metadata()


def _by_shard(table: pa.Table) -> dict[int, pa.Table]:
    """Each shard's rows, in one piece; most of them are, and stay where they are."""
    shards = np.frombuffer(table["shard"].combine_chunks().buffers()[1], np.int32, len(table))
    starts = np.flatnonzero(np.diff(shards, prepend=-1)).tolist()
    rows = table.drop_columns("shard")
    cuts = zip(starts, [*starts[1:], len(shards)], strict=True)
    found = {int(shards[a]): rows.slice(a, z - a) for a, z in cuts}
    return {
        shard: each if each[SKETCH].num_chunks == 1 else each.combine_chunks()
        for shard, each in found.items()
    }
