"""The index of a run, open for questions: which samples are nearest to a vector.

    index = open_index("runs/faces-index", "runs/faces")
    (found,) = index.search(index.vectors(["a.png"]), 20, "psnr > 22", leave_out=["a.png"])

A filter comes first, and only what it keeps is scanned; the scan is of 8-bit codes, exact over all
rows, or, in a large index that is asked again and again, of those that are nearest by their
sketches. Of an index on an object store the sketches alone are fetched and scanned. The best of it
are ordered by the exact vectors. The index may still be growing: what is committed when it is
opened is what is searched.

Legend: Q queries, E values of a vector, P bytes of a code, B of a code or a sketch, R rows.
"""

import difflib
import itertools
import os
import re
import threading
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float16, Float32, Int64, UInt8

from models.errors import ConfigError, LedgerError
from tasks.run.marker import Part
from tasks.run.metadata import read_markers
from tasks.run.run_json import find_run, read_run
from tasks.run.vectors import Exact, Projection, codes_of, default_index, open_vectors
from tasks.similar.fetched import read_index
from tasks.similar.scan import Stretch, scan, squared_distances
from tasks.similar.sketch import Sketches
from tasks.storage.files import is_local

if TYPE_CHECKING:
    import duckdb  # only a filter and a wrong key need it: 80 ms of a command

RERANKED, RERANKED_EACH = 200, 10
"""Rows whose exact distance is computed, at least; and for each that is wanted."""
FETCHED, FETCHED_EACH = 40, 5
"""The same where each is a request to an object store."""
SKETCHED = 200_000
"""Rows from which on sketches are worth their memory."""
SCANNED = 3
"""Questions for which a process scans the codes before it packs the sketches."""
SHORTLISTED_EACH = 10
"""Rows found by the coarse part of their sketches, for each of `RERANKED`."""
TOGETHER = 16
"""Questions whose candidates are read at once."""
ROWS_A_THREAD = 2_000_000
"""Of a condition."""
READERS = 16
"""Parts that are fetched side by side."""


def open_index(index_uri: str, run_uri: str | None = None) -> "Index":
    """Open what is committed of an index.

    Args:
        run_uri: the run that it must be of; None for whichever.

    Raises:
        LedgerError: there is no index, nothing of it is committed, or a part is damaged.
        ConfigError: it is no index, or one of another run or generator.
    """
    if is_local(index_uri):
        record = _checked_record(index_uri, run_uri)
        parts = [m.parts for m in read_markers(index_uri).values() if "vectors" in m.parts]
        projection = Projection.read(index_uri)
        tables = open_parts(index_uri, [part["vectors"] for part in parts])
    else:
        with ThreadPoolExecutor(READERS) as pool:
            checked = pool.submit(_checked_record, index_uri, run_uri)
            fitted = pool.submit(Projection.read, index_uri)
            found = pool.submit(read_index, index_uri)
            record, projection = checked.result(), fitted.result()
            snapshot, tables = found.result()
        parts = [m.parts for m in snapshot.markers.values() if "vectors" in m.parts]
    if not parts or projection is None:
        raise LedgerError(
            f"{index_uri}: nothing is indexed yet; run `refinery index` again, which finishes it"
        )
    return Index(
        uri=index_uri,
        source=record["config"]["source"],
        space=record["config"]["space"],
        projection=projection,
        tables=tables,
        parts=[part["vectors"] for part in parts],
        exact=Exact(index_uri, [part["exact"] for part in parts]),
    )


def open_parts(index_uri: str, parts: Sequence[Part]) -> list[pa.Table]:
    """Parts of vectors, all at once.

    Raises:
        LedgerError: one is missing or damaged.
    """
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(partial(open_vectors, index_uri), parts))


