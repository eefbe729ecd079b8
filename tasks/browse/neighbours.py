"""The codes nearest to one sample's: by the run's index where there is one, else by a scan."""

from dataclasses import dataclass

from tasks.browse.library import BrowsedRun
from tasks.run.query import query
from tasks.run.vectors import default_index
from tasks.similar import open_index
from tasks.storage.files import exists, join


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """Samples, nearest first.

    Attributes:
        measure: what the values are, "cosine" or "distance" with the space.
        advice: how to be faster; "" where there is an index.
    """

    found: list[tuple[str, float]]
    measure: str
    advice: str = ""


def nearest(run: BrowsedRun, key: str, count: int) -> Neighbours:
    """The samples nearest to one, without itself.

    Raises:
        UnknownError: there is no such sample.
        ConfigError: the index is of another run, or older than the sample.
        LedgerError: a part cannot be read.
    """
    run.shard_of(key)
    place = default_index(run.uri)
    if not exists(join(place, "run.json")):
        found = query(
            run.uri, "SELECT * FROM nearest($key, $count)", {"key": key, "count": count + 1}
        )
        pairs = [(r["sample_key"], r["cosine"]) for r in found.to_pylist()]
        advice = f"All codes were read; `refinery index {run.uri}` makes an index."
        others = [pair for pair in pairs if pair[0] != key][:count]
        return Neighbours(found=others, measure="cosine", advice=advice)
    index = open_index(place, run.uri)
    (table,) = index.search(index.vectors([key]), count, leave_out=[key])
    rows = zip(table["sample_key"].to_pylist(), table["distance"].to_pylist(), strict=True)
    return Neighbours(found=list(rows), measure=f"distance in {index.space}")
