"""Runs as they are browsed: opened once, looked at again when they have grown."""

import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.errors import LedgerError, RefineryError
from tasks.browse.pictures import Pictures
from tasks.browse.runs import Card, browsed, read_card
from tasks.browse.studio import Studio
from tasks.browse.table import Table, read_rows
from tasks.run import ledger, run_json
from tasks.run.marker import Marker
from tasks.run.metadata import read_snapshot
from tasks.storage.files import is_local, local_path

OPEN_RUNS, OPEN_STUDIOS = 4, 2
FRESH_S = 5.0
"""For so long nothing is listed again."""


class UnknownError(RefineryError):
    """Something was asked for that is not in the runs that are browsed."""


@dataclass(frozen=True, kw_only=True)
class BrowsedRun:
    """A run at one moment: its rows and pictures are those of `markers`.

    Attributes:
        version: changes when what pictures' addresses mean could change.
    """

    name: str
    uri: str
    record: dict[str, Any]
    declared: run_json.Declared
    markers: dict[int, Marker]
    is_sealed: bool
    table: Table
    pictures: Pictures

    @property
    def version(self) -> str:
        return f"{self.record['run_id']}.{len(self.markers)}"

    @property
    def failed(self) -> int:
        return sum(marker.failed for marker in self.markers.values())

    def shard_of(self, key: str) -> int:
        """The shard of a sample.

        Raises:
            UnknownError: there is none of that key.
        """
        found = self.table.shard(key)
        if found is None:
            raise UnknownError(f"{self.name} has no sample {key!r}")
        return found


class Library:
    """The runs of a place. Any thread may ask.

    Args:
        place: a run, or a folder with runs below it.

    Raises:
        LedgerError: there is none.
    """

    def __init__(self, place: str) -> None:
        self.place = place
        self._lock = threading.RLock()
        self._found, self._stale_at = browsed(place), time.monotonic() + FRESH_S
        self._open: OrderedDict[str, tuple[BrowsedRun, float]] = OrderedDict()
        self._studios: OrderedDict[str, Studio] = OrderedDict()
        self._cards: dict[str, Card] = {}

    @property
    def is_single(self) -> bool:
        """Whether the place is a run itself."""
        uri = next(iter(self.names().values()), "")
        return uri == (local_path(self.place) if is_local(self.place) else self.place.rstrip("/"))

    def names(self) -> dict[str, str]:
        """Places of the runs by name."""
        with self._lock:
            began = time.monotonic()
            if began > self._stale_at:
                try:
                    self._found = browsed(self.place)
                except LedgerError:  # the last one is gone
                    self._found = {}
                # Where folders hold many files, looking again must not be all that is done.
                took = time.monotonic() - began
                self._stale_at = began + max(FRESH_S, 20 * took)
            return self._found

    def uri(self, name: str) -> str:
        """Where a run lies.

        Raises:
            UnknownError: it is none of these.
        """
        uri = self.names().get(name)
        if uri is None:
            raise UnknownError(f"there is no run {name!r} here")
        return uri

    def cards(self) -> list[Card]:
        """All runs, newest first; those that are sealed are read once."""
        found = []
        for name, uri in self.names().items():
            card = self._cards.get(name) or read_card(name, uri)
            if card.is_sealed:
                self._cards[name] = card
            if card.kind != "index":  # of another run, not one to look at
                found.append(card)
        return sorted(found, key=lambda card: card.created, reverse=True)

    def open(self, name: str) -> BrowsedRun:
        """A run as it is now.

        Raises:
            UnknownError: it is none of these.
            LedgerError: it is damaged.
        """
        uri = self.uri(name)
        with self._lock:
            run, looked_at = self._open.pop(name, (None, 0.0))
            now = time.monotonic()
            is_old = now - looked_at > FRESH_S
            if run is None or (is_old and not run.is_sealed and _has_grown(run)):
                run = _open_run(name, uri)
            self._open[name] = (run, now if is_old else looked_at)
            while len(self._open) > OPEN_RUNS:
                self._open.popitem(last=False)
            return run

    def codes_of(self, run: BrowsedRun) -> BrowsedRun:
        """The run that holds the codes of a run's samples: itself, or the one it was made from.

        Raises:
            UnknownError: that one is not among these.
        """
        if run.declared.stores_doors:
            return run
        wanted = run.record["config"].get("source_run")
        for name, uri in self.names().items():
            try:
                is_source = run_json.read_run(uri)["run_id"] == wanted
            except RefineryError:
                continue
            if is_source:
                return self.open(name)
        raise UnknownError(
            f"{run.name} has no codes of its own, and the run it was made from "
            f"({run.record['config'].get('source')}) is not below {self.place}"
        )

    def studio(self, run: BrowsedRun) -> Studio:
        """What renders the samples of a run that stores codes.

        Raises:
            AssetError: its generator is missing or another one.
        """
        with self._lock:
            studio = self._studios.pop(run.uri, None) or Studio(run.uri, self._folders(run))
            self._studios[run.uri] = studio
            while len(self._studios) > OPEN_STUDIOS:
                self._studios.popitem(last=False)
            return studio

    def _folders(self, run: BrowsedRun) -> list[str | Path]:
        """Where directions and domains lie beside what ships: here, and beside the run."""
        beside = [Path(local_path(run.uri)).parent] if is_local(run.uri) else []
        return [".", *beside]


def _open_run(name: str, uri: str) -> BrowsedRun:
    snapshot = read_snapshot(uri)
    return BrowsedRun(
        name=name,
        uri=uri,
        record=snapshot.record,
        declared=snapshot.declared,
        markers=snapshot.markers,
        is_sealed=snapshot.is_sealed,
        table=Table(read_rows(snapshot)),
        pictures=Pictures(uri, snapshot.markers),
    )


def _has_grown(run: BrowsedRun) -> bool:
    is_sealed = ledger.read_seal(run.uri) is not None
    return is_sealed or ledger.committed(run.uri) != run.markers.keys()
