"""What planning reads of a Parquet file: its row groups, and sample keys that a column holds."""

import hashlib
import logging
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from models.errors import ConfigError
from tasks.input.parquet import (
    batch_rows,
    check_columns,
    check_groups,
    open_parquet,
    parquet_errors,
)
from tasks.input.sample import CorruptFileError
from tasks.job import InputConfig

KEYS_AT_ONCE = 65_536

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Footer:
    """What planning needs of a Parquet file.

    Attributes:
        group_rows: rows of each row group.
        group_bytes: encoded picture bytes of each row group.
        key_hashes: 64-bit hashes of the sample keys, where they come from a column.
    """

    group_rows: list[int]
    group_bytes: list[int]
    key_hashes: np.ndarray | None


def read_footer(uri: str, config: InputConfig) -> Footer | None:
    """The footer and, where keys come from a column, their hashes. None for a corrupt file.

    Raises:
        ConfigError: a column is missing or of the wrong type, or a key is null.
        ShardError: storage fails.
    """
    try:
        with ExitStack() as stack:
            file = open_parquet(uri, stack)
            check_groups(
                file, check_columns(file.schema_arrow, config, uri, ConfigError), config, uri
            )
            groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
            hashes = None
            if config.key_column is not None:
                hashes = np.fromiter(map(_hash, _read_keys(uri, config.key_column)), np.uint64)
            return Footer(
                [group.num_rows for group in groups],
                [_image_bytes(group, config.image_column) for group in groups],
                hashes,
            )
    except CorruptFileError as problem:
        logger.warning("planned although it cannot be read: %s", problem)
        return None


def _image_bytes(group: pq.RowGroupMetaData, column: str) -> int:
    chunks = [group.column(i) for i in range(group.num_columns)]
    return sum(c.total_compressed_size for c in chunks if c.path_in_schema.split(".")[0] == column)


def row_ranges(group_rows: list[int], shard_size: int) -> Iterator[tuple[int, int]]:
    """Half-open ranges of at most `shard_size` rows that end with a row group where they can.

    A row group larger than a shard is cut into pieces of nearly equal size.
    """
    start = at = 0
    for rows in group_rows:
        if at > start and at + rows - start > shard_size:
            yield start, at
            start = at
        if rows > shard_size:
            pieces = -(-rows // shard_size)
            edges = [at + rows * piece // pieces for piece in range(pieces + 1)]
            yield from pairwise(edges)
            start = at + rows
        at += rows
    if at > start:
        yield start, at


def bytes_between(footer: Footer, start: int, stop: int) -> int:
    """Encoded picture bytes of a range of rows, a row group's spread evenly over its rows."""
    total, first = 0.0, 0
    for rows, num_bytes in zip(footer.group_rows, footer.group_bytes, strict=True):
        inside = min(stop, first + rows) - max(start, first)
        if inside > 0:
            total += num_bytes * inside / rows
        first += rows
    return round(total)


def _read_keys(uri: str, column: str) -> Iterator[str]:
    """The sample keys of a Parquet file in row order.

    Raises:
        ConfigError: one is null.
    """
    first = 0
    with ExitStack() as stack, parquet_errors(uri):
        file = open_parquet(uri, stack)
        for batch in _key_batches(file, column):
            for row, value in enumerate(batch.column(0).to_pylist(), start=first):
                if value is None:
                    raise ConfigError(
                        f"{uri}, row {row}: column {column!r} is null; every sample needs a key. "
                        "Set input.key_column to another column, or leave it out"
                    )
                yield str(value)
            first += batch.num_rows


def _key_batches(file: pq.ParquetFile, column: str) -> Iterator[pa.RecordBatch]:
    for number in range(file.metadata.num_row_groups):
        rows = batch_rows(file.metadata.row_group(number), [column], KEYS_AT_ONCE)
        yield from file.iter_batches(rows, row_groups=[number], columns=[column])


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")


def check_unique(keys: list[tuple[str, np.ndarray]], column: str) -> None:
    """Compare 8 bytes a key; look at the keys themselves only where those agree.

    Raises:
        ConfigError: two rows of the plan have the same key.
    """
    everything = np.sort(np.concatenate([hashes for _, hashes in keys]))
    for repeated in np.unique(everything[1:][everything[1:] == everything[:-1]]):
        seen: dict[str, str] = {}
        for uri, hashes in keys:
            if repeated not in hashes:
                continue
            for row, key in zip(range(len(hashes)), _read_keys(uri, column), strict=False):
                if _hash(key) != int(repeated):
                    continue
                place = f"{uri} row {row}"
                if key in seen:
                    raise ConfigError(
                        f"column {column!r} holds the key {key!r} twice: {seen[key]} and {place}. "
                        "Sample keys must be unique in a run: set input.key_column to another "
                        "column, or leave it out for <file name>:<row>"
                    )
                seen[key] = place
