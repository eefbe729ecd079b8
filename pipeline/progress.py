"""The progress line of a run: a bar on a terminal, a plain line now and then in a log."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn

from pipeline.tally import OnProgress, Snapshot

PLAIN_INTERVAL_S = 10.0


@contextmanager
def progress_line(console: Console) -> Iterator[OnProgress]:
    """A listener that shows snapshots until the block ends."""
    if not console.is_terminal:
        yield _PlainLines(console)
        return
    columns = (
        SpinnerColumn(),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[line]}"),
    )
    with Progress(*columns, console=console, transient=False) as bar:
        task = bar.add_task("shards", total=None, line="starting")

        def show(snapshot: Snapshot) -> None:
            finished = snapshot.shards_done + snapshot.shards_quarantined
            bar.update(
                task, total=snapshot.shards_total, completed=finished, line=describe(snapshot)
            )

        yield show


class _PlainLines:
    def __init__(self, console: Console) -> None:
        self._console, self._shown_at, self._last = console, -PLAIN_INTERVAL_S, ""

    def __call__(self, snapshot: Snapshot) -> None:
        finished = snapshot.shards_done + snapshot.shards_quarantined
        now, line = time.monotonic(), describe(snapshot)
        is_last = finished == snapshot.shards_total
        if line != self._last and (is_last or now - self._shown_at >= PLAIN_INTERVAL_S):
            self._shown_at, self._last = now, line
            self._console.print(line, highlight=False, soft_wrap=True)


def describe(snapshot: Snapshot) -> str:
    """ "12/40 shards, 3072/10240 images, 3 failed, 41.2 images/s, ETA 0:02:54"."""
    images = f"{snapshot.rows_done}"
    if snapshot.rows_total is not None:
        images += f"/{snapshot.rows_total}"
    parts = [
        f"{snapshot.shards_done}/{snapshot.shards_total} shards",
        f"{images} images",
        f"{snapshot.rows_failed} failed",
    ]
    if snapshot.shards_quarantined:
        parts.append(f"{snapshot.shards_quarantined} shards quarantined")
    if snapshot.rows_now:
        parts.append(f"{snapshot.images_per_s:.1f} images/s")
    if snapshot.eta_s:
        parts.append(f"ETA {duration(snapshot.eta_s)}")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """Hours, minutes, seconds: "1:02:03"."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
