"""Questions to runs: one SQL SELECT, the answer as a table.

    query("runs/faces", "SELECT sample_key, psnr FROM samples ORDER BY psnr LIMIT 10")
    query("runs", "SELECT run, avg(psnr) FROM samples GROUP BY run")      -- all runs below a folder

The views are those of `tasks.run.views`; docs/query.md has them with examples.
"""

import difflib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import duckdb
import pyarrow as pa

from models.errors import ConfigError, LedgerError
from tasks.run.find import find_runs
from tasks.run.metadata import Snapshot, has_moved, read_snapshot
from tasks.run.views import Session, open_session

_EXPLAIN = re.compile(r"\s*EXPLAIN(\s+ANALYZE|\s*\([^)]*\))?\s+(?=\S)", re.IGNORECASE)
_TRIES = 3
Tables = Mapping[str, pa.Table]


def query(
    uri: str,
    sql: str,
    parameters: Mapping[str, Any] | None = None,
    tables: Tables | None = None,
) -> pa.Table:
    """Ask a run, or all runs below a folder.

    Args:
        parameters: values of $name in the statement.
        tables: further tables by name.

    Raises:
        LedgerError: there is no run, nothing is committed yet, or a part cannot be read.
        ConfigError: the statement is wrong; the message has DuckDB's reason and the nearest names.
    """
    for _ in range(_TRIES - 1):
        snapshots: dict[str, Snapshot] = {}
        try:
            snapshots = read_snapshots(uri)
            with open_session(snapshots, tables) as session:
                return ask(session, sql, parameters)
        except LedgerError as error:
            is_gone = isinstance(error.__cause__, FileNotFoundError)
            if not is_gone and not any(map(has_moved, snapshots.values())):
                raise
    with open_session(read_snapshots(uri), tables) as session:
        return ask(session, sql, parameters)


def read_snapshots(uri: str) -> dict[str, Snapshot]:
    """The runs of a question by name.

    Raises:
        LedgerError: there is none, nothing is committed yet, or one is damaged.
    """
    snapshots = {name: read_snapshot(run_uri) for name, run_uri in find_runs(uri).items()}
    if len(snapshots) == 1:
        (only,) = snapshots.values()
        if not only.num_rows:
            raise LedgerError(
                f"{uri}: nothing to query, {len(only.markers)} of {only.record['num_shards']} "
                "shards are committed and none has a row; let it come to its first commit"
            )
    return snapshots


@contextmanager
def open_views(run_uri: str) -> Iterator[Session]:
    """The views of one run; closed at the end.

    Raises:
        LedgerError: there is no run, nothing is committed yet, or a part cannot be opened.
    """
    with open_session(read_snapshots(run_uri)) as session:
        yield session


def ask(session: Session, sql: str, parameters: Mapping[str, Any] | None = None) -> pa.Table:
    """One SELECT over the views of a session.

    Raises:
        LedgerError: a part cannot be read.
        ConfigError: the statement is wrong, or no SELECT.
    """
    try:
        _check_is_select(session, sql)
        return session.ask(sql, parameters)
    except duckdb.Error as error:
        if isinstance(error, duckdb.IOException) or session.concerns_a_file(str(error)):
            raise LedgerError(
                f"a committed part cannot be read ({_first_line(error)}); run `refinery verify`"
            ) from error
        if isinstance(error, duckdb.PermissionException):
            raise ConfigError(
                f"query: {_first_line(error)}. A statement reads the run and nothing else; name a "
                "file of yours on the command line: --table NAME=FILE"
            ) from error
        raise ConfigError(f"query: {_first_line(error)}{_nearest(session, error)}") from error


def unknown_key(session: Session, uri: str, key: str) -> ConfigError:
    """What is wrong with a key that no inverted sample has."""
    known = "SELECT error FROM samples WHERE sample_key = $key"
    if "samples" not in session.names:
        return ConfigError(f"{uri} has no sample {key!r}: no row is committed yet")
    failed = session.ask(known, {"key": key})["error"].to_pylist()
    if failed:
        return ConfigError(f"{uri}: the sample {key!r} was not inverted: {failed[0]}")
    near = "SELECT sample_key FROM samples ORDER BY levenshtein(sample_key, $key), 1 LIMIT 1"
    nearest = session.ask(near, {"key": key})["sample_key"][0].as_py()
    return ConfigError(f"{uri} has no sample {key!r}; did you mean {nearest!r}?")


def _check_is_select(session: Session, sql: str) -> None:
    try:
        sql.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"query: no text in UTF-8 from character {error.start} on") from error
    found = session.statements(sql)
    if len(found) != 1:
        raise ConfigError(
            f"query: {len(found) or 'no'} statements in the text; expected one SELECT"
            if found
            else "query: the text holds no statement; expected one SELECT"
        )
    kind = found[0].type
    inner = _EXPLAIN.match(sql)
    if kind == duckdb.StatementType.EXPLAIN and inner:
        kind = session.statements(sql[inner.end() :])[0].type
    if kind != duckdb.StatementType.SELECT:
        raise ConfigError(f"query: expected one SELECT, found {kind.name}; a run is read-only here")


def _first_line(error: duckdb.Error) -> str:
    text = re.split(r"\n\nLINE |\nCandidate bindings|\nDid you mean", str(error))[0]
    return " ".join(text.split()).rstrip("!. ")


def _nearest(session: Session, error: duckdb.Error) -> str:
    """The view or column most like the one that is not known, and the views."""
    views = ", ".join(sorted(session.names))
    unknown = re.search(r'(Table with name|column|named) "?([^"\s]+)"?', str(error))
    if unknown and isinstance(error, duckdb.BinderException | duckdb.CatalogException):
        columns = session.columns()
        is_view = unknown[1].startswith("Table")
        having = sorted(view for view, names in columns.items() if unknown[2] in names)
        if having and not is_view:
            return f"; it is a column of {', '.join(having)}. Views: {views}"
        known = columns if is_view else {name for names in columns.values() for name in names}
        for found in difflib.get_close_matches(unknown[2], known, 1, 0.5):
            return f"; did you mean {found!r}? Views: {views}"
    return f". Views: {views}; `DESCRIBE samples` lists the columns of one"
