"""A table that gives each sample its own domain."""

import hashlib
import io
from dataclasses import dataclass
from pathlib import PurePosixPath

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from models.errors import ConfigError
from tasks.storage.files import read_bytes

COLUMNS = ("sample_key", "domain")


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """What the table says.

    Attributes:
        by_key: domain and strength by sample key.
        sha256: of the file.
    """

    by_key: dict[str, tuple[str, float]]
    sha256: str

    @property
    def domains(self) -> tuple[str, ...]:
        """Every domain that is named, sorted."""
        return tuple(sorted({name for name, _ in self.by_key.values()}))


def read_assignment(uri: str) -> Assignment:
    """Read a .csv or .parquet table with the columns sample_key, domain and, if wanted, strength
    (1 without it).

    Raises:
        ConfigError: it cannot be read, a column or a value is missing, or a key stands twice.
    """
    data = read_bytes(uri, ConfigError)
    try:
        if PurePosixPath(uri).suffix.lower() == ".csv":
            text = {name: pa.string() for name in COLUMNS}
            options = pacsv.ConvertOptions(column_types=text)
            table = pacsv.read_csv(io.BytesIO(data), convert_options=options)
        else:
            table = pq.read_table(io.BytesIO(data))
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(
            f"{uri}: not a table ({error}); expected .csv or .parquet with the columns "
            f"{', '.join(COLUMNS)} and, if wanted, strength"
        ) from error
    missing = [name for name in COLUMNS if name not in table.column_names]
    if missing:
        raise ConfigError(
            f"{uri} has no column {missing[0]}, only {', '.join(table.column_names)}; expected "
            f"{', '.join(COLUMNS)} and, if wanted, strength"
        )
    keys = [str(key) for key in table["sample_key"].to_pylist()]
    strengths = [1.0] * len(keys)
    if "strength" in table.column_names:
        strengths = table["strength"].to_pylist()
    by_key: dict[str, tuple[str, float]] = {}
    for row, (key, domain, strength) in enumerate(
        zip(keys, table["domain"].to_pylist(), strengths, strict=True)
    ):
        if not domain or not isinstance(strength, int | float):
            raise ConfigError(
                f"{uri}: row {row} ({key}): expected a domain and a number, found {domain!r} and "
                f"{strength!r}"
            )
        if key in by_key:
            raise ConfigError(f"{uri}: the sample {key} stands twice; a sample has one domain")
        by_key[key] = (str(domain), float(strength))
    return Assignment(by_key=by_key, sha256=hashlib.sha256(data).hexdigest())
