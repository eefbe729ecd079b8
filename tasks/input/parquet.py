"""Parquet files with a column of encoded pictures, binary or {bytes, path}.

Only the row groups of the range and the columns in use are read.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from models.errors import RefineryError, SampleError, ShardError
from tasks.input.limits import AHEAD_BYTES, FREE_BYTES, FREE_ROWS, MAX_VALUES, too_many_bytes
from tasks.input.sample import CorruptFileError, RawSample, failed, parse_landmarks
from tasks.job import InputConfig, ShardSpec
from tasks.storage.errors import storage_errors
from tasks.storage.files import is_local, local_path, open_filesystem
from tasks.storage.footer import read_footer

PARQUET_SUFFIXES = (".parquet", ".pq")
BATCH_ROWS = 64
"""Rows turned into Python objects at once."""


def read_parquet(spec: ShardSpec, config: InputConfig) -> Iterator[RawSample]:
    """The rows of the shard's range in order. A null picture comes out as a failed sample.

    Raises:
        ShardError: the file is missing, corrupt, expands too much or is shorter than planned; a
            column is missing or of the wrong type; `config.key_column` holds a null or the same
            value twice.
    """
    name = spec.members[0] if spec.members else spec.uri.rsplit("/", 1)[-1]
    with ExitStack() as stack:
        file = open_parquet(spec.uri, stack)
        columns = check_columns(file.schema_arrow, config, spec.uri, ShardError)
        check_groups(file, columns, config, spec.uri)
        stop = spec.row_stop or file.metadata.num_rows
        if stop > file.metadata.num_rows:
            raise ShardError(
                f"{spec.uri} has {file.metadata.num_rows} rows; the plan says {stop}. The file was "
                "changed after planning: start a new run"
            )
        seen: set[str] = set()
        for row, values in _rows(file, columns, spec.row_start, stop, spec.uri):
            key = f"{name}:{row}"
            if config.key_column is not None:
                key = _unique_key(values[config.key_column], row, seen, spec.uri, config)
            yield _sample(key, f"{spec.uri}#row={row}", values, config)


def parquet_keys(spec: ShardSpec, config: InputConfig) -> list[str]:
    """The sample keys of a shard; pictures are not read.

    Raises:
        ShardError: the file cannot be read.
    """
    name = spec.members[0] if spec.members else spec.uri.rsplit("/", 1)[-1]
    stop = spec.row_stop
    if config.key_column is None and stop:
        return [f"{name}:{row}" for row in range(spec.row_start, stop)]
    with ExitStack() as stack, parquet_errors(spec.uri):
        file = open_parquet(spec.uri, stack)
        stop = stop or file.metadata.num_rows
        if config.key_column is None:
            return [f"{name}:{row}" for row in range(spec.row_start, stop)]
        column = file.read([config.key_column]).column(0)[spec.row_start : stop]
        return [str(value) for value in column.to_pylist()]


def open_parquet(uri: str, stack: ExitStack) -> pq.ParquetFile:
    """The file, its footer read; closed with `stack`.

    Raises:
        ShardError: missing or corrupt.
    """
    with parquet_errors(uri):
        if is_local(uri):
            with open(local_path(uri), "rb") as file:
                footer = read_footer(file)
            # Mapped: row groups outside of the range cost nothing.
            mapped = pq.ParquetFile(local_path(uri), memory_map=True, metadata=footer)
            return stack.enter_context(mapped)
        fs, path = open_filesystem(uri)
        # No read-ahead cache: pyarrow asks for whole column chunks (`pre_buffer`).
        source = stack.enter_context(fs.open(path, "rb", cache_type="none"))
        footer = read_footer(cast(IO[bytes], source))
        return stack.enter_context(pq.ParquetFile(source, pre_buffer=True, metadata=footer))


@contextmanager
def parquet_errors(uri: str) -> Iterator[None]:
    """Raise pyarrow's and storage's exceptions as ShardError."""
    try:
        with storage_errors("read Parquet file", uri):
            yield
    except (pa.ArrowException, UnicodeDecodeError) as problem:
        raise _corrupt(uri, problem) from problem
    except ShardError as problem:
        # pyarrow reports damaged pages as OSError without an errno.
        cause = problem.__cause__
        if type(cause) is OSError and cause.errno is None:
            raise _corrupt(uri, cause) from problem
        raise


def _corrupt(uri: str, problem: object) -> CorruptFileError:
    return CorruptFileError(
        f"Parquet file {uri} is corrupt ({str(problem).strip()}). "
        "Write or copy the file again, then run again"
    )


def check_columns(
    schema: pa.Schema, config: InputConfig, uri: str, error: type[RefineryError]
) -> list[str]:
    """The columns to read.

    Raises:
        error: one is missing or of the wrong type; the message names those there are.
    """
    wanted = {"image_column": config.image_column}
    if config.key_column is not None:
        wanted["key_column"] = config.key_column
    if config.fit == "align" and (
        config.detector is None or config.landmarks_column in schema.names
    ):
        wanted["landmarks_column"] = config.landmarks_column
    for setting, column in wanted.items():
        if column not in schema.names:
            raise error(
                f"{uri} has no column {column!r}; it has {', '.join(schema.names)}. "
                f"Set input.{setting} to one of them"
            )
    image = schema.field(config.image_column).type
    if not (_is_binary(image) or _is_image_struct(image)):
        raise error(
            f"{uri}: column {config.image_column!r} is {image}; expected binary, or a struct with "
            "a binary field `bytes`. Set input.image_column to the column with encoded pictures"
        )
    if config.key_column is not None:
        kind = schema.field(config.key_column).type
        if not (pa.types.is_integer(kind) or _is_text(kind)):
            raise error(
                f"{uri}: column {config.key_column!r} is {kind}; sample keys must be text or whole "
                "numbers. Set input.key_column to another column, or leave it out"
            )
    return list(wanted.values())


def check_groups(file: pq.ParquetFile, columns: list[str], config: InputConfig, uri: str) -> None:
    """Refuse a file whose footer tells of far more than its bytes can hold.

    Raises:
        CorruptFileError: a row group expands beyond `input.max_expansion`, or has far too many rows
            or values.
    """
    for number in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(number)
        for chunk in _chunks_of(group, columns):
            packed, unpacked = chunk.total_compressed_size, chunk.total_uncompressed_size
            is_picture = chunk.path_in_schema.split(".")[0] == config.image_column
            if (
                unpacked > FREE_BYTES + config.max_expansion * packed
                or chunk.num_values > MAX_VALUES * group.num_rows
                or (is_picture and group.num_rows > FREE_ROWS + packed)
            ):
                raise _corrupt(
                    uri,
                    f"row group {number}, column {chunk.path_in_schema}: {packed} bytes are said "
                    f"to hold {unpacked}, {chunk.num_values} values in {group.num_rows} rows; at "
                    f"most {config.max_expansion:g} times as many bytes (input.max_expansion), "
                    f"{MAX_VALUES} values a row, and a picture a byte",
                )


def _chunks_of(group: pq.RowGroupMetaData, columns: list[str]) -> Iterator[pq.ColumnChunkMetaData]:
    chunks = (group.column(number) for number in range(group.num_columns))
    return (chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns)


def batch_rows(group: pq.RowGroupMetaData, columns: list[str], most: int = BATCH_ROWS) -> int:
    """Rows to turn into Python objects at once: a value that is stored once may stand in every row,
    so each may be as large as the row group."""
    unpacked = sum(chunk.total_uncompressed_size for chunk in _chunks_of(group, columns))
    return max(1, min(most, AHEAD_BYTES // max(unpacked, 1)))


def _is_binary(kind: pa.DataType) -> bool:
    return (
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_binary_view(kind)
        or pa.types.is_fixed_size_binary(kind)
    )


def _is_image_struct(kind: pa.DataType) -> bool:
    return (
        pa.types.is_struct(kind)
        and kind.get_field_index("bytes") >= 0
        and _is_binary(kind.field("bytes").type)
    )


def _is_text(kind: pa.DataType) -> bool:
    return (
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def _rows(
    file: pq.ParquetFile, columns: list[str], start: int, stop: int, uri: str
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number, values) of the half-open range. One row group is in memory at a time."""
    first = 0
    for group in range(file.metadata.num_row_groups):
        after = first + file.metadata.row_group(group).num_rows
        if first < stop and after > start:
            row = first
            for batch in _batches(file, group, columns, uri):
                skip = max(0, start - row)
                kept = batch.slice(skip, max(0, min(batch.num_rows, stop - row) - skip))
                with parquet_errors(uri):
                    objects = kept.to_pylist()
                for offset, values in enumerate(objects):
                    yield row + skip + offset, values
                row += batch.num_rows
                if row >= stop:
                    break
        first = after