def _checked_record(index_uri: str, run_uri: str | None) -> dict[str, Any]:
    """run.json of an index, of the given run."""
    record = find_run(index_uri)
    if record is None:
        raise LedgerError(
            f"{index_uri}: no index here; make it with `{_command(index_uri, run_uri or 'RUN')}`"
        )
    if "space" not in record["config"]:
        raise ConfigError(
            f"{index_uri} is a run, not an index; `refinery index {index_uri}` makes one of it"
        )
    if run_uri is not None:
        _check_source(index_uri, record, run_uri)
    return record


def _command(index_uri: str, run_uri: str) -> str:
    """What makes an index."""
    rest = index_uri.removeprefix(default_index(run_uri))
    if not rest:
        return f"refinery index {run_uri}"
    if rest == index_uri:
        return f"refinery index {run_uri} {index_uri}"
    return f"refinery index {run_uri} --space {rest.removeprefix('-')}"


def _check_source(index_uri: str, record: dict[str, Any], run_uri: str) -> None:
    run = read_run(run_uri)
    advice = f"give the index of this run, or make it: refinery index {run_uri}"
    made_with, given = (each["weights"].get("generator") for each in (record, run))
    if made_with != given:
        raise ConfigError(
            f"{index_uri} is of codes of another generator ({str(made_with)[:12]}) than {run_uri} "
            f"({str(given)[:12]}); {advice}"
        )
    if record["config"]["source_run"] != run["run_id"]:
        raise ConfigError(
            f"{index_uri} is an index of run {record['config']['source_run']} "
            f"({record['config']['source']}), {run_uri} is run {run['run_id']}; {advice}"
        )


