"""What was predicted of a run, beside what it took."""

from collections.abc import Sequence
from dataclasses import dataclass

from tasks.report.timeline import timeline
from tasks.report.words import duration, size
from tasks.run.ledger import read_markers
from tasks.run.marker import Marker
from tasks.run.prediction import Prediction, read_prediction


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """One figure, in words: "time", "1 h 2 min", "58 min", "-6 %".

    Attributes:
        values: the same in seconds or bytes: {"predicted": 3720.0, "took": 3480.0}.
    """

    name: str
    predicted: str
    took: str
    difference: str
    values: dict[str, float]

    @property
    def both(self) -> str:
        """ "58 min (predicted 1 h 2 min, -6 %)"."""
        return f"{self.took} (predicted {self.predicted}, {self.difference})"


def forecast(run_uri: str, markers: Sequence[Marker] | None = None) -> tuple[Forecast, ...]:
    """Time, disk and memory of a worker; empty where nothing was predicted, or nothing is done.

    Args:
        markers: the run's, where they have been read already.
    """
    said = read_prediction(run_uri)
    done = list(read_markers(run_uri).values()) if said and markers is None else markers
    if said is None or not done:
        return ()
    return compared(said, done)


def compared(said: Prediction, markers: Sequence[Marker]) -> tuple[Forecast, ...]:
    """The same of what was read."""
    taken = sum(part.bytes for marker in markers for part in marker.parts.values())
    memory = max(marker.memory_bytes for marker in markers)
    figures = [
        ("time", duration, said.seconds, timeline(markers).at_work_s),
        ("disk", size, said.bytes, taken),
        ("memory of a worker", size, said.memory_bytes, memory),
    ]
    return tuple(
        Forecast(
            name=name,
            predicted=words(before),
            took=words(after),
            difference=f"{100 * (after / before - 1):+.0f} %",
            values={"predicted": before, "took": after},
        )
        for name, words, before, after in figures
        if before and after
    )
