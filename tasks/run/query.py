"""SQL over a run's committed parts, and the result as a file.

    query("runs/faces", "SELECT sample_key, psnr FROM latents ORDER BY psnr LIMIT 10")

Views: `latents`, `images`, `residuals` (those that the run has) and `commits`, one row per shard.
A run of edits also has `edits`: one row for each edited picture, with its metrics.
Only parts that a commit marker names are in them, while a run is at work and after a crash alike.

Codes: `latents.w_plus` is FLOAT[L*D], row by row of w+, so DuckDB's array functions work on it:

    SELECT sample_key, array_cosine_similarity(
        w_plus, (SELECT w_plus FROM latents WHERE sample_key = 'a.png')) AS cosine
    FROM latents ORDER BY cosine DESC NULLS LAST LIMIT 5

    SELECT * FROM nearest('a.png', 5)        -- ready made: sample_key, cosine, distance

Failed rows have NULL codes. The array functions pass NULL on; list_cosine_similarity refuses a
column that has one. Codes share a large mean, so cosines lie close to 1 and their order tells.
"""

import base64
import csv
import glob
import io
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from models.errors import ConfigError, LedgerError
from tasks.run.ledger import TABLE_KINDS, read_declared, read_markers, read_run
from tasks.run.marker import Marker
from tasks.storage.errors import storage_errors
from tasks.storage.files import file_info, is_local, join, local_path, write_bytes
from tasks.storage.part_files import PROTOCOL, PartFile, PartFiles

FORMATS = (".csv", ".json", ".parquet")
_NEAREST = """
CREATE MACRO nearest(key, count) AS TABLE
SELECT l.sample_key, array_cosine_similarity(l.w_plus, q.w_plus) AS cosine,
       array_distance(l.w_plus, q.w_plus) AS distance
FROM latents l, (SELECT w_plus FROM latents WHERE sample_key = key) q
WHERE l.status = 'ok' ORDER BY cosine DESC, l.sample_key LIMIT count
"""
_HAS_EDITS = "SELECT 1 FROM duckdb_views() WHERE view_name = 'edits'"


def query(run_uri: str, sql: str) -> pa.Table:
    """Run one SQL statement over a run.

    Raises:
        LedgerError: there is no run, nothing is committed yet, or a part cannot be read.
        ConfigError: the statement is wrong; the message has DuckDB's reason and the known views.
    """
    with _open(run_uri) as views:
        try:
            relation = views.connection.sql(sql)
            return pa.table({}) if relation is None else relation.to_arrow_table()
        except duckdb.Error as error:
            if views.files is not None and views.files.problems:
                raise LedgerError(
                    f"{views.files.problems[0]}. `refinery verify` lists all damage"
                ) from error
            if isinstance(error, duckdb.IOException):
                raise _unreadable(run_uri, error) from error
            raise ConfigError(
                f"query: {error}\nviews: {', '.join(views.names)}; `DESCRIBE latents` lists the "
                "columns of one"
            ) from error


@contextmanager
def open_views(run_uri: str) -> Iterator[tuple[duckdb.DuckDBPyConnection, list[str]]]:
    """A connection with the run's views, and their names; it is closed at the end.

    Raises:
        LedgerError: there is no run, nothing is committed yet, or a part cannot be opened.
    """
    with _open(run_uri) as views:
        yield views.connection, views.names


@dataclass(kw_only=True)
class _Views:
    """A DuckDB connection with a run's views.

    Attributes:
        names: "commits", and a view for each kind of part that the run has.
        files: the parts as DuckDB reads them, for a run that is not local.
    """

    connection: duckdb.DuckDBPyConnection
    names: list[str]
    files: PartFiles | None


@contextmanager
def _open(run_uri: str) -> Iterator[_Views]:
    record, markers = read_run(run_uri), read_markers(run_uri)
    stages = read_declared(run_uri).stages
    parts = [part for marker in markers.values() for part in marker.parts.values()]
    if not parts:
        raise LedgerError(
            f"{run_uri}: nothing to query, {len(markers)} of {record['num_shards']} shards are "
            "committed and none has a row; let it come to its first commit"
        )
    files = None
    # Without replacements: else a name in the SQL may mean a variable of this module.
    with duckdb.connect(config={"python_enable_replacements": False}) as connection:
        if not is_local(run_uri):
            files = PartFiles(run_uri, {part.path: part.bytes for part in parts})
            connection.register_filesystem(files)
        connection.from_arrow(commits_table(markers, stages)).create_view("commits")
        views = _Views(connection=connection, names=["commits"], files=files)
        for kind in TABLE_KINDS:
            paths = [m.parts[kind].path for m in markers.values() if kind in m.parts]
            if paths:
                try:
                    _create_view(connection, run_uri, kind, paths)
                except duckdb.Error as error:
                    raise _unreadable(run_uri, error) from error
                views.names.append(kind)
        if connection.execute(_HAS_EDITS).fetchall():
            views.names.append("edits")
        yield views


