"""Busy seconds by stage, for commit markers. Stages of one attempt overlap, in threads."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Lock
from time import perf_counter


class Stopwatch:
    """Adds up the time spent in each stage: `with watch("read"): ...`."""

    def __init__(self, stages: Sequence[str]) -> None:
        self._seconds = dict.fromkeys(stages, 0.0)
        self._started, self._lock = perf_counter(), Lock()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        started = perf_counter()
        yield
        self.add({stage: perf_counter() - started})

    def add(self, seconds: Mapping[str, float]) -> None:
        """Add times that were measured elsewhere."""
        with self._lock:
            for stage, value in seconds.items():
                self._seconds[stage] += value

    @property
    def seconds(self) -> dict[str, float]:
        """By stage, rounded to microseconds."""
        return {stage: round(value, 6) for stage, value in self._seconds.items()}

    @property
    def wall_s(self) -> float:
        """Since the stopwatch was made."""
        return round(perf_counter() - self._started, 6)
