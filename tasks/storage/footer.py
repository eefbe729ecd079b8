"""Parquet footers, looked at before pyarrow believes them.

pyarrow 26 ends the whole process (an exception that nothing catches) when a column chunk's level
histogram has another length than its schema says. So the footer is walked here first, as what it
is: a struct of Thrift's compact protocol.
"""

from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

MAX_FOOTER_BYTES = 16 * 2**20
"""Some hundred thousand column chunks. In memory a footer takes many times as much."""
TAIL_BYTES = 2**16
"""The end of a file, read as one: its footer, but for the largest."""
HISTOGRAMS = {4: {1: {3: {16: {2: {}, 3: {}}}}}}
"""row_groups, columns, meta_data, size_statistics: repetition and definition level histogram."""


def read_footer(source: IO[bytes]) -> pq.FileMetaData:
    """The footer of a file that anybody may have made.

    Args:
        source: seekable.

    Raises:
        pyarrow.ArrowInvalid: it is no footer, or one that is larger than any honest file's.
    """
    size = source.seek(0, 2)
    source.seek(max(size - TAIL_BYTES, 0))
    tail = source.read(TAIL_BYTES)
    length = int.from_bytes(tail[-8:-4], "little")
    if tail.endswith(b"PAR1") and length <= size - 12:
        if length > MAX_FOOTER_BYTES:
            raise pa.ArrowInvalid(
                f"a footer of {length} bytes; at most {MAX_FOOTER_BYTES} are read: write fewer and "
                "larger row groups"
            )
        if length + 8 > len(tail):
            source.seek(size - length - 8)
            tail = source.read(length + 8)
        tail = b"PAR1" + tail[-length - 8 :]
    try:
        found = pq.read_metadata(pa.BufferReader(tail))
        _ = found.schema.to_arrow_schema().names
    except UnicodeDecodeError as problem:
        raise pa.ArrowInvalid(f"damaged footer: a name is no text ({problem})") from problem
    _check_histograms(tail[4:-8], found)
    return found


def _check_histograms(footer: bytes, found: pq.FileMetaData) -> None:
    try:
        groups = _Compact(footer).value(STRUCT, HISTOGRAMS).get(4, [])
    except (ValueError, RecursionError) as problem:
        raise pa.ArrowInvalid(f"damaged footer: {problem}") from problem
    columns = [found.schema.column(number) for number in range(found.num_columns)]
    for number, group in enumerate(groups):
        chunks = group.get(1, [])
        if len(chunks) != len(columns):
            raise pa.ArrowInvalid(f"row group {number} has {len(chunks)} of {len(columns)} columns")
        for column, chunk in zip(columns, chunks, strict=True):
            lengths = chunk.get(3, {}).get(16, {})
            levels = {2: column.max_repetition_level, 3: column.max_definition_level}
            for field, most in levels.items():
                if lengths.get(field) not in (None, 0, most + 1):
                    raise pa.ArrowInvalid(
                        f"row group {number}, column {column.path}: a histogram of "
                        f"{lengths[field]} levels where there are {most + 1}"
                    )


TRUE, FALSE, BYTE, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = 1, 2, 3, 7, 8, 9, 10, 11, 12
INTEGERS = (4, 5, 6)
SIZES = {TRUE: 0, FALSE: 0, BYTE: 1, DOUBLE: 8}


class _Compact:
    """Values of Thrift's compact protocol, one after the other."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def value(self, kind: int, wanted: dict[int, Any]) -> Any:
        """The wanted fields of a struct by number, the length of a list of which none are wanted,
        else None; what is not wanted is passed by.

        Raises:
            ValueError: the data are something else.
        """
        if kind == STRUCT:
            return self._struct(wanted)
        if kind in (LIST, SET):
            return self._list(wanted)
        if kind == MAP:
            count = self._number()
            kinds = self._byte() if count else 0
            for _ in range(count):
                self._element(kinds >> 4)
                self._element(kinds & 15)
        elif kind in INTEGERS:
            self._number()
        elif kind in SIZES:
            self._pass(SIZES[kind])
        elif kind == BINARY:
            self._pass(self._number())
        else:
            raise ValueError(f"a value of kind {kind}")
        return None

    def _struct(self, wanted: dict[int, Any]) -> dict[int, Any]:
        found, field = {}, 0
        while head := self._byte():
            step = head >> 4
            zigzag = 0 if step else self._number()
            field = field + step if step else zigzag >> 1 ^ -(zigzag & 1)
            value = self.value(head & 15, wanted.get(field, {}))
            if field in wanted and value is not None:  # else it is of another kind, and passed by
                found[field] = value
        return found

    def _list(self, wanted: dict[int, Any]) -> Any:
        head = self._byte()
        count = head >> 4 if head >> 4 < 15 else self._number()
        if wanted and head & 15 == STRUCT:
            return [self._struct(wanted) for _ in range(count)]
        for _ in range(count):
            self._element(head & 15)
        return count

    def _element(self, kind: int) -> None:
        """Of a list or a map that is passed by; a truth value is a byte there."""
        self.value(BYTE if kind in (TRUE, FALSE) else kind, {})

    def _byte(self) -> int:
        self._pass(1)
        return self.data[self.at - 1]

    def _number(self) -> int:
        found = shift = 0
        while (byte := self._byte()) & 128:
            found |= (byte & 127) << shift
            shift += 7
            if shift > 63:
                raise ValueError("a number of more than 64 bits")
        return found | byte << shift

    def _pass(self, count: int) -> None:
        self.at += count
        if self.at > len(self.data):
            raise ValueError("it ends too early")
