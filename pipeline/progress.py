"""Progress lines: a bar on a terminal, a plain line now and then in a log."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Generic, TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn

if TYPE_CHECKING:
    from pipeline.tally import OnProgress, TallySnapshot
    from tasks.adapt.job import AdaptProgress

PLAIN_INTERVAL_S = 10.0


T = TypeVar("T")
Shown = tuple[int, int, str]
"""Done, total, and what the line says."""


def progress_line(console: Console) -> "AbstractContextManager[OnProgress]":
    """A listener that shows snapshots of a run until the block ends."""

    def shown(snapshot: "TallySnapshot") -> Shown:
        finished = snapshot.shards_done + snapshot.shards_quarantined
        return finished, snapshot.shards_total, describe(snapshot)

    return _listening(console, shown)


def adaptation_line(
    console: Console,
) -> AbstractContextManager[Callable[["AdaptProgress"], None]]:
    """A listener that shows the steps of an adaptation until the block ends."""

    def shown(progress: "AdaptProgress") -> Shown:
        scores = ", ".join(
            f"{name} {score:.4g}" for name, score in progress.scores.items() if math.isfinite(score)
        )
        notes = "".join(f"; {name}: {note}" for name, note in progress.notes.items())
        line = f"step {progress.step}/{progress.steps}{f', best {scores}' if scores else ''}{notes}"
        return progress.step, progress.steps, line

    return _listening(console, shown)


@contextmanager
def _listening(console: Console, shown: Callable[[T], Shown]) -> Iterator[Callable[[T], None]]:
    if not console.is_terminal:
        yield _PlainLines(console, shown)
        return
    columns = (
        SpinnerColumn(),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[line]}"),
    )
    with Progress(*columns, console=console, transient=False) as bar:
        task = bar.add_task("work", total=None, line="starting")

        def show(snapshot: T) -> None:
            done, total, line = shown(snapshot)
            bar.update(task, total=total, completed=done, line=line)

        yield show


class _PlainLines(Generic[T]):
    def __init__(self, console: Console, shown: Callable[[T], Shown]) -> None:
        self._console, self._shown, self._at, self._last = console, shown, -PLAIN_INTERVAL_S, ""

    def __call__(self, snapshot: T) -> None:
        done, total, line = self._shown(snapshot)
        now = time.monotonic()
        if line != self._last and (done == total or now - self._at >= PLAIN_INTERVAL_S):
            self._at, self._last = now, line
            self._console.print(line, highlight=False, soft_wrap=True)


def describe(snapshot: "TallySnapshot") -> str:
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
    if computed := sum(shard.rows for shard in snapshot.at_work):
        parts.append(f"{computed} more computed")
    if snapshot.rows_now:
        parts.append(f"{snapshot.images_per_s:.1f} images/s")
    if snapshot.eta_s:
        parts.append(f"ETA {duration(snapshot.eta_s)}")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """Hours, minutes, seconds: "1:02:03"."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
