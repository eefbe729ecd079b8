"""What a page of the SQL box shows of an answer: its first rows."""

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from tasks.browse.pictures import media_type, reduced

ROWS = 200
TEXT = 400
"""Characters shown of a value."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A table as a page shows it: texts, and pictures as (media type, bytes)."""

    columns: tuple[str, ...]
    numbers: tuple[bool, ...]
    rows: list[list[Any]]
    total: int


def shown(table: pa.Table) -> Answer:
    """The first rows of an answer."""
    numbers = [pa.types.is_integer(f.type) or pa.types.is_floating(f.type) for f in table.schema]
    return Answer(
        columns=tuple(table.column_names),
        numbers=tuple(numbers),
        rows=[[_cell(value) for value in row.values()] for row in table.slice(0, ROWS).to_pylist()],
        total=len(table),
    )


def _cell(value: Any) -> Any:
    encoded = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(encoded, bytes):
        kind = media_type(encoded)
        return reduced(encoded) or b"" if kind else f"{len(encoded)} bytes"
    if isinstance(value, list) and len(value) > 8:
        start = ", ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in value[:4])
        return f"[{start}, ...] {len(value)} values"
    if value is None or isinstance(value, int | float):
        return value
    text = str(value)
    return text if len(text) <= TEXT else text[:TEXT] + "..."
