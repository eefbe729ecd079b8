"""Runs as tables: the views that a statement sees, on a connection that sees nothing else.

    samples             a row for each sample: keys, status, metrics
    latents             the same with w_plus, FLOAT[L*D], row by row of w+
    images, residuals   a row for each inverted sample
    edits               a row for each edited picture, with its metrics
    shards              a row for each shard that is committed or given up
    runs                a row for each run

Every view has a column `run`, the run's name. Only what commit markers name is in them, and all of
a session is of one moment (`tasks.run.metadata`).

DuckDB may open the files of the runs and no other, its configuration is locked, and
`tasks.run.query` hands it one SELECT: the text may come from anybody.
"""

import glob
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import duckdb
import pyarrow as pa

from models.errors import LedgerError
from tasks.run.large import KINDS, LargeColumn, filled, find_large, holds_places, quoted, text
from tasks.run.metadata import PLACES, SKETCH, Segment, Snapshot
from tasks.run.passing import named_tables, used_columns
from tasks.run.tables import runs_table, shards_table
from tasks.storage.files import is_local, join, local_path
from tasks.storage.part_files import Fetched, PartFiles

FIRST = ("sample_key", "image_uri", "image_sha256", "status", "error_kind", "error", "method")
LAST = ("seed", "run_id", "shard", "run")
_HIDDEN = (*PLACES[1:], SKETCH, "run_number")
_THREADS = 16
"""Of a session over an object store, whose threads wait more than they compute."""
_NEAREST = """
CREATE MACRO IF NOT EXISTS nearest(key, count) AS TABLE
SELECT l.sample_key, array_cosine_similarity(l.w_plus, q.w_plus) AS cosine,
       array_distance(l.w_plus, q.w_plus) AS distance
FROM latents l, (SELECT w_plus FROM latents WHERE sample_key = key) q
WHERE l.status = 'ok' ORDER BY cosine DESC, l.sample_key LIMIT count
"""


