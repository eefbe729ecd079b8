"""Metrics and picture choices against numpy, and that no query returns all rows."""

from collections.abc import Callable

import duckdb
import numpy as np
import pyarrow as pa
import pytest

from tasks.report.aggregates import (
    MAX_BINS,
    PAIRS,
    Ask,
    Metric,
    failed_rows,
    metrics,
    pair_groups,
    ranking_metric,
)


@pytest.fixture
def asking() -> Callable[..., Ask]:
    """Build `ask` over views that are given as tables; it refuses answers with many rows."""

    def build(**tables: pa.Table) -> Ask:
        connection = duckdb.connect()
        for name, found in tables.items():
            connection.from_arrow(found).create_view(name)

        def ask(sql: str) -> pa.Table:
            answer = connection.sql(sql).to_arrow_table()
            assert answer.num_rows <= 1000
            return answer

        return ask

    return build


def latents(**columns: np.ndarray) -> pa.Table:
    n = len(next(iter(columns.values())))
    table = pa.table(
        {
            "sample_key": [f"key-{i:06d}" for i in range(n)],
            "status": ["ok"] * n,
            "error_kind": pa.nulls(n, pa.string()),
            "error": pa.nulls(n, pa.string()),
        }
    )
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values, pa.float32(), from_pandas=True))
    return table


def test_summary_and_histogram_agree_with_numpy(asking: Callable[..., Ask]) -> None:
    values = np.random.default_rng(0).normal(20, 3, 5001).astype(np.float32)
    table = latents(psnr=values)

    (found,) = metrics(asking(latents=table), table.schema, len(values))

    assert (found.name, found.count) == ("psnr", 5001)
    assert found.median == pytest.approx(float(np.median(values)))
    assert found.mean == pytest.approx(float(values.mean(dtype=np.float64)))
    assert (found.smallest, found.largest) == (values.min(), values.max())
    expected, _ = np.histogram(values.astype(np.float64), MAX_BINS, (found.low, found.high))
    np.testing.assert_allclose(found.counts, expected, atol=1)  # a value may sit on an edge
    assert sum(found.counts) + found.below + found.above == 5001


def test_an_outlier_does_not_flatten_the_histogram(asking: Callable[..., Ask]) -> None:
    values = np.linspace(0, 1, 2000, dtype=np.float32)
    values[7] = 1e6
    table = latents(mse=values)

    (found,) = metrics(asking(latents=table), table.schema, len(values))

    assert found.largest == 1e6
    assert found.high < 1.01
    assert found.above >= 1
    assert sum(found.counts) + found.above == 2000
    assert max(found.counts) < 100


def test_missing_and_infinite_values_are_left_out(asking: Callable[..., Ask]) -> None:
    table = latents(psnr=np.array([1.0, np.inf, 3.0, np.nan, 2.0]), identity=np.full(5, np.nan))

    (found,) = metrics(asking(latents=table), table.schema, 5)

    assert (found.name, found.count, found.median, found.mean) == ("psnr", 3, 2.0, 2.0)


def test_equal_values_make_one_bar(asking: Callable[..., Ask]) -> None:
    table = latents(ssim=np.ones(10))

    (found,) = metrics(asking(latents=table), table.schema, 10)

    assert found.low < 1.0 < found.high
    assert sorted(found.counts)[-2:] == [0, 10]


def test_a_million_rows_come_back_as_a_few_numbers(asking: Callable[..., Ask]) -> None:
    ask = asking()
    connection_sql = (
        "(SELECT 'k' || i AS sample_key, 'ok' AS status, (i % 1000)::FLOAT AS mse "
        "FROM range(1000000) t(i))"
    )

    def ask_big(sql: str) -> pa.Table:
        return ask(sql.replace("FROM latents", f"FROM {connection_sql}"))

    schema = pa.schema([("sample_key", pa.string()), ("mse", pa.float32())])
    (found,) = metrics(ask_big, schema, 1_000_000)
    (estimated,) = metrics(ask_big, schema, 10_000_000)

    assert (found.count, found.median) == (1_000_000, 499.5)
    assert set(found.counts) == {25_000}
    assert estimated.median == pytest.approx(499.5, abs=2)


def test_best_median_and_worst_are_the_right_samples(asking: Callable[..., Ask]) -> None:
    values = np.random.default_rng(1).permutation(101).astype(np.float32)
    table = latents(mse=values * 0, trunk_distance=values)
    images = pa.table(
        {
            "sample_key": table["sample_key"],
            "inversion": [{"bytes": b"%d" % v, "path": "p"} for v in values],
        }
    )
    ask = asking(latents=table, images=images)
    ranked = ranking_metric(metrics(ask, table.schema, 101))

    assert isinstance(ranked, Metric)
    assert ranked.name == "trunk_distance"
    best, median, worst = pair_groups(ask, {"images": images.schema}, ranked)
    assert [pair.value for pair in best.pairs] == list(range(PAIRS))
    assert [pair.value for pair in worst.pairs] == [100 - i for i in range(PAIRS)]
    assert {pair.value for pair in median.pairs} <= set(range(50 - PAIRS, 51 + PAIRS))
    assert median.pairs[0].value == 50
    assert best.pairs[3].inversion == b"3"
    assert best.pairs[3].original is None


def test_keys_with_quotes_find_their_pictures(asking: Callable[..., Ask]) -> None:
    table = latents(mse=np.array([1.0])).set_column(0, "sample_key", [['it\'s a "key"']])
    images = pa.table({"sample_key": table["sample_key"], "input": [{"bytes": b"x", "path": ""}]})
    ask = asking(latents=table, images=images)

    groups = pair_groups(
        ask, {"images": images.schema}, ranking_metric(metrics(ask, table.schema, 1))
    )

    assert {pair.original for group in groups for pair in group.pairs} == {b"x"}


def test_few_rows_get_few_bins_and_no_picture_twice(asking: Callable[..., Ask]) -> None:
    table = latents(mse=np.arange(6, dtype=np.float32))
    images = pa.table(
        {"sample_key": table["sample_key"], "input": [{"bytes": b"x", "path": ""}] * 6}
    )
    ask = asking(latents=table, images=images)

    (found,) = metrics(ask, table.schema, 6)
    groups = pair_groups(ask, {"images": images.schema}, ranking_metric((found,)))

    assert len(found.counts) == 10
    assert [[pair.value for pair in group.pairs] for group in groups] == [[0, 1], [2, 3], [5, 4]]


def test_failures_come_first_in_order_of_their_keys(asking: Callable[..., Ask]) -> None:
    table = pa.table(
        {
            "sample_key": ["b", "c", "a"],
            "status": ["failed", "ok", "failed"],
            "error_kind": ["decode", None, "align"],
            "error": ["cut off", None, "no face"],
        }
    )

    assert failed_rows(asking(latents=table)) == (
        ("a", "align", "no face"),
        ("b", "decode", "cut off"),
    )