@dataclass(kw_only=True)
class Index:
    """Vectors of a run's samples.

    Attributes:
        source: the run.
        space: of `tasks.work.spaces`.
        tables: sample_key, scores and sketches of each part; its codes, too, where they are mapped.
        parts: of vectors, with the codes.
        exact: the vectors of the same rows.
    """

    uri: str
    source: str
    space: str
    projection: Projection
    tables: Sequence[pa.Table]
    parts: Sequence[Part]
    exact: Exact

    def __post_init__(self) -> None:
        sizes = [table.num_rows for table in self.tables]
        self._starts = np.array([0, *itertools.accumulate(sizes)], np.int64)
        names = self.tables[0].column_names
        self._has_codes = "code" in names
        rows = [name for name in names if name not in ("sketch", "code")]
        self._rows = [table.select(rows) for table in self.tables]
        self._sketches: Sketches | None = None
        self._scanned = 0
        self._labels: pa.Table | None = None
        self._kept: tuple[str, np.ndarray] | None = None
        self._connection: duckdb.DuckDBPyConnection | None = None
        self._asking, self._packing = threading.Lock(), threading.Lock()

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def size(self) -> int:
        """E."""
        return len(self.projection.mean)

    def label(self, labels: pa.Table) -> None:
        """Columns of the user's for filters and results, joined by `sample_key`."""
        names = labels.column_names
        if "sample_key" not in names:
            raise ConfigError(
                f"table: expected a column sample_key to join by; it has {', '.join(names)}"
            )
        keys = labels["sample_key"].cast(pa.string())
        if len(keys.unique()) != len(keys):
            raise ConfigError("table: a sample_key is there twice; expected one row a sample")
        labels = labels.set_column(names.index("sample_key"), "sample_key", keys)
        self._labels, self._connection, self._kept = labels, None, None

    def search(
        self,
        vectors: Float32[np.ndarray, "Q E"],
        k: int = 20,
        where: str | None = None,
        *,
        leave_out: Sequence[str] = (),
    ) -> list[pa.Table]:
        """The nearest samples of each vector, nearest first: sample_key, distance and the scores.

        Args:
            where: SQL condition over sample_key and the scores; only rows it keeps are scanned.
            leave_out: keys that are not answers; the query itself, as a rule.

        Returns:
            A table for each vector, of at most k rows. Distances are Euclidean, in the space.

        Raises:
            ConfigError: k below 1, vectors of another size, not finite, or a wrong condition.
            LedgerError: a part is missing or damaged.
        """
        vectors = self._checked(vectors, k)
        rows = self._candidates(self.projection.project(vectors), k, len(leave_out), where)
        answers: list[pa.Table] = []
        for at in range(0, len(vectors), TOGETHER):
            some = [np.sort(found[found >= 0]) for found in rows[at : at + TOGETHER]]
            exact = np.split(self._exact(np.concatenate(some)), np.cumsum([*map(len, some)])[:-1])
            candidates = zip(vectors[at : at + TOGETHER], some, exact, strict=True)
            answers += [self._ranked(*found, k=k, leave_out=set(leave_out)) for found in candidates]
        return answers

    def vectors(self, sample_keys: Sequence[str]) -> Float32[np.ndarray, "Q E"]:
        """The exact vectors of samples.

        Raises:
            ConfigError: a key is not in the index; the message has the nearest one.
        """
        return self.take(np.array([self._row_of(key) for key in sample_keys], np.int64))

    def take(self, rows: np.ndarray) -> Float32[np.ndarray, "M E"]:
        """The exact vectors of rows."""
        return self._exact(rows).astype(np.float32)

    def samples(self, rows: np.ndarray) -> pa.Table:
        """sample_key and scores of rows."""
        parts = np.searchsorted(self._starts, rows, "right") - 1
        places = zip(parts.tolist(), (rows - self._starts[parts]).tolist(), strict=True)
        found = [self._rows[part].slice(row, 1) for part, row in places]
        return pa.concat_tables(found or [self._rows[0].slice(0, 0)]).combine_chunks()

    def codes(self, first: int, stop: int) -> np.ndarray:
        """uint8 [stop - first, P] of consecutive rows.

        Raises:
            LedgerError: they have to be fetched, and a part is missing or damaged.
        """
        parts = [
            codes[max(0, first - start) : max(0, stop - start)]
            for start, codes in zip(self._starts, self._codes, strict=False)
        ]
        return np.concatenate(parts)

    # ------------------------------------------------------------------ inside

    def _candidates(
        self, queries: Float32[np.ndarray, "Q P"], k: int, more: int, where: str | None
    ) -> Int64[np.ndarray, "Q R"]:
        """About the nearest rows; -1 where there are fewer."""
        kept = None if where is None else self._filtered(where)
        if kept is not None and not len(kept):
            return np.full((len(queries), 1), -1)
        size = len(self) if kept is None else len(kept)
        keep = min(max(RERANKED, RERANKED_EACH * k) + more, size)
        sketches = self._packed(len(queries), kept)
        if sketches is None:
            _, rows = scan(self._stretches(self._codes, kept), queries, keep)
            return rows if kept is None else kept[rows]
        found = []
        for at in range(0, len(queries), TOGETHER):
            some = queries[at : at + TOGETHER]
            listed = sketches.nearest(some, min(SHORTLISTED_EACH * keep, size))
            listed = listed if kept is None else kept[listed]
            if self._has_codes:
                found += self._nearest_codes(listed, some, keep)
            else:
                found += self._nearest_sketches(
                    listed, some, min(max(FETCHED, FETCHED_EACH * k) + more, size)
                )
        return np.stack(found)

    @cached_property
    def _codes(self) -> list[UInt8[np.ndarray, "N P"]]:
        tables = self.tables if self._has_codes else open_parts(self.uri, self.parts)
        return [codes_of(table) for table in tables]

    def _packed(self, questions: int, kept: np.ndarray | None) -> Sketches | None:
        """The sketches of all rows or of some, where no codes are at hand; of all, too, once so
        much was asked of a large index that packing them pays."""
        if kept is not None and self._has_codes:
            return None
        with self._packing:
            self._scanned += questions
            is_asked_much = len(self) >= SKETCHED and self._scanned > SCANNED
            is_needed = is_asked_much or not self._has_codes
            if kept is None and (self._sketches is not None or not is_needed):
                return self._sketches
            parts = [codes_of(table, "sketch") for table in self.tables]
            packed = Sketches(self.projection, [c for _, c in self._stretches(parts, kept)])
            if kept is None:
                self._sketches = packed
            return packed

    def _nearest_codes(
        self, listed: Int64[np.ndarray, "Q R"], queries: Float32[np.ndarray, "Q P"], keep: int
    ) -> Iterator[Int64[np.ndarray, " keep"]]:
        codes = self._gathered(self._codes, listed)
        for query, rows, near in zip(queries, listed, codes, strict=True):
            _, places = scan([(0, near)], query[None], keep)
            yield rows[places[0]]

    def _nearest_sketches(
        self, listed: Int64[np.ndarray, "Q R"], queries: Float32[np.ndarray, "Q P"], keep: int
    ) -> Iterator[Int64[np.ndarray, " keep"]]:
        """By all that their sketches say."""
        sketches = self._gathered([codes_of(table, "sketch") for table in self.tables], listed)
        for query, rows, near in zip(queries, listed, sketches, strict=True):
            along, rest = self.projection.restored(near)
            distance = ((along - query) ** 2).sum(1) + rest
            yield rows[np.argpartition(distance, keep - 1)[:keep]]

    def _gathered(
        self, parts: Sequence[UInt8[np.ndarray, "N B"]], listed: Int64[np.ndarray, "Q R"]
    ) -> UInt8[np.ndarray, "Q R B"]:
        rows = listed.reshape(-1)
        order = np.argsort(rows)
        cuts = np.searchsorted(rows[order], self._starts)
        found = np.empty((len(rows), parts[0].shape[1]), np.uint8)
        for part in np.flatnonzero(np.diff(cuts)):
            at = order[cuts[part] : cuts[part + 1]]
            found[at] = parts[int(part)][rows[at] - self._starts[part]]
        return found.reshape(*listed.shape, -1)

    def _exact(self, rows: np.ndarray) -> Float16[np.ndarray, "M E"]:
        parts = np.searchsorted(self._starts, rows, "right") - 1
        return self.exact.take(parts, rows - self._starts[parts])

    def _checked(self, vectors: np.ndarray, k: int) -> np.ndarray:
        vectors = np.asarray(vectors, np.float32)
        if k < 1:
            raise ConfigError(f"k is {k}; expected at least 1")
        if vectors.ndim != 2 or vectors.shape[1] != self.size:
            raise ConfigError(
                f"query of shape {list(vectors.shape)}: {self.uri} holds vectors of {self.size} "
                f"values (space {self.space}); expected [number, {self.size}]"
            )
        if not np.isfinite(vectors).all():
            raise ConfigError("query: a vector has values that are not finite")
        return vectors

    def _stretches(self, parts: Sequence[np.ndarray], kept: np.ndarray | None) -> list[Stretch]:
        """What is kept of codes or sketches."""
        if kept is None:
            return list(zip(self._starts.tolist(), parts, strict=False))
        found = np.empty((len(kept), parts[0].shape[1]), np.uint8)
        cuts = np.searchsorted(kept, self._starts)
        for part in np.flatnonzero(np.diff(cuts)):
            some = slice(cuts[part], cuts[part + 1])
            rows = kept[some] - self._starts[part]
            parts[int(part)].take(
                rows, 0, found[some], "clip"
            )  # "raise", the default, copies twice
        return [(0, found)]

    def _filtered(self, where: str) -> np.ndarray:
        """Rows that a condition keeps, ascending; those of the latest condition are remembered."""
        known = self._kept
        if known is not None and known[0] == where:
            return known[1]
        import duckdb

        if not where.strip():
            raise ConfigError("where: the condition is empty; expected one, or no --where")
        try:
            found = self._sql(f'SELECT "row number" FROM samples WHERE ({where}\n)')
        except duckdb.Error as error:
            unknown = re.search(r'column "([^"]+)"', str(error))
            near = difflib.get_close_matches(unknown[1] if unknown else "", self._columns, 1, 0.5)
            raise ConfigError(
                f"where {where!r}: {str(error).splitlines()[0].rstrip('!')}; "
                f"{f'did you mean {near[0]!r}? ' if near else ''}columns: "
                f"{', '.join(self._columns)}"
            ) from error
        kept = np.sort(found["row number"].to_numpy())
        self._kept = where, kept
        return kept

    def _sql(self, sql: str, *parameters: str) -> pa.Table:
        """The rows as SQL sees them: the view `samples`. One question at a time."""
        with self._asking:
            if self._connection is None:
                numbers = pa.array(np.arange(len(self)))
                table = pa.concat_tables(self._rows).append_column("row number", numbers)
                self._connection = _sandbox(table, self._labels)
            return self._connection.sql(sql, params=list(parameters)).to_arrow_table()

    @property
    def _columns(self) -> list[str]:
        labels = [] if self._labels is None else self._labels.column_names
        return list(dict.fromkeys([*self._rows[0].column_names, *labels]))

    def _ranked(
        self, query: np.ndarray, rows: np.ndarray, exact: np.ndarray, k: int, leave_out: set[str]
    ) -> pa.Table:
        distances = np.sqrt(squared_distances(exact, query))
        order = np.argsort(distances, kind="stable")[: k + len(leave_out)]
        found = self.samples(rows[order])
        buffers = [None, pa.py_buffer(distances[order])]  # `pa.array` would load pandas
        apart = pa.Array.from_buffers(pa.float32(), len(order), buffers)
        found = found.add_column(1, "distance", apart)
        if leave_out:
            keys = enumerate(found["sample_key"].to_pylist())
            others = [found.slice(row, 1) for row, key in keys if key not in leave_out]
            found = pa.concat_tables(others or [found.slice(0, 0)]).combine_chunks()
        found = found.slice(0, k)
        return found if self._labels is None else _joined(found, self._labels)

    def _row_of(self, key: str) -> int:
        for start, table in zip(self._starts, self._rows, strict=False):
            keys = table["sample_key"]  # in order; `pyarrow.compute` would load longer
            if keys[0].as_py() <= key <= keys[-1].as_py():
                at = bisect_left(range(len(keys)), key, key=lambda row: keys[row].as_py())
                if keys[at].as_py() == key:
                    return int(start) + at
        near = self._sql(
            "SELECT sample_key FROM samples "
            "ORDER BY levenshtein(sample_key, ?), sample_key LIMIT 1",
            key,
        )
        raise ConfigError(
            f"{self.source} has no sample {key!r} with a vector in {self.uri}; did you mean "
            f"{near['sample_key'][0].as_py()!r}?"
        )


def _sandbox(rows: pa.Table, labels: pa.Table | None) -> "duckdb.DuckDBPyConnection":
    """A connection that knows the view `samples` and nothing else: no file, no variable."""
    import duckdb

    # The scan of an Arrow table is one at a time; further threads mostly wait for it.
    threads = min(os.cpu_count() or 1, 1 + rows.num_rows // ROWS_A_THREAD)
    connection = duckdb.connect(
        config={
            "python_enable_replacements": False,
            "enable_external_access": False,
            "threads": threads,
        }
    )
    connection.register("rows", rows)
    if labels is None:
        connection.execute("CREATE VIEW samples AS FROM rows")
        return connection
    connection.register("labels", labels)
    connection.execute("CREATE VIEW samples AS FROM rows LEFT JOIN labels USING (sample_key)")
    return connection


def _joined(found: pa.Table, labels: pa.Table) -> pa.Table:
    with _sandbox(found, labels) as connection:
        return connection.sql("FROM samples ORDER BY distance, sample_key").to_arrow_table()
