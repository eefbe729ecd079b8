"""Rows in memory: every order is walked whole, both ways; conditions stay conditions."""

import math

import numpy as np
import pyarrow as pa
import pytest

from models.errors import ConfigError
from tasks.browse.table import Cursor, Table, Wish

COUNT = 23


@pytest.fixture(scope="module")
def table() -> Table:
    """Metrics with ties, empty values, infinities and NaN."""
    rng = np.random.default_rng(0)
    psnr = [None if i % 7 == 3 else float(rng.integers(5)) for i in range(COUNT)]
    mse = [[None, math.nan, math.inf, -math.inf, 0.1][i % 5] for i in range(COUNT)]
    keys = [f"../{'é' if i % 2 else 'E'}-{i:02d}' \"<b>" for i in rng.permutation(COUNT)]
    return Table(
        pa.table(
            {
                "sample_key": keys,
                "status": ["failed" if value is None else "ok" for value in psnr],
                "error": ["cut off at 7%" if value is None else None for value in psnr],
                "psnr": pa.array(psnr, pa.float32()),
                "mse": pa.array(mse, pa.float32()),
                "shard": pa.array([i // 5 for i in range(COUNT)], pa.int32()),
            }
        )
    )


def walk(table: Table, wish: dict[str, object], size: int) -> tuple[list[str], Cursor | None]:
    keys, cursor, last = [], None, None
    while True:
        page = table.page(Wish(**wish, cursor=cursor), size)
        keys += [row["sample_key"] for row in page.rows]
        last = page.before or last
        if page.after is None:
            return keys, page.before
        cursor = page.after


@pytest.mark.parametrize("sort", ["sample_key", "psnr", "mse"])
@pytest.mark.parametrize("is_descending", [False, True])
@pytest.mark.parametrize("size", [1, 4, COUNT])
def test_pages_walk_the_whole_order_and_back(
    table: Table, sort: str, is_descending: bool, size: int
) -> None:
    wish = {"sort": sort, "is_descending": is_descending}
    whole = [row["sample_key"] for row in table.page(Wish(**wish), COUNT).rows]

    keys, cursor = walk(table, wish, size)

    assert len(set(whole)) == COUNT
    assert keys == whole
    back: list[str] = keys[(COUNT - 1) // size * size :]
    while cursor is not None:
        page = table.page(Wish(**wish, cursor=cursor), size)
        back = [row["sample_key"] for row in page.rows] + back
        cursor = page.before
    assert back == whole


def test_empty_values_are_last_either_way(table: Table) -> None:
    for is_descending in (False, True):
        rows = table.page(Wish(sort="psnr", is_descending=is_descending), COUNT).rows
        is_empty = [row["psnr"] is None for row in rows]
        assert is_empty == sorted(is_empty)
        values = [row["psnr"] for row in rows if row["psnr"] is not None]
        assert values == sorted(values, reverse=is_descending)


def test_filters_are_joined(table: Table) -> None:
    wish = Wish(status="ok", ranges={"psnr": (1.0, 3.0)}, where="shard < 3 -- a comment", text="e-")
    found = table.page(wish, COUNT)

    rows = table.page(Wish(), COUNT).rows
    expected = {
        row["sample_key"]
        for row in rows
        if row["psnr"] is not None
        and 1 <= row["psnr"] <= 3
        and row["shard"] < 3
        and "e-" in row["sample_key"].lower()
    }
    assert {row["sample_key"] for row in found.rows} == expected
    assert found.total == len(expected) == len(table.keys(wish))


def test_text_is_no_pattern(table: Table) -> None:
    assert table.page(Wish(text="7%")).total == table.page(Wish(status="failed")).total > 0
    assert table.page(Wish(text="%")).total == table.page(Wish(text="7%")).total
    assert table.page(Wish(text="_")).total == 0


@pytest.mark.parametrize(
    "where",
    [
        "true); DELETE FROM rows; SELECT (true",
        "sample_key IN (SELECT * FROM read_csv('/etc/passwd'))",
        "sample_key IN (SELECT * FROM glob('/*'))",
        "psnr > (SELECT count(*) FROM '/etc/passwd')",
        "",
    ],
)
def test_a_condition_reads_and_changes_nothing_else(table: Table, where: str) -> None:
    if where:
        with pytest.raises(ConfigError, match="where"):
            table.page(Wish(where=where))
    assert table.page(Wish(where="  ")).total == COUNT


def test_unknown_columns_are_named(table: Table) -> None:
    with pytest.raises(ConfigError, match=r"no column 'x\"; DROP TABLE rows'.*psnr"):
        table.page(Wish(sort='x"; DROP TABLE rows'))


def test_rank_is_the_share_of_smaller_values(table: Table) -> None:
    rows = table.page(Wish(status="ok", sort="psnr", is_descending=True), COUNT).rows
    values = [row["psnr"] for row in rows]

    found = table.ranks(rows[0])["psnr"]

    assert found == pytest.approx(sum(v < values[0] for v in values) / len(values))
    assert table.spans["psnr"] == (min(values), max(values))
    assert table.spans["mse"] == (pytest.approx(0.1), pytest.approx(0.1))  # of finite values