class Session:
    """A connection over some runs.

    Args:
        snapshots: by the name that `run` shall have.
        tables: further tables by name.

    Attributes:
        names: of the views and tables.
    """

    def __init__(
        self, snapshots: Mapping[str, Snapshot], tables: Mapping[str, pa.Table] | None = None
    ) -> None:
        self._snapshots, self._run_names = list(snapshots.values()), list(snapshots)
        self._files = PartFiles()
        # Without replacements: else a name in the SQL may mean a variable of this module.
        self._connection = duckdb.connect(config={"python_enable_replacements": False})
        self._connection.register_filesystem(self._files)
        if not all(is_local(snapshot.uri) for snapshot in self._snapshots):
            self._connection.execute(f"SET threads = {_THREADS}")
        self._large = find_large(self._snapshots)
        self._from_parts: set[str] = set()
        self.names: list[str] = []
        self._urls: list[str] = []
        small = {
            "runs": runs_table(self._run_names, self._snapshots),
            "shards": shards_table(self._run_names, self._snapshots),
        }
        for name, table in {**small, **(tables or {})}.items():
            self._add_table(name, table)
        self._define()

    def close(self) -> None:
        self._connection.close()

    def ask(self, sql: str, parameters: Mapping[str, Any] | None = None) -> pa.Table:
        """The answer to one SELECT. Codes and pictures that are only passed on are read for the
        rows of the answer alone.

        Raises:
            duckdb.Error: as DuckDB says it.
            LedgerError: a part is missing or damaged.
        """
        self._choose(self._used(sql))
        table = self._execute(sql, parameters)
        if any(holds_places(field.type) for field in table.schema):
            self._choose({column.view for column in self._large})
            table = self._execute(sql, parameters)
        return filled(table, self._large, self._snapshots)

    def relation(self, sql: str) -> duckdb.DuckDBPyRelation:
        """A DuckDB relation over the views, to be refined; codes and pictures come from the parts.

        Raises:
            duckdb.Error: as DuckDB says it.
        """
        self._choose({column.view for column in self._large})
        return self._connection.sql(sql)

    def statements(self, sql: str) -> list[duckdb.Statement]:
        """What a text is made of.

        Raises:
            duckdb.Error: it is no SQL.
        """
        return self._connection.extract_statements(sql)

    def concerns_a_file(self, message: str) -> bool:
        """Whether DuckDB complains of a file of the runs: of one that is gone it says that it, or
        what would be a folder of that name, may not be opened."""
        return any(f'"{url}"' in message or f'"{url}/**' in message for url in self._urls)

    def columns(self) -> dict[str, list[str]]:
        """Names of columns by view."""
        empty = "SELECT * FROM {} LIMIT 0"
        return {n: self._connection.sql(empty.format(quoted(n))).columns for n in self.names}

    def _execute(self, sql: str, parameters: Mapping[str, Any] | None) -> pa.Table:
        try:
            found = self._connection.sql(sql, params=dict(parameters or {}))
            return pa.table({}) if found is None else found.to_arrow_table()
        except duckdb.Error as error:
            if not self._files.problems:
                raise
            raise LedgerError(
                f"{self._files.problems[0]}. `refinery verify` lists all damage"
            ) from error

    # ------------------------------------------------------------------------ definition

    def _add_table(self, name: str, table: pa.Table) -> None:
        self._connection.from_arrow(table).create_view(name)
        if not name.startswith("_"):
            self.names.append(name)

    def _define(self) -> None:
        rows = [self._rows_of(number) for number in range(len(self._snapshots))]
        self._parts: dict[str, list[tuple[str, int, int]]] = {
            kind: [
                (self._url(number, path, snapshot.markers[shard].parts[kind].bytes), number, shard)
                for number, snapshot in enumerate(self._snapshots)
                for shard, path in snapshot.parts(kind).items()
            ]
            for kind in KINDS
        }
        self._lock()
        union = " UNION ALL BY NAME ".join(select for found in rows for select in found)
        if not union:
            return
        self._connection.execute(f"CREATE VIEW _rows AS {union}")
        found = self._connection.sql("SELECT * FROM _rows LIMIT 0").columns
        metrics = [name for name in found if name not in (*FIRST, *LAST, *_HIDDEN)]
        self._columns = [*FIRST, *metrics, *LAST]
        listed = ", ".join(map(quoted, self._columns))
        self._connection.execute(f"CREATE VIEW samples AS SELECT {listed} FROM _rows")
        for kind in KINDS:
            if self._parts[kind]:
                self._connection.execute(f"CREATE VIEW {kind} AS {self._passing(kind)}")
        edits = self._edits(metrics)
        if edits:
            self._connection.execute(f"CREATE VIEW edits AS {edits}")
        self.names += ["samples", *(k for k in KINDS if self._parts[k]), *["edits"][: len(edits)]]

    def _lock(self) -> None:
        """Nothing but the files of the runs; from here on no setting changes."""
        for setting in (
            f"allowed_paths = [{', '.join(map(text, self._urls))}]",
            "enable_external_access = false",
            "lock_configuration = true",
        ):
            self._connection.execute(f"SET {setting}")

    def _rows_of(self, number: int) -> list[str]:
        """SQL of a run's rows without large columns; none where nothing is committed."""
        snapshot, selects = self._snapshots[number], []
        constants = f"{number} AS run_number, {text(self._run_names[number])} AS run"
        for segment in snapshot.segments:
            url = text(self._segment_url(number, segment))
            left_out = ", ".join(str(shard) for shard in segment.held.keys() - segment.shards)
            where = f" WHERE shard NOT IN ({left_out})" if left_out else ""
            selects.append(f"SELECT *, {constants} FROM read_parquet({url}){where}")
        if snapshot.fresh is not None:
            self._add_table(f"_fresh_{number}", snapshot.fresh)
            selects.append(f"SELECT *, {constants} FROM _fresh_{number}")
        return selects

    def _segment_url(self, number: int, segment: Segment) -> str:
        name = f"{number}/metadata/{segment.name}"
        return self._file(name, segment.uri, segment.bytes, segment.fetched)

    def _url(self, number: int, path: str, size: int) -> str:
        return self._file(f"{number}/{path}", join(self._snapshots[number].uri, path), size)

    def _file(self, name: str, uri: str, size: int, fetched: Fetched | None = None) -> str:
        """What DuckDB calls a file. It expands [..], * and ? in paths, so those go another way."""
        if is_local(uri) and not glob.has_magic(local_path(uri)):
            url = local_path(uri)
        else:
            url = self._files.add(name, uri, size, fetched)
        self._urls.append(url)
        return url

    def _edits(self, columns: Sequence[str]) -> str:
        """SQL of a row for each edited picture, out of the columns <metric>@<variant>."""
        metrics: dict[str, list[str]] = {}
        for name in columns:
            metric, at, variant = name.rpartition("@")
            if at:
                metrics.setdefault(variant, []).append(metric)
        selects = []
        for variant, found in metrics.items():
            having = [n for n, s in enumerate(self._snapshots) if _has_variant(s, variant)]
            listed = ", ".join(f"{quoted(f'{m}@{variant}')} AS {quoted(m)}" for m in found)
            selects.append(
                f"SELECT sample_key, {text(variant)} AS variant, {listed}, run FROM _rows "
                f"WHERE status = 'ok' AND run_number IN ({', '.join(map(str, having))})"
            )
        return " UNION ALL BY NAME ".join(selects)

    # ------------------------------------------------------------------------ large columns

    def _used(self, sql: str) -> set[str]:
        """The views whose large columns are computed with."""
        found = self._connection.execute("SELECT json_serialize_sql($1)", [sql]).fetchall()
        tree = json.loads(found[0][0])
        everything = {column.view for column in self._large}
        if tree["error"] or len(tree["statements"]) != 1:
            return everything
        (statement,) = tree["statements"]
        named = named_tables(statement)
        if named is not None and not named & everything:
            return set()
        used = used_columns(statement, {column.name for column in self._large})
        return everything if used is None else {c.view for c in self._large if c.name in used}

    def _choose(self, from_parts: set[str]) -> None:
        """Let views read their large columns from the parts, or pass their places on."""
        for view in from_parts ^ self._from_parts:
            select = self._computing(view) if view in from_parts else self._passing(view)
            self._connection.execute(f"CREATE OR REPLACE VIEW {view} AS {select}")
            if view == "latents" and view in from_parts:
                self._connection.execute(_NEAREST)
        self._from_parts = from_parts

    def _passing(self, view: str) -> str:
        listed = self._listed(view, [column.place for column in self._large_of(view)])
        where = "" if view == "latents" else " WHERE position IS NOT NULL"
        return f"SELECT {listed} FROM _rows{where}"

    def _computing(self, view: str) -> str:
        files, name = self._parts[view], f"_{view}_files"
        self._connection.from_arrow(
            pa.table(
                {
                    "file": [url for url, _, _ in files],
                    "run": [self._run_names[number] for _, number, _ in files],
                    "shard": pa.array([shard for _, _, shard in files], pa.int32()),
                }
            )
        ).create_view(name)
        urls = ", ".join(text(url) for url, _, _ in files)
        by_name = ", union_by_name = true" if len({n for _, n, _ in files}) > 1 else ""
        listed = self._listed(view, [column.value for column in self._large_of(view)])
        read = f"read_parquet([{urls}], filename = 'file'{by_name})"
        return f"SELECT {listed} FROM {read} JOIN {name} USING (file)"

    def _large_of(self, view: str) -> list[LargeColumn]:
        return [column for column in self._large if column.view == view]

    def _listed(self, view: str, large: list[str]) -> str:
        if view != "latents":
            return ", ".join(["sample_key", *large, "run"])
        names = list(map(quoted, self._columns))
        return ", ".join([*names[: len(FIRST)], *large, *names[len(FIRST) :]])


@contextmanager
def open_session(
    snapshots: Mapping[str, Snapshot], tables: Mapping[str, pa.Table] | None = None
) -> Iterator[Session]:
    """A session that is closed at the end.

    Raises:
        LedgerError: a part cannot be read.
    """
    try:
        session = Session(snapshots, tables)
    except duckdb.Error as error:
        raise LedgerError(
            f"a committed part cannot be read ({error}); run `refinery verify`"
        ) from error
    try:
        yield session
    finally:
        session.close()


def _has_variant(snapshot: Snapshot, variant: str) -> bool:
    """Whether a run holds pictures or scores of a variant."""
    declared = snapshot.declared
    scored = {name.rpartition("@")[2] for name in declared.metrics if "@" in name}
    return variant in declared.variants or variant in scored
