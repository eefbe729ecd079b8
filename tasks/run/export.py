"""The answer to a question as files: tables, a data set, a tensor.

.csv .json .parquet .arrow     the rows
a folder                       a data set that Hugging Face `datasets` opens, pictures as images
.npy .safetensors              codes [N L D], their keys beside them in <name>.keys.csv
"""

import base64
import csv
import io
import json
import math
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from models.errors import ConfigError
from tasks.run.parts import PICTURE
from tasks.storage.files import is_local, join, local_path, open_write, write_bytes

FORMATS = (".csv", ".json", ".parquet", ".arrow")
TENSOR_FORMATS = (".npy", ".safetensors")
DATASET_ROWS = 20_000


def check_target(path: str, formats: tuple[str, ...] = FORMATS) -> None:
    """Refuse a file that could not be written, before any work.

    Raises:
        ConfigError: another ending, or a folder that is not there.
    """
    if formats and PurePosixPath(path).suffix.lower() not in formats:
        raise ConfigError(f"cannot write {path}: expected a name ending in {', '.join(formats)}")
    if is_local(path):
        folder = Path(local_path(path)).parent
        if not folder.is_dir():
            raise ConfigError(f"cannot write {path}: there is no folder {folder}; make it first")


def export(table: pa.Table, path: str) -> None:
    """Write a table as .csv, .json (one array of objects), .parquet or .arrow (an IPC file),
    locally or to s3://.

    CSV holds lists and structs as JSON text. JSON and CSV hold pictures in base64, and what is not
    a finite number as null (empty in CSV).

    Raises:
        ConfigError: the ending is none of these, or the folder is not there.
        LedgerError: the file cannot be written.
    """
    check_target(path)
    suffix = PurePosixPath(path).suffix.lower()
    if suffix == ".parquet":
        with open_write(path) as file:
            _write_parquet(table, file)
        return
    if suffix == ".arrow":
        with open_write(path) as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
        return
    rows = ({name: _plain(value) for name, value in row.items()} for row in _rows(table))
    if suffix == ".json":
        body = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        write_bytes(path, f"[{body}]\n".encode())
        return
    write_bytes(path, _to_csv(table.column_names, rows))


