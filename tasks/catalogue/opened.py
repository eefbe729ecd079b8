"""A run, opened to be read: rows, codes and pictures in Python.

    from tasks import open_run

    run = open_run("runs/faces")                     # or s3://bucket/runs/faces
    run.code("a.png")                                # [L D] float32
    run.codes(run.keys()[:100])                      # [100 L D]
    run.query("SELECT sample_key, psnr FROM samples WHERE psnr > $least", least=20)   # Arrow

No generator is loaded. What is read is what stood in the run when it was opened, also while it is
at work; `refresh` looks again.
"""

import io
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from models.errors import ConfigError, LedgerError
from tasks.run.lookup import read_codes, read_column
from tasks.run.metadata import PLACES, Segment, Snapshot, read_snapshot
from tasks.run.query import ask, unknown_key
from tasks.run.views import Session
from tasks.storage.part_files import PartFile, part_errors

if TYPE_CHECKING:
    import duckdb
    import pandas as pd
    import polars as pl

    from models.stylegan2.generator import Generator
    from tasks.catalogue.torch_dataset import CodeDataset
    from tasks.run.stored import StoredBatch

_SAMPLES = "SELECT * FROM samples"


def open_run(uri: str) -> "OpenRun":
    """Open a run, finished or not.

    Args:
        uri: its directory, a local path or an s3:// prefix.

    Raises:
        LedgerError: there is no run at this place, or it is damaged.
    """
    return OpenRun(read_snapshot(uri))