def _batches(
    file: pq.ParquetFile, group: int, columns: list[str], uri: str
) -> Iterator[pa.RecordBatch]:
    with parquet_errors(uri):
        rows = batch_rows(file.metadata.row_group(group), columns)
        yield from file.iter_batches(rows, row_groups=[group], columns=columns)


def _unique_key(value: Any, row: int, seen: set[str], uri: str, config: InputConfig) -> str:
    key = str(value)
    if value is None or key in seen:
        what = "is null" if value is None else f"{key!r} is there twice"
        raise ShardError(
            f"{uri}, row {row}: column {config.key_column!r} {what}; sample keys must be unique. "
            "Set input.key_column to another column, or leave it out for <file name>:<row>"
        )
    seen.add(key)
    return key


def _sample(key: str, uri: str, values: dict[str, Any], config: InputConfig) -> RawSample:
    data = values[config.image_column]
    if isinstance(data, dict):
        if data["bytes"] is None and data.get("path"):
            return failed(key, uri, "read", f"no bytes in the row, only the path {data['path']!r}")
        data = data["bytes"]
    if data is None:
        return failed(key, uri, "read", "the picture is null")
    problem = too_many_bytes("the picture", len(data), config.max_bytes)
    if problem is not None:
        return RawSample(key, uri, None, None, problem)
    try:
        return RawSample(key, uri, data, parse_landmarks(values.get(config.landmarks_column)))
    except SampleError as problem:
        return RawSample(key, uri, None, None, problem)
