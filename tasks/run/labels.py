"""What is known of the samples of a run: columns of Parquet or CSV files, joined by sample key."""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

from models.errors import AssetError, ConfigError, ShardError
from tasks.input.parquet import PARQUET_SUFFIXES, open_parquet
from tasks.storage.files import join, list_files, read_bytes

LABEL_SUFFIXES = (*PARQUET_SUFFIXES, ".csv")

Labels = dict[str, dict[str, float]]
"""Values by sample key and column; NaN where a file has none."""


def read_labels(places: Sequence[str], columns: Sequence[str], key_column: str | None) -> Labels:
    """Columns of numbers by sample key.

    Args:
        places: files, or folders of files, local or remote; for example the run's own input.
        key_column: holds the sample keys; None where keys are "<file>:<row>", as a run over Parquet
            files without `input.key_column` gives them (<file> is the name below the folder).

    Raises:
        AssetError: a file cannot be read, or there is none.
        ConfigError: a column is missing or holds no numbers, or a key is there twice.
    """
    found: Labels = {}
    wanted = [*dict.fromkeys(columns), *([key_column] if key_column else [])]
    for name, uri in _files(places):
        table = _read_columns(uri, wanted)
        keys = (
            [str(key) for key in table[key_column].to_pylist()]
            if key_column
            else [f"{name}:{row}" for row in range(table.num_rows)]
        )
        values = {column: _numbers(table[column], column, uri) for column in columns}
        for row, key in enumerate(keys):
            if key in found:
                raise ConfigError(
                    f"labels {uri}: the key {key!r} is there twice; sample keys are unique: name "
                    "each file once, or another key_column"
                )
            found[key] = {column: values[column][row] for column in columns}
    return found


def joined(labels: Labels, sample_keys: Sequence[str], where: str) -> list[dict[str, float] | None]:
    """The labels of each sample, None where there are none.

    Raises:
        ConfigError: no sample has labels; the message shows a key of both.
    """
    found = [labels.get(key) for key in sample_keys]
    if sample_keys and all(values is None for values in found):
        raise ConfigError(
            f"labels: none of the {len(labels)} keys is a sample of {where}: the labels have keys "
            f"like {next(iter(labels), None)!r}, the run has keys like {sample_keys[0]!r}; set "
            "key_column, or give the file or folder that the run was made from"
        )
    return found


def _files(places: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(name in sample keys, uri) of every file."""
    for place in places:
        if place.endswith(LABEL_SUFFIXES):
            yield place.rsplit("/", 1)[-1], place
            continue
        names = [name for name, _, _ in list_files(place) if name.endswith(LABEL_SUFFIXES)]
        if not names:
            raise AssetError(
                f"labels {place}: no such folder, or no file in it that ends in "
                f"{', '.join(LABEL_SUFFIXES)}"
            )
        yield from ((name, join(place, name)) for name in names)


def _read_columns(uri: str, columns: list[str]) -> pa.Table:
    if uri.endswith(".csv"):
        try:
            table = csv.read_csv(pa.BufferReader(read_bytes(uri, AssetError)))
        except pa.ArrowException as error:
            raise AssetError(f"labels {uri}: not a CSV file with a header ({error})") from error
        _check_columns(table.column_names, columns, uri)
        return table.select(columns)
    try:
        with ExitStack() as stack:
            file: pq.ParquetFile = open_parquet(uri, stack)
            _check_columns(file.schema_arrow.names, columns, uri)
            return file.read(columns=columns)
    except (ShardError, pa.ArrowException) as error:
        raise AssetError(f"labels {uri}: cannot be read: {error}") from error


def _check_columns(there: list[str], wanted: list[str], uri: str) -> None:
    for column in wanted:
        if column not in there:
            raise ConfigError(f"labels {uri}: no column {column!r}; it has {', '.join(there)}")


def _numbers(column: pa.ChunkedArray, name: str, uri: str) -> list[float]:
    kind = column.type
    if not any(is_kind(kind) for is_kind in (pa.types.is_integer, pa.types.is_floating)) and not (
        pa.types.is_boolean(kind) or pa.types.is_null(kind)
    ):
        raise ConfigError(f"labels {uri}: column {name!r} is {kind}; expected numbers")
    return [math.nan if value is None else float(value) for value in column.to_pylist()]
