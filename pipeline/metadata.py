"""Metadata of a run at work: put into files by the driver, beside its work."""

import logging
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from models.errors import RefineryError
from pipeline.tally import OnProgress, TallySnapshot
from tasks.run.metadata import EVERY, refresh_metadata

logger = logging.getLogger(__name__)


@contextmanager
def metadata_kept(run_uri: str, on_progress: OnProgress) -> Iterator[OnProgress]:
    """A listener that hands on, and after every `EVERY` commits refreshes the run's metadata."""
    with ThreadPoolExecutor(1, "metadata") as pool:
        written, running = 0, None

        def listen(snapshot: TallySnapshot) -> None:
            nonlocal written, running
            on_progress(snapshot)
            is_free = running is None or running.done()
            if is_free and snapshot.shards_done - written >= EVERY:
                written, running = snapshot.shards_done, pool.submit(_refresh, run_uri)

        running: Future[None] | None
        yield listen


def _refresh(run_uri: str) -> None:
    try:
        refresh_metadata(run_uri)
    except RefineryError as error:  # answers do not need it
        logger.warning("%s: its metadata are not up to date: %s", run_uri, error)