def export_dataset(table: pa.Table, folder: str) -> list[str]:
    """Write a folder that `datasets.load_dataset(folder)` opens: Parquet files whose schema says
    which columns are pictures.

    Returns:
        The URIs of the files.

    Raises:
        ConfigError: no row, a data set is there already, or a column of a type it cannot hold.
        LedgerError: a file cannot be written.
    """
    if not table.num_rows:
        raise ConfigError(f"no row to write to {folder}: a data set has at least one")
    if is_local(folder) and Path(local_path(folder), "data").exists():
        raise ConfigError(f"{folder} holds a data set already; choose another folder")
    table = _with_element_names(table).replace_schema_metadata(features(table.schema))
    count = -(-table.num_rows // DATASET_ROWS)
    uris = []
    for number in range(count):
        uri = join(folder, "data", f"train-{number:05d}-of-{count:05d}.parquet")
        with open_write(uri) as file:
            _write_parquet(table.slice(number * DATASET_ROWS, DATASET_ROWS), file)
        uris.append(uri)
    return uris


def with_pictures(rows: pa.Table, pictures: pa.Table) -> pa.Table:
    """Rows of latents/ with those of images/ beside them; a failed sample's are null."""
    row_of = {key: row for row, key in enumerate(pictures["sample_key"].to_pylist())}
    at = pa.array([row_of.get(key) for key in rows["sample_key"].to_pylist()], pa.int64())
    for name in pictures.column_names[1:]:
        column = pictures[name].combine_chunks().take(at)
        rows = rows.append_column(pictures.schema.field(name), column)
    return rows


def features(schema: pa.Schema) -> dict[str, str]:
    """The metadata by which `datasets` knows what is a picture.

    Raises:
        ConfigError: a data set cannot hold a column.
    """
    described = {field.name: _feature(field) for field in schema}
    return {"huggingface": json.dumps({"info": {"features": described}})}


def _feature(field: pa.Field) -> dict[str, Any]:
    kind = field.type
    if kind == PICTURE:
        return {"_type": "Image"}
    if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        length = kind.list_size if pa.types.is_fixed_size_list(kind) else -1
        return {"_type": "List", "feature": _feature(kind.value_field), "length": length}
    names = {"float": "float32", "double": "float64", "halffloat": "float16"}
    name = names.get(str(kind), str(kind))
    if pa.types.is_struct(kind) or pa.types.is_map(kind) or pa.types.is_decimal(kind):
        raise ConfigError(f"column {field.name!r} is {kind}, which a data set cannot hold; cast it")
    return {"_type": "Value", "dtype": name}


def export_tensor(table: pa.Table, path: str) -> str:
    """Write vectors as an array, [N L D] float32 for codes, and the other columns beside it, row
    by row, as <name>.keys.csv. `.npy` takes one column of vectors, `.safetensors` each by its name.

    Returns:
        The URI of the keys.

    Raises:
        ConfigError: another ending, no column of vectors or too many, or a row without one.
        LedgerError: a file cannot be written.
    """
    check_target(path, TENSOR_FORMATS)
    vectors = [f.name for f in table.schema if pa.types.is_fixed_size_list(f.type)]
    is_numpy = path.lower().endswith(".npy")
    if not vectors or (is_numpy and len(vectors) > 1):
        found = ", ".join(vectors) or f"none among {', '.join(table.column_names)}"
        wanted = "one column of vectors" if is_numpy else "a column of vectors"
        raise ConfigError(f"{path}: expected {wanted}, e.g. w_plus; found {found}")
    arrays = {name: _array(table, name) for name in vectors}
    with open_write(path) as file:
        if is_numpy:
            np.save(file, arrays[vectors[0]])
        else:
            from safetensors.numpy import save

            file.write(save(arrays))
    keys = path[: path.rindex(".")] + ".keys.csv"
    export(table.drop_columns(vectors), keys)
    return keys


def _array(table: pa.Table, name: str) -> np.ndarray:
    column, field = table[name], table.schema.field(name)
    if column.null_count:
        row = column.is_null().index(True).as_py()
        raise ConfigError(f"row {row} has no {name}; leave such rows out: WHERE status = 'ok'")
    shape = json.loads((field.metadata or {}).get(b"shape", f"[{field.type.list_size}]"))
    values = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    return np.concatenate([*values, np.empty(0, np.float32)]).reshape(-1, *shape)


def _write_parquet(table: pa.Table, file: Any) -> None:
    named = _with_element_names(table)
    pq.write_table(named, file, compression="zstd", use_dictionary=False)


def _to_csv(names: list[str], rows: Iterator[dict[str, Any]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    for row in rows:
        writer.writerow(
            json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value
            for value in row.values()
        )
    return text.getvalue().encode()


def _rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    for batch in table.to_batches(max_chunksize=256):
        yield from batch.to_pylist()


def _plain(value: Any) -> Any:
    """A value that JSON can hold."""
    if isinstance(value, dict):
        return {name: _plain(child) for name, child in value.items()}
    if isinstance(value, list):
        return [_plain(child) for child in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int | bool):
        return value
    return str(value)  # dates, decimals


def _with_element_names(table: pa.Table) -> pa.Table:
    """DuckDB leaves the elements of lists nameless, which other readers of Parquet stumble over."""
    fields = [
        f.with_type(pa.list_(pa.field("element", f.type.value_type), f.type.list_size))
        if pa.types.is_fixed_size_list(f.type)
        else f
        for f in table.schema
    ]
    return table.cast(pa.schema(fields, table.schema.metadata))