class OpenRun:
    """A run as it stood when it was opened.

    Attributes:
        snapshot: what stood in it: run.json, markers, where its rows are.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot

    @property
    def uri(self) -> str:
        return self.snapshot.uri

    def __len__(self) -> int:
        """Rows, failed ones included."""
        return self.snapshot.num_rows

    def __repr__(self) -> str:
        state = "sealed" if self.snapshot.is_sealed else "open"
        kind, method = self.snapshot.declared.kind, self.snapshot.declared.method
        return f"<run {self.uri}: {kind}, {method}, {len(self)} rows, {state}>"

    def __getstate__(self) -> dict[str, Any]:
        """For other processes: without what is open in this one."""
        return {"snapshot": self.snapshot}

    def refresh(self) -> "OpenRun":
        """The run as it stands now."""
        return open_run(self.uri)

    # ------------------------------------------------------------------------ rows

    def query(self, sql: str = _SAMPLES, **parameters: Any) -> pa.Table:
        """The answer to one SELECT over the views of `tasks.run.views`.

        Args:
            parameters: values of $name in the statement.

        Raises:
            ConfigError: the statement is wrong.
            LedgerError: a part cannot be read.
        """
        return ask(self._session, sql, parameters)

    def relation(self, sql: str = _SAMPLES) -> "duckdb.DuckDBPyRelation":
        """A DuckDB relation, to be refined and joined further.

        Raises:
            duckdb.Error: the statement is wrong.
        """
        return self._session.relation(sql)

    def pandas(self, sql: str = _SAMPLES, **parameters: Any) -> "pd.DataFrame":
        """The answer as a pandas DataFrame; see `query`."""
        return self.query(sql, **parameters).to_pandas()

    def polars(self, sql: str = _SAMPLES, **parameters: Any) -> "pl.DataFrame":
        """The answer as a Polars DataFrame; see `query`."""
        import polars

        found = polars.from_arrow(self.query(sql, **parameters))
        assert isinstance(found, polars.DataFrame)
        return found

    def keys(self) -> list[str]:
        """Sample keys of the inverted rows, in order of shards."""
        return self._places["sample_key"].to_pylist()

    # ------------------------------------------------------------------------ codes and pictures

    def code(self, key: str) -> np.ndarray:
        """The code of one sample: [L D] float32.

        Raises:
            ConfigError: no such sample, or it was not inverted.
        """
        return self.codes([key])[0]

    def codes(self, keys: Sequence[str] | None = None) -> np.ndarray:
        """Codes in the order of the keys: [N L D] float32.

        Args:
            keys: all inverted samples without it, in the order of `keys`.

        Raises:
            ConfigError: no such sample, or it was not inverted.
            LedgerError: a part is missing or damaged, or nothing is committed.
        """
        return self.codes_at(self.rows_of(keys))

    def encoded(self, keys: Sequence[str] | None = None, name: str = "inversion") -> list[bytes]:
        """Pictures as they are stored (PNG, WebP or JPEG).

        Args:
            name: "input", "inversion" or a variant.

        Raises:
            ConfigError: no such sample or picture.
            LedgerError: a part is missing or damaged.
        """
        return self.encoded_at(self.rows_of(keys), name)

    def pictures(self, keys: Sequence[str] | None = None, name: str = "inversion") -> np.ndarray:
        """The same decoded: uint8 [N H W 3]."""
        return np.stack([decoded(data) for data in self.encoded(keys, name)])

    def inversions(self, generator: "Generator", *, batch: int = 64) -> Iterator["StoredBatch"]:
        """All doors of every inverted sample, to render or to edit them further.

        Raises:
            AssetError: the run was made with another generator.
            LedgerError: a part is missing or damaged.
        """
        from tasks.run.stored import read_inversions

        return read_inversions(self.uri, generator, batch=batch)

    def dataset(
        self, where: str = "status = 'ok'", pictures: Sequence[str] = (), codes: bool = True
    ) -> "CodeDataset":
        """A torch Dataset of inverted samples: {"sample_key", "w_plus" [L D], pictures, metrics}.

        Args:
            where: SQL over the columns of `samples`.
            pictures: columns of images/, each uint8 [3 H W].
        """
        from tasks.catalogue.torch_dataset import CodeDataset

        sql = f"SELECT * FROM samples WHERE status = 'ok' AND ({where})"
        return CodeDataset(self, self.query(sql), tuple(pictures), with_codes=codes)

    # ------------------------------------------------------------------------ rows by number

    def rows_of(self, keys: Sequence[str] | None) -> np.ndarray:
        """Numbers of inverted samples among `keys()`.

        Raises:
            ConfigError: no such sample, or it was not inverted.
        """
        known = self._places["sample_key"]
        if keys is None:
            return np.arange(len(known))
        if len(keys) == 1:  # a scan is quicker than an index
            found = np.array([pc.index(known, keys[0]).as_py()])
        else:
            indices = pc.call_function(
                "index_in", [pa.array(keys, pa.string())], pc.SetLookupOptions(known)
            )
            found = indices.fill_null(-1).to_numpy(zero_copy_only=False)
        if (found < 0).any():
            raise unknown_key(self._session, self.uri, keys[int(np.argmax(found < 0))])
        return found

    def codes_at(self, rows: np.ndarray) -> np.ndarray:
        """Codes of rows by their number; see `codes`."""
        if self.snapshot.codes is None:
            raise LedgerError(f"{self.uri}: no row is committed yet")
        return read_codes(self.snapshot, *(self._place(name)[rows] for name in PLACES))

    def encoded_at(self, rows: np.ndarray, name: str) -> list[bytes]:
        """Pictures of rows by their number; see `encoded`."""
        stored = self.snapshot.declared.pictures
        if name not in stored:
            raise ConfigError(f"{self.uri} has no pictures {name!r}, only {', '.join(stored)}")
        shards, positions = (self._place(place)[rows] for place in PLACES[:2])
        found = read_column(self.snapshot, "images", name, shards, positions)
        return [picture["bytes"] for picture in found.to_pylist()]

    def _place(self, name: str) -> np.ndarray:
        return self._places[name].to_numpy()

    @cached_property
    def _places(self) -> pa.Table:
        """Key and place of every inverted row."""
        wanted = ["sample_key", *PLACES]
        tables = [_columns(segment, wanted) for segment in self.snapshot.segments]
        if self.snapshot.fresh is not None:
            tables.append(self.snapshot.fresh.select(wanted))
        if not tables:
            raise LedgerError(f"{self.uri}: no row is committed yet")
        joined = pa.concat_tables([table.replace_schema_metadata() for table in tables])
        inverted = joined.filter(joined["position"].is_valid())
        code_at = inverted["code_at"].fill_null(-1)
        return inverted.set_column(inverted.column_names.index("code_at"), "code_at", code_at)

    @cached_property
    def _session(self) -> Session:
        name = self.uri.rstrip("/").rsplit("/", 1)[-1]
        return Session({name: self.snapshot})


def decoded(data: bytes) -> np.ndarray:
    """A picture as uint8 [H W 3]."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def _columns(segment: Segment, names: list[str]) -> pa.Table:
    with part_errors(segment.uri):
        file = PartFile(segment.uri, segment.bytes, fetched=segment.fetched)
        table = pq.ParquetFile(file).read(names)
    if not segment.is_whole:
        table = table.filter(pa.array(np.isin(table["shard"].to_numpy(), list(segment.shards))))
    return table
