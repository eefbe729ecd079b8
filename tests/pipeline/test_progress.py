"""The progress line and where its numbers come from."""

import io

from rich.console import Console

from pipeline.progress import describe, duration, progress_line
from pipeline.schedule import Schedule
from pipeline.tally import Tally, TallySnapshot
from pipeline.worker import ShardResult


def snapshot(**changes: object) -> TallySnapshot:
    values = {
        "shards_total": 40,
        "shards_done": 12,
        "shards_quarantined": 0,
        "rows_total": 10240,
        "rows_done": 3072,
        "rows_failed": 3,
        "rows_now": 2048,
        "seconds": 50.0,
    }
    return TallySnapshot(**{**values, **changes})  # type: ignore[arg-type]


def test_pace_and_eta() -> None:
    found = snapshot()
    assert found.images_per_s == 40.96
    assert found.eta_s == (10240 - 3072) / 40.96
    # Nothing counted beforehand (tars): rows a shard so far, times the shards left.
    assert snapshot(rows_total=None, shards_quarantined=4).eta_s == 24 * 256 / 40.96
    assert snapshot(rows_now=0).eta_s is None


def test_the_line() -> None:
    assert describe(snapshot()) == (
        "12/40 shards, 3072/10240 images, 3 failed, 41.0 images/s, ETA 0:02:55"
    )
    assert describe(snapshot(rows_total=None, rows_now=0, shards_quarantined=2)) == (
        "12/40 shards, 3072 images, 3 failed, 2 shards quarantined"
    )
    assert duration(3723.4) == "1:02:03"


def test_plain_lines_in_a_log() -> None:
    stream = io.StringIO()
    with progress_line(Console(file=stream, width=200)) as on_progress:
        on_progress(snapshot(shards_done=1))
        on_progress(snapshot(shards_done=2))  # too soon for another line
        on_progress(snapshot(shards_done=40, rows_done=10240))
        on_progress(snapshot(shards_done=40, rows_done=10240))
    first, last = stream.getvalue().splitlines()
    assert first.startswith("1/40 shards")
    assert last.startswith("40/40 shards, 10240/10240 images")


def test_a_bar_on_a_terminal() -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=200, force_terminal=True)
    with progress_line(console) as on_progress:
        on_progress(snapshot())
    assert "12/40 shards, 3072/10240 images" in stream.getvalue()
    assert "30%" in stream.getvalue()


def test_a_tally_goes_on_from_earlier_commits() -> None:
    seen: list[TallySnapshot] = []
    tally = Tally(
        schedule=Schedule([7, 8], max_attempts=1, retry_wait_s=0, patience_s=1),
        quarantine=lambda shard, reason, attempts: None,
        shards_total=9,
        rows_total=90,
        shards_done=7,
        rows_done=70,
        rows_failed=2,
        on_progress=seen.append,
    )
    assert tally.seconds == 0.0
    tally.begin()
    tally.book(ShardResult(shard=7, rows=10, failed=1))
    tally.book(ShardResult(shard=8, error="corrupt"))
    last = seen[-1]
    assert (last.shards_done, last.shards_quarantined) == (8, 1)
    assert (last.rows_done, last.rows_failed, last.rows_now) == (80, 3, 10)
    assert tally.quarantined == {8: "corrupt"}
