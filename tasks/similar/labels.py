"""A table of the user's about the samples of a run."""

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

from models.errors import ConfigError
from tasks.storage.files import read_bytes


def read_table(path: str) -> pa.Table:
    """A .csv file with a header, or a .parquet file.

    Raises:
        ConfigError: it cannot be read, or has another ending.
    """
    readers = {".csv": csv.read_csv, ".parquet": pq.read_table}
    read = next((each for ending, each in readers.items() if path.endswith(ending)), None)
    if read is None:
        raise ConfigError(f"table {path}: expected a name ending in {' or '.join(readers)}")
    try:
        return read(pa.BufferReader(read_bytes(path, ConfigError)))
    except pa.ArrowException as error:
        raise ConfigError(f"table {path}: cannot be read: {error}") from error