def _unreadable(run_uri: str, error: duckdb.Error) -> LedgerError:
    return LedgerError(
        f"{run_uri}: a committed part cannot be read ({error}); run `refinery verify`"
    )


def commits_table(markers: dict[int, Marker], stages: Sequence[str]) -> pa.Table:
    """One row per commit: the marker's fields, its seconds by stage, the bytes of its parts."""
    rows = [
        {
            "shard": marker.shard,
            "attempt": marker.attempt,
            "rows": marker.rows,
            "failed": marker.failed,
            "bytes": sum(part.bytes for part in marker.parts.values()),
            **{f"{stage}_s": float(marker.seconds.get(stage, 0.0)) for stage in stages},
            "wall_s": float(marker.wall_s),
            "device": marker.device,
            "code_version": marker.code_version,
            "notes": "; ".join(marker.notes),
            "started_at": marker.started_at,
            "finished_at": marker.finished_at,
            "run_id": marker.run_id,
        }
        for marker in markers.values()
    ]
    return pa.Table.from_pylist(rows)


def _create_view(
    connection: duckdb.DuckDBPyConnection, run_uri: str, kind: str, paths: list[str]
) -> None:
    names = [
        glob.escape(join(local_path(run_uri), path))  # DuckDB expands [..], * and ? in names
        if is_local(run_uri)
        else f"{PROTOCOL}://{path}"
        for path in paths
    ]
    files = connection.read_parquet(names)
    if kind != "latents":
        files.create_view(kind)
        return
    # Parquet's fixed-size list is a list to DuckDB, for which it has no array functions.
    uri = join(run_uri, paths[0])
    info = file_info(uri)
    if info is None:
        raise LedgerError(f"{uri} is missing although it is committed; run `refinery verify`")
    with storage_errors("read", uri, LedgerError):
        length = pq.read_schema(PartFile(uri, info[0])).field("w_plus").type.list_size
    files.create_view("latent_files")
    connection.execute(
        f"CREATE VIEW latents AS SELECT * REPLACE (w_plus::FLOAT[{length}] AS w_plus) "
        "FROM latent_files"
    )
    connection.execute(_NEAREST)
    names = connection.sql("SELECT * FROM latents LIMIT 0").columns
    if edits := _edits_view(names):
        connection.execute(edits)


def _edits_view(columns: Sequence[str]) -> str:
    """A row for each edited picture, out of the columns <metric>@<variant>; "" without any."""
    metrics: dict[str, list[str]] = {}
    for name in columns:
        metric, at, variant = name.rpartition("@")
        if at:
            metrics.setdefault(variant, []).append(metric)
    selects = [
        f"SELECT sample_key, {_text(variant)} AS variant, "
        + ", ".join(f"{_name(f'{metric}@{variant}')} AS {_name(metric)}" for metric in found)
        + " FROM latents WHERE status = 'ok'"
        for variant, found in metrics.items()
    ]
    return "CREATE VIEW edits AS " + " UNION ALL ".join(selects) if selects else ""


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


def _name(value: str) -> str:
    return '"' + value.replace('"', '""') + '"'


# ---------------------------------------------------------------------------- export


def export(table: pa.Table, path: str) -> None:
    """Write a table as .csv, .json (one array of objects) or .parquet, locally or to s3://.

    CSV holds lists and structs as JSON text. JSON and CSV hold pictures in base64, and what is not
    a finite number as null (empty in CSV).

    Raises:
        ConfigError: the ending is none of these.
        LedgerError: the file cannot be written.
    """
    suffix = PurePosixPath(path).suffix.lower()
    if suffix not in FORMATS:
        raise ConfigError(f"export to {path}: expected a name ending in {', '.join(FORMATS)}")
    if suffix == ".parquet":
        buffer = io.BytesIO()
        pq.write_table(_with_element_names(table), buffer, compression="zstd", use_dictionary=False)
        write_bytes(path, buffer.getvalue())
        return
    rows = ({name: _plain(value) for name, value in row.items()} for row in _rows(table))
    if suffix == ".json":
        body = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
        write_bytes(path, f"[{body}]\n".encode())
        return
    write_bytes(path, _to_csv(table.column_names, rows))


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
        pa.field(f.name, pa.list_(pa.field("element", f.type.value_type), f.type.list_size))
        if pa.types.is_fixed_size_list(f.type)
        else f
        for f in table.schema
    ]
    return table.cast(pa.schema(fields))
