"""Columns too large to read for every row: codes, pictures, doors.

In a view such a column is the place of its value. Where a statement only passes the column on to
its answer (`tasks.run.passing`), the values are read when the rows of the answer are known.
"""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from tasks.run.lookup import CODES, read_codes, read_column
from tasks.run.metadata import PLACES, Snapshot
from tasks.run.parts import PICTURE
from tasks.storage.files import join
from tasks.storage.part_files import open_part

KINDS = ("latents", "images", "residuals")
"""Views with large columns: those of the kinds of part."""
_MARK = "place of "
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True, kw_only=True)
class LargeColumn:
    """A large column of a view.

    Attributes:
        field: of its values in an answer, with their shape where all runs have the same.
        runs: numbers of the runs that have it.
    """

    view: str
    field: pa.Field
    runs: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.field.name

    @property
    def type(self) -> pa.DataType:
        return self.field.type

    @property
    def place(self) -> str:
        """SQL of the place of a row's value; NULL where it has none."""
        runs = ", ".join(map(str, self.runs))
        return (
            f"CASE WHEN position IS NOT NULL AND run_number IN ({runs}) THEN "
            f"{{{quoted(self._mark)}: run_number, 'shard': shard, 'position': position, "
            f"'code_at': code_at}} END AS {quoted(self.name)}"
        )

    @property
    def value(self) -> str:
        """SQL of the value in a part. Parquet's fixed-size list is a list to DuckDB, for which it
        has no array functions."""
        if self.name != CODES:
            return quoted(self.name)
        is_fixed = pa.types.is_fixed_size_list(self.type)
        return f"{CODES}::FLOAT[{self.type.list_size if is_fixed else ''}] AS {CODES}"

    @property
    def _mark(self) -> str:
        return f"{_MARK}{self.view}.{self.name}"

    def is_at(self, kind: pa.DataType) -> bool:
        """Whether a column of an answer holds places of this column's values."""
        return _is_place(kind) and kind.field(0).name == self._mark


def find_large(snapshots: Sequence[Snapshot]) -> list[LargeColumn]:
    """The large columns of some runs.

    Raises:
        LedgerError: a part cannot be read.
    """
    found: dict[tuple[str, str], list[int]] = {}
    fields: dict[tuple[str, str], pa.Field] = {}
    for number, snapshot in enumerate(snapshots):
        for view, field in _columns_of(snapshot):
            key = view, field.name
            found.setdefault(key, []).append(number)
            if fields.setdefault(key, field).type != field.type:  # codes of another generator
                fields[key] = pa.field(field.name, pa.list_(field.type.value_type))
    return [
        LargeColumn(view=view, field=fields[view, name], runs=tuple(runs))
        for (view, name), runs in found.items()
    ]


def _columns_of(snapshot: Snapshot) -> list[tuple[str, pa.Field]]:
    found: list[tuple[str, pa.Field]] = []
    if snapshot.codes is not None:
        kind = pa.list_(pa.float32(), snapshot.codes.size)
        shape = json.dumps(snapshot.codes.shape)
        found.append(("latents", pa.field(CODES, kind, metadata={"shape": shape})))
    if snapshot.parts("images"):
        found += [("images", pa.field(name, PICTURE)) for name in snapshot.declared.pictures]
    residuals = snapshot.parts("residuals")
    if residuals:
        shard, path = next(iter(residuals.items()))
        size = snapshot.markers[shard].parts["residuals"].bytes
        schema = open_part(join(snapshot.uri, path), size).schema_arrow
        found += [("residuals", _widened(f)) for f in schema if f.name != "sample_key"]
    return found


def _widened(field: pa.Field) -> pa.Field:
    kind = field.type
    value = pa.float32() if kind.value_type == pa.float16() else kind.value_type
    return field.with_type(pa.list_(value, kind.list_size))


def holds_places(kind: pa.DataType) -> bool:
    """Whether a place lies inside a value, where it cannot be replaced."""
    fields = [kind.field(i).type for i in range(kind.num_fields)]
    return any(_is_place(field) or holds_places(field) for field in fields)


def _is_place(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and kind.field(0).name.startswith(_MARK)


def filled(
    table: pa.Table, columns: Collection[LargeColumn], snapshots: Sequence[Snapshot]
) -> pa.Table:
    """The answer with values instead of their places.

    Raises:
        LedgerError: a part is missing or damaged.
    """
    for number, field in enumerate(table.schema):
        for column in columns:
            if column.is_at(field.type):
                batches = table.select([number]).to_batches(max_chunksize=_ROWS_AT_ONCE)
                chunks = [_values(batch.column(0), column, snapshots) for batch in batches]
                values = pa.chunked_array([c for v in chunks for c in v.chunks], column.type)
                table = table.set_column(number, column.field.with_name(field.name), values)
    return table


def _values(
    places: pa.StructArray, column: LargeColumn, snapshots: Sequence[Snapshot]
) -> pa.ChunkedArray:
    is_there = places.is_valid().to_numpy(zero_copy_only=False)
    run, shards, positions, code_at = (
        places.field(n).fill_null(-1).to_numpy(zero_copy_only=False)[is_there]
        for n in range(1 + len(PLACES))
    )
    chunks: list[pa.Array] = [pa.array([], column.type)]
    order: list[np.ndarray] = []
    for number in np.unique(run):
        rows = np.flatnonzero(run == number)
        order.append(rows)
        snapshot = snapshots[int(number)]
        if column.name == CODES:
            codes = read_codes(snapshot, shards[rows], positions[rows], code_at[rows])
            size = codes[0].size
            found = pa.FixedSizeListArray.from_arrays(pa.array(codes.reshape(-1)), size)
            chunks.append(found.cast(column.type))
        else:
            values = read_column(snapshot, column.view, column.name, shards[rows], positions[rows])
            chunks += values.cast(column.type).chunks
    index = np.full(len(places), 0)
    index[np.flatnonzero(is_there)[np.concatenate([*order, []]).astype(int)]] = np.arange(len(run))
    return pa.chunked_array(chunks).take(pa.array(index, mask=~is_there))


def quoted(name: str) -> str:
    """A name as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def text(value: str) -> str:
    """A value as an SQL literal."""
    return "'" + value.replace("'", "''") + "'"
