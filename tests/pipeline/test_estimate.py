"""How long workers are busy with shards of some sizes."""

import pytest

from pipeline.estimate import MANY, busiest


@pytest.mark.parametrize(
    ("sizes", "workers", "in_flight", "expected"),
    [
        ([256, 256, 88], 1, 1, 600),
        ([100] * 4, 2, 1, 200),
        ([100] * 3, 2, 1, 200),  # one worker waits for the other at the end
        ([256, 256, 88], 2, 2, 512),  # the first worker takes two at once
        ([30, 10, 20, 40], 2, 2, 60),  # 10 and 30 share a worker, 20 and 40 another
        ([30, 10, 20, 40, 10], 2, 2, 60),  # the one with 10 is free of it after 20
        ([0, 0], 2, 2, 0),
        ([], 1, 1, 0),
        ([100.0] * (2 * MANY + 1), 2, 1, 50 * (2 * MANY + 1)),
    ],
)
def test_busiest(sizes: list[float], workers: int, in_flight: int, expected: float) -> None:
    assert busiest(sizes, workers, in_flight) == pytest.approx(expected)
