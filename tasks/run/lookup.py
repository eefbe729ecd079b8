"""Codes, pictures and other doors of chosen rows, read where they lie and nothing else.

A row is a shard and a position in it (`tasks.run.metadata`). A code is one read of just its bytes;
rows that lie together are read together. A picture is found by its row group.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.run.marker import Part
from tasks.run.metadata import READERS, CodeLayout, Snapshot
from tasks.storage.files import is_local, join
from tasks.storage.part_files import chunk_of, open_part, part_errors, read_range

GAP_BYTES = {True: 2**14, False: 2**18}
"""Rows nearer to each other than this are one read, on a local disk and on an object store."""
_MOST_BYTES = 2**26
CODES = "w_plus"


def read_codes(
    snapshot: Snapshot, shards: np.ndarray, positions: np.ndarray, code_at: np.ndarray
) -> np.ndarray:
    """Codes of inverted rows, in their order.

    Args:
        shards, positions, code_at: [N]; an unknown place is -1.

    Returns:
        [N L D] float32.

    Raises:
        LedgerError: a part is missing or damaged.
    """
    layout = snapshot.codes
    assert layout is not None
    found = np.empty((len(shards), *layout.shape), np.float32)

    def read(shard: int, rows: np.ndarray) -> None:
        part = snapshot.markers[shard].parts["latents"]
        at = code_at[rows]
        if (at >= 0).all():
            found[rows] = _codes_in_place(join(snapshot.uri, part.path), at, layout)
            return
        values = _taken(snapshot, part, CODES, positions[rows])
        flat = values.combine_chunks().flatten().to_numpy(zero_copy_only=False)
        found[rows] = flat.reshape(-1, *layout.shape)

    _each_shard(read, shards)
    return found


def read_column(
    snapshot: Snapshot, kind: str, column: str, shards: np.ndarray, positions: np.ndarray
) -> pa.ChunkedArray:
    """A column of images/ or residuals/ for inverted rows, in their order.

    Raises:
        LedgerError: a part is missing or damaged.
    """
    chunks: dict[int, tuple[np.ndarray, pa.ChunkedArray]] = {}

    def read(shard: int, rows: np.ndarray) -> None:
        part = snapshot.markers[shard].parts[kind]
        chunks[shard] = rows, _taken(snapshot, part, column, positions[rows])

    _each_shard(read, shards)
    rows = np.concatenate([rows for rows, _ in chunks.values()])
    values = pa.chunked_array([c for _, v in chunks.values() for c in v.chunks])
    return values.take(pa.array(np.argsort(rows)))


def _each_shard(read: Callable[[int, np.ndarray], None], shards: np.ndarray) -> None:
    with ThreadPoolExecutor(READERS) as pool:
        order = np.argsort(shards, kind="stable")
        groups = np.split(order, np.flatnonzero(np.diff(shards[order])) + 1)
        for done in [pool.submit(read, int(shards[rows[0]]), rows) for rows in groups if len(rows)]:
            done.result()


def _codes_in_place(uri: str, at: np.ndarray, layout: CodeLayout) -> np.ndarray:
    """[N L D] of codes that begin at the given bytes of a file."""
    size = layout.row_bytes
    raw = np.empty((len(at), size), np.uint8)
    order = np.argsort(at, kind="stable")
    starts = at[order]
    for rows in _near(starts, size, GAP_BYTES[is_local(uri)]):
        first = int(starts[rows[0]])
        block = np.frombuffer(read_range(uri, first, int(starts[rows[-1]]) + size), np.uint8)
        for row in rows:
            begin = int(starts[row]) - first
            raw[order[row]] = block[begin : begin + size]
    return raw.view(layout.dtype).reshape(len(at), *layout.shape)


def _near(starts: np.ndarray, size: int, gap: int) -> Iterator[range]:
    """Ranges of rows that are read together."""
    begin = 0
    for row in range(1, len(starts) + 1):
        is_end = row == len(starts) or starts[row] > starts[row - 1] + size + gap
        if is_end or starts[row] + size - starts[begin] > _MOST_BYTES:
            yield range(begin, row)
            begin = row


def _taken(snapshot: Snapshot, part: Part, column: str, positions: np.ndarray) -> pa.ChunkedArray:
    """Rows of a column by their position among the inverted rows; only their groups are read."""
    uri = join(snapshot.uri, part.path)
    with part_errors(uri):
        file = open_part(uri, part.bytes, pre_buffer=True)
        counts = [_present(file, number, column) for number in range(file.num_row_groups)]
        ends = np.cumsum(counts)
        group_of = np.searchsorted(ends, positions, side="right")
        groups, which = np.unique(group_of, return_inverse=True)
        taken = np.array(counts)[groups]
        # From a position in the part to one among the rows of the groups that are read.
        shift = (ends[groups] - taken) - (np.cumsum(taken) - taken)
        values = file.read_row_groups(groups.tolist(), columns=[column])[column].drop_null()
        return values.take(pa.array(positions - shift[which]))


def _present(file: pq.ParquetFile, number: int, column: str) -> int:
    """Rows of a row group whose value is there: failed rows have no code."""
    num_rows = file.metadata.row_group(number).num_rows
    if column != CODES:
        return num_rows
    # A row that is there has a level entry for each of its values, one that is not has one.
    size = file.schema_arrow.field(column).type.list_size
    num_values = chunk_of(file, number, column).num_values
    return (num_values - num_rows) // (size - 1) if size > 1 else num_rows
