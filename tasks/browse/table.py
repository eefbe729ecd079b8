"""The rows of a run without their vectors, in memory: filtered, sorted, paged by key.

    table = Table(read_rows(read_snapshot(run_uri)))
    page = table.page(Wish(sort="psnr", ranges={"psnr": (None, 20.0)}))

A user's SQL condition runs on this copy alone, on a connection that can open no file and whose
configuration is locked.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import duckdb
import pyarrow as pa

from models.errors import ConfigError
from tasks.run.large import quoted
from tasks.run.metadata import Snapshot
from tasks.run.views import open_session

SHARD = "shard"
PAGE = 48
LIMIT_S = 5.0
"""A condition that takes longer is stopped."""
KEYS = 100_000
"""Rows that one selection can have."""
_KEPT = 4096
"""Samples whose shard is remembered, and conditions whose count is: a slider asks for the same one
at every step, and the next page of a grid too."""
_SETTINGS: dict[str, Any] = {
    "enable_external_access": False,
    "python_enable_replacements": False,
    "memory_limit": "4GB",
    "threads": 2,
}


@dataclass(frozen=True, kw_only=True)
class Cursor:
    """Where a page begins: beyond this row of the order. `value` is None in its empty end."""

    value: float | str | None
    key: str
    is_back: bool = False


@dataclass(frozen=True, kw_only=True)
class Wish:
    """Which rows, in which order.

    Attributes:
        status: "ok", "failed" or "" for both.
        text: is somewhere in the key or the error.
        ranges: lowest and highest value by metric, either may be None.
        where: a condition in SQL over the columns.
        sort: a column.
    """

    status: str = ""
    text: str = ""
    ranges: Mapping[str, tuple[float | None, float | None]] = field(default_factory=dict)
    where: str = ""
    sort: str = "sample_key"
    is_descending: bool = False
    cursor: Cursor | None = None


@dataclass(frozen=True, kw_only=True)
class Page:
    """Some rows in order; `before` and `after` lead to the next pages, None at the ends."""

    rows: list[dict[str, Any]]
    total: int
    before: Cursor | None
    after: Cursor | None


def read_rows(snapshot: Snapshot) -> pa.Table:
    """Every row of a run without its codes, with the number of its shard.

    Raises:
        LedgerError: a part is missing or damaged.
    """
    if not snapshot.num_rows:
        return _EMPTY
    with open_session({"": snapshot}) as session:
        return session.ask("SELECT * EXCLUDE (run) FROM samples")


_EMPTY = pa.schema(
    {"sample_key": pa.string(), "status": pa.string(), "error": pa.string(), SHARD: pa.int64()}
).empty_table()


class Table:
    """The rows as DuckDB holds them; any thread may ask.

    Attributes:
        columns: names in the order of the file.
        metrics: those that hold numbers with a fraction.
    """

    def __init__(self, rows: pa.Table) -> None:
        self.columns: tuple[str, ...] = tuple(rows.column_names)
        self.metrics: tuple[str, ...] = tuple(
            f.name for f in rows.schema if pa.types.is_floating(f.type)
        )
        self.total = len(rows)
        self._connection = duckdb.connect(config=_SETTINGS)
        self._connection.from_arrow(rows).create("rows")
        self._connection.execute("CREATE INDEX by_key ON rows (sample_key)")
        self._connection.execute("SET lock_configuration = true")
        self.shard = lru_cache(_KEPT)(self._shard)
        self._count = lru_cache(_KEPT)(self._counted)

    def row(self, key: str) -> dict[str, Any] | None:
        """All columns of one sample."""
        found = self._ask("SELECT * FROM rows WHERE sample_key = ?", [key])
        return found[0] if found else None

    def shards(self, keys: Sequence[str]) -> dict[str, int]:
        """The shard of each of these samples that is there."""
        sql = f"SELECT sample_key, {SHARD} FROM rows WHERE sample_key IN (SELECT unnest(?))"
        return {r["sample_key"]: r[SHARD] for r in self._ask(sql, [list(keys)])}

    def _shard(self, key: str) -> int | None:
        """The shard of one sample; None where there is none."""
        return self.shards([key]).get(key)

    def ranks(self, row: Mapping[str, Any]) -> dict[str, float]:
        """By metric: the share of rows with a smaller value."""
        have = [m for m in self.metrics if row.get(m) is not None]
        if not have:
            return {}
        shares = ", ".join(
            f"avg(({quoted(m)} < ?)::INT) FILTER (WHERE {quoted(m)} IS NOT NULL) AS {quoted(m)}"
            for m in have
        )
        return self._ask(f"SELECT {shares} FROM rows", [row[m] for m in have])[0]

    @cached_property
    def spans(self) -> dict[str, tuple[float, float]]:
        """Smallest and largest finite value by metric."""
        if not self.metrics:
            return {}
        asked = ", ".join(
            f"min({quoted(m)}) FILTER (WHERE isfinite({quoted(m)})) AS a{i}, "
            f"max({quoted(m)}) FILTER (WHERE isfinite({quoted(m)})) AS b{i}"
            for i, m in enumerate(self.metrics)
        )
        found = self._ask(f"SELECT {asked} FROM rows")[0]
        pairs = {m: (found[f"a{i}"], found[f"b{i}"]) for i, m in enumerate(self.metrics)}
        return {m: pair for m, pair in pairs.items() if pair[0] is not None}

    def keys(self, wish: Wish) -> list[str]:
        """Keys of all rows that match, in order; at most `KEYS`.

        Raises:
            ConfigError: as `page`.
        """
        condition, values = self._condition(wish)
        order = _order(self._column(wish.sort), wish.is_descending, is_back=False)
        sql = f"SELECT sample_key FROM rows WHERE {condition} ORDER BY {order} LIMIT {KEYS}"
        return [row["sample_key"] for row in self._ask(sql, values)]

    def page(self, wish: Wish, size: int = PAGE) -> Page:
        """The rows that match, from the cursor on.

        Raises:
            ConfigError: no such column, or a condition that is wrong or takes too long.
        """
        condition, values = self._condition(wish)
        column, cursor = self._column(wish.sort), wish.cursor
        total = self._count(condition, tuple(values))
        is_back = cursor is not None and cursor.is_back
        if cursor is not None:
            beyond, more = _beyond(column, wish.is_descending, cursor)
            condition, values = f"{condition} AND {beyond}", [*values, *more]
        order = _order(column, wish.is_descending, is_back)
        sql = f"SELECT * FROM rows WHERE {condition} ORDER BY {order} LIMIT {size + 1}"
        rows = self._ask(sql, values)
        has_more = len(rows) > size
        rows = rows[:size][::-1] if is_back else rows[:size]
        ends = (
            [
                Cursor(value=_plain(row[wish.sort]), key=row["sample_key"], is_back=back)
                for row, back in ((rows[0], True), (rows[-1], False))
            ]
            if rows
            else [None, None]
        )
        return Page(
            rows=rows,
            total=total,
            before=ends[0] if (has_more if is_back else cursor is not None) else None,
            after=ends[1] if (is_back or has_more) else None,
        )

    def _counted(self, condition: str, values: tuple[Any, ...]) -> int:
        return self._ask(f"SELECT count(*) AS n FROM rows WHERE {condition}", values)[0]["n"]

    def _column(self, name: str) -> str:
        if name not in self.columns:
            raise ConfigError(f"no column {name!r}; the rows have {', '.join(self.columns)}")
        return quoted(name)

    def _condition(self, wish: Wish) -> tuple[str, list[Any]]:
        parts, values = ["true"], []
        if wish.status:
            parts.append("status = ?")
            values.append(wish.status)
        if wish.text:
            parts.append("(contains(lower(sample_key), lower(?)) OR contains(lower(error), ?))")
            values += [wish.text, wish.text.lower()]
        for name, (low, high) in wish.ranges.items():
            for bound, sign in ((low, ">="), (high, "<=")):
                if bound is not None:
                    parts.append(f"{self._column(name)} {sign} ?")
                    values.append(bound)
        if wish.where.strip():
            parts.append(self._checked(wish.where))
        return " AND ".join(parts), values

    def _checked(self, where: str) -> str:
        """The condition in brackets, once it is one condition and nothing else."""
        text = f"({where}\n)"  # a comment at its end must not swallow the bracket
        with _explained(where):
            found = self._connection.cursor().extract_statements(f"SELECT {text} FROM rows")
            if len(found) != 1 or found[0].type != duckdb.StatementType.SELECT:
                raise ConfigError(f"where: {where!r} is not one condition, such as psnr < 20")
            self._ask(f"SELECT 1 FROM rows WHERE {text} LIMIT 0")
        return text

    def _ask(self, sql: str, values: Sequence[Any] = ()) -> list[dict[str, Any]]:
        cursor = self._connection.cursor()
        timer = threading.Timer(LIMIT_S, cursor.interrupt)
        timer.start()
        try:
            with _explained(sql):
                found = cursor.execute(sql, list(values))
                names = [column[0] for column in found.description or ()]
                return [dict(zip(names, row, strict=True)) for row in found.fetchall()]
        finally:
            timer.cancel()
            cursor.close()


@contextmanager
def _explained(text: str) -> Iterator[None]:
    try:
        yield
    except duckdb.InterruptException as error:
        raise ConfigError(f"stopped after {LIMIT_S:g} s: {text!r} takes too long") from error
    except duckdb.Error as error:
        raise ConfigError(f"where: {str(error).partition(chr(10))[0]}") from error


def _order(column: str, is_descending: bool, is_back: bool) -> str:
    """Rows without a value come last, whichever way the order runs."""
    way = "DESC" if is_descending != is_back else "ASC"
    nulls, keys = ("FIRST", "DESC") if is_back else ("LAST", "ASC")
    return f"{column} {way} NULLS {nulls}, sample_key {keys}"


def _beyond(column: str, is_descending: bool, cursor: Cursor) -> tuple[str, list[Any]]:
    """The condition for rows that come after (or before) a row in the order of `_order`."""
    sign, key_sign = (">" if is_descending == cursor.is_back else "<"), ">"
    if cursor.is_back:
        key_sign = "<"
    if cursor.value is None:
        empty = f"({column} IS NULL AND sample_key {key_sign} ?)"
        return (f"({column} IS NOT NULL OR {empty})" if cursor.is_back else empty), [cursor.key]
    rest = "" if cursor.is_back else f" OR {column} IS NULL"
    text = f"({column} {sign} ? OR ({column} = ? AND sample_key {key_sign} ?){rest})"
    return text, [cursor.value, cursor.value, cursor.key]


def _plain(value: Any) -> float | str | None:
    return value if value is None or isinstance(value, float | str) else str(value)
