"""The runs below a folder, by name; what is not in this table cannot be asked for."""

from dataclasses import dataclass
from pathlib import Path

from models.errors import RefineryError
from tasks.browse.pictures import Pictures
from tasks.job import INPUTS
from tasks.run import ledger, run_json
from tasks.run.find import find_runs
from tasks.storage.files import is_local, local_path

STRIP = 6
"""Pictures on the card of a run."""


@dataclass(frozen=True, kw_only=True)
class Card:
    """A run as the index shows it.

    Attributes:
        done, planned: shards.
        rows, failed: None while the run is at work.
        front: (shard, key) of its first pictures, and the column that is shown of them.
        problem: why the run cannot be opened; the rest is empty then.
    """

    name: str
    kind: str = ""
    method: str = ""
    created: str = ""
    done: int = 0
    planned: int = 0
    rows: int | None = None
    failed: int | None = None
    is_sealed: bool = False
    front: tuple[tuple[int, str], ...] = ()
    column: str = ""
    problem: str = ""


def browsed(place: str) -> dict[str, str]:
    """Places of runs by name, relative to `place`, which may be a run itself.

    A run behind a symbolic link that leads out of the place is none of them.

    Raises:
        LedgerError: there is none, or the place cannot be listed.
    """
    found = find_runs(place)
    if not is_local(place):
        return found
    inside = Path(local_path(place)).resolve()
    return {
        name: uri
        for name, uri in found.items()
        if Path(local_path(uri)).resolve().is_relative_to(inside)
    }


def read_card(name: str, run_uri: str) -> Card:
    """What the index says of a run, without reading its rows."""
    try:
        return _card(name, run_uri)
    except RefineryError as error:
        return Card(name=name, problem=str(error))


def _card(name: str, run_uri: str) -> Card:
    record, declared = run_json.read_run(run_uri), run_json.read_declared(run_uri)
    seal, done = ledger.read_seal(run_uri), sorted(ledger.committed(run_uri))
    columns = [c for c in declared.pictures if c not in INPUTS] or list(declared.pictures)
    column = columns[0] if columns else ""
    front: tuple[tuple[int, str], ...] = ()
    if column and done:
        marker = ledger.read_marker(run_uri, done[0])
        if marker is not None:
            keys = Pictures(run_uri, {done[0]: marker}).first_keys(done[0], STRIP)
            front = tuple((done[0], key) for key in keys)
    return Card(
        name=name,
        kind=declared.kind,
        method=declared.method,
        created=record["created_at"],
        done=len(done),
        planned=record["num_shards"],
        rows=seal.get("rows") if seal else None,
        failed=seal.get("failed") if seal else None,
        is_sealed=seal is not None,
        front=front,
        column=column,
    )
