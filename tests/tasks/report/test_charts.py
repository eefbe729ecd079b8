"""Charts: round ticks, readable numbers, and bars that say the counts they were given."""

import xml.etree.ElementTree as ElementTree

import pytest

from tasks.report.charts import Axis, PlotLine, bars, stacked, ticks
from tasks.report.words import counted, duration, number, when


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, ["0", "5", "10"]),
        (0, 1, ["0.0", "0.5", "1.0"]),
        (0.013, 0.081, ["0.02", "0.04", "0.06", "0.08"]),
        (-1, 1, ["-1.0", "-0.5", "0.0", "0.5", "1.0"]),
        (0, 4_000_000, ["0", "1,000,000", "2,000,000", "3,000,000", "4,000,000"]),
        (5, 5, ["5"]),
    ],
)
def test_ticks_are_round_and_inside(low: float, high: float, expected: list[str]) -> None:
    found = ticks(low, high)

    assert [text for _, text in found] == expected
    assert all(low - 1e-9 <= value <= high + 1e-9 for value, _ in found)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0"),
        (1_234_567, "1,234,567"),
        (0.0, "0"),
        (0.012345, "0.0123"),
        (27.814, "27.8"),
        (4321.6, "4,322"),
        (0.000012, "1.20e-05"),
        (float("inf"), "-"),
        (float("nan"), "-"),
    ],
)
def test_number_keeps_what_a_reader_can_use(value: float, expected: str) -> None:
    assert number(value) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.0, "0.00 s"),
        (0.0042, "4.2 ms"),
        (0.42, "0.42 s"),
        (61.26, "61.3 s"),
        (252, "4 min 12 s"),
        (12_000, "3 h 20 min"),
        (200_000, "2 d 7 h"),
    ],
)
def test_duration(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected


def test_words() -> None:
    assert counted(1, "shard") == "1 shard"
    assert counted(2000, "row") == "2,000 rows"
    assert when("2026-11-20T17:56:01.123+00:00") == "2026-11-20 17:56 UTC"


def test_bars_have_the_heights_of_their_counts() -> None:
    html = bars(
        [4, 0, 1],
        Axis(low=0, high=3, label="x <unit>"),
        Axis(low=0, high=4, label="rows"),
        title='a "title"',
        markers=[PlotLine(at=2.7, text="median 2.7")],
    )

    tree = ElementTree.fromstring(html)
    rects = tree.findall(".//rect")
    assert [rect.get("height") for rect in rects] == ["100.00%", "25.00%"]
    assert [rect.get("x") for rect in rects] == ["0.000%", "66.667%"]
    svg = tree.find(".//svg")
    assert svg is not None
    assert svg.get("aria-label") == 'a "title"'
    (line,) = (e for e in tree.findall(".//line") if e.get("class") == "median")
    assert line.get("x1") == "90.00%"
    (text,) = (e for e in tree.findall(".//text") if e.get("class") == "median")
    assert (text.text, text.get("text-anchor")) == ("median 2.7", "end")
    assert [p.text for p in tree.findall("p")] == ["rows", "x <unit>"]


def test_stacked_shares_add_up() -> None:
    tree = ElementTree.fromstring(stacked([("read", 1.0), ("invert", 3.0)], title="t"))

    assert [rect.get("width") for rect in tree] == ["25.000%", "75.000%"]
    assert [rect.get("x") for rect in tree] == ["0.000%", "25.000%"]
