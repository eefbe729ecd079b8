"""The codes nearest to one sample's."""

from tasks.browse.library import OpenRun
from tasks.run.query import query


def nearest(run: OpenRun, key: str, count: int) -> list[tuple[str, float]]:
    """Samples with the nearest codes by cosine, nearest first, without the sample itself.

    Raises:
        LedgerError: a part cannot be read.
    """
    text = "'" + key.replace("'", "''") + "'"
    found = query(run.uri, f"SELECT * FROM nearest({text}, {count + 1})").to_pylist()
    return [(r["sample_key"], r["cosine"]) for r in found if r["sample_key"] != key][:count]
