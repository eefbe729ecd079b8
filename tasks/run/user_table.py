"""A table of the user's, as a statement sees it beside the views."""

import io
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv, json

from models.errors import AssetError, ConfigError
from tasks.storage.files import read_bytes

RESERVED = ("samples", "latents", "images", "residuals", "edits", "shards", "runs")
_READERS = {
    ".csv": csv.read_csv,
    ".json": json.read_json,
    ".jsonl": json.read_json,
    ".parquet": pq.read_table,
    ".arrow": lambda file: pa.ipc.open_file(file).read_all(),
}


def read_table(uri: str, name: str) -> pa.Table:
    """Read a file: .csv with a header, .json with an object a line, .parquet or .arrow.

    Args:
        name: what it shall be called.

    Raises:
        ConfigError: another ending, or a name that is a view's.
        AssetError: there is no such file, or it is none of its kind.
    """
    suffix = PurePosixPath(uri).suffix.lower()
    if suffix not in _READERS:
        raise ConfigError(f"--table {name}={uri}: expected a file ending in {', '.join(_READERS)}")
    if name.lower() in RESERVED:
        raise ConfigError(f"--table {name}={uri}: {name} is a view of the run; choose another name")
    data = io.BytesIO(read_bytes(uri, AssetError))
    try:
        return _READERS[suffix](data)
    except pa.ArrowException as error:
        raise AssetError(f"--table {name}={uri}: not a {suffix} file ({error})") from error
