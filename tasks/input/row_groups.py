"""What a Parquet footer says of its column chunks.

pyarrow's own accessor of a column chunk ends the process (std::terminate) on some damaged footers,
since its exceptions do not reach Python. So the footer, which pyarrow has parsed and writes out
once more, is read here: Thrift's compact protocol, of which the fields below are kept and the
others passed over (parquet-format, parquet.thrift).
"""

import io
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

MAGIC_BYTES, TAIL_BYTES = 4, 8
FIXED = {7: 8, 13: 16}
"""Bytes of a double and of a UUID."""
KEPT = {4: {1: {3: {3: True, 5: True, 6: True, 7: True}}, 3: True}}
"""Field ids: row_groups of columns of meta_data of (path_in_schema, num_values,
total_uncompressed_size, total_compressed_size), and num_rows of a row group."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A column of a row group.

    Attributes:
        column: the first part of its path.
        packed, unpacked: bytes in the file, and when decompressed.
    """

    column: str
    num_values: int
    unpacked: int
    packed: int


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Rows that are stored together."""

    num_rows: int
    chunks: list[Chunk]

    def of(self, *columns: str) -> list[Chunk]:
        """The chunks of some columns; a nested column has several."""
        return [chunk for chunk in self.chunks if chunk.column in columns]


def row_groups(metadata: pq.FileMetaData) -> list[RowGroup]:
    """The row groups in order.

    Raises:
        ValueError: a field is missing or negative, or a name is not UTF-8 (UnicodeDecodeError).
    """
    sink = io.BytesIO()
    metadata.write_metadata_file(sink)
    footer = _Compact(sink.getvalue()[MAGIC_BYTES:-TAIL_BYTES]).struct(KEPT)
    try:
        return [
            RowGroup(_count(group[3]), [_chunk(column[3]) for column in group[1]])
            for group in footer.get(4, [])
        ]
    except KeyError as problem:
        raise ValueError(f"a row group or column lacks its field {problem}") from problem


def _chunk(fields: dict[int, Any]) -> Chunk:
    name = fields[3][0].decode() if fields[3] else ""
    return Chunk(name, *(_count(fields[number]) for number in (5, 6, 7)))


def _count(value: int) -> int:
    if value < 0:
        raise ValueError(f"a count or size is {value}")
    return value


class _Compact:
    """A reader of Thrift's compact protocol. Its input is well formed: pyarrow wrote it."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def struct(self, kept: Any) -> dict[int, Any]:
        """Values by field id, of the ids in `kept` alone."""
        found, field = {}, 0
        while header := self._byte():
            field = field + (header >> 4) if header >> 4 else self._signed()
            inner = kept.get(field) if isinstance(kept, dict) else None
            value = self._value(header & 15, inner, is_field=True)
            if inner:
                found[field] = value
        return found

    def _value(self, kind: int, kept: Any, *, is_field: bool = False) -> Any:
        if kind in (1, 2):
            # A field's header is its value; in a list each has a byte.
            return kind == 1 if is_field else self._byte() == 1
        if kind == 3:
            return self._byte()
        if kind in (4, 5, 6):
            return self._signed()
        if kind in FIXED:
            return self._take(FIXED[kind])
        if kind == 8:
            return self._take(self._varint())
        if kind in (9, 10):
            return self._list(kept)
        if kind == 12:
            return self.struct(kept)
        raise ValueError(f"Thrift type {kind} in a Parquet footer")

    def _list(self, kept: Any) -> list[Any]:
        header = self._byte()
        count = header >> 4 if header >> 4 < 15 else self._varint()
        found = []
        for _ in range(count):
            value = self._value(header & 15, kept)
            if kept:
                found.append(value)
        return found

    def _byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1]

    def _take(self, count: int) -> bytes:
        self._at += count
        return self._data[self._at - count : self._at]

    def _varint(self) -> int:
        value = shift = 0
        while (byte := self._byte()) >= 128:
            value |= (byte & 127) << shift
            shift += 7
        return value | byte << shift

    def _signed(self) -> int:
        """Zigzag."""
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
