"""The runs below a folder, by name; what is not in this table cannot be asked for."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from models.errors import ConfigError, LedgerError, RefineryError
from tasks.browse.pictures import Pictures
from tasks.run import ledger
from tasks.storage.errors import storage_errors
from tasks.storage.files import is_local, join, local_path, open_filesystem

DEPTH = 4
"""Folders below the given one in which runs are looked for."""
Entries = dict[str, dict[str, object]]
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


def find_runs(place: str) -> dict[str, str]:
    """Places of runs by name, relative to `place`; `place` itself may be the only one.

    Symbolic links are not followed, so that nothing outside is found.

    Raises:
        ConfigError: there is none.
        LedgerError: the place cannot be listed.
    """
    place = local_path(place) if is_local(place) else place.rstrip("/")
    found = {
        name or place.rsplit("/", 1)[-1]: join(place, name) if name else place
        for name in _below(place)
    }
    if not found:
        raise ConfigError(
            f"{place}: no run here and none in {DEPTH} levels of folders below; expected a folder "
            "with run.json, as `refinery invert` makes it"
        )
    return found


def _below(place: str) -> Iterator[str]:
    fs, root = open_filesystem(place)
    with storage_errors("list", place, LedgerError):
        walk = fs.walk(root, maxdepth=DEPTH + 1, detail=True)
        for folder, folders, files in cast(Iterator[tuple[str, Entries, Entries]], walk):
            if "run.json" in files:
                yield folder.removeprefix(root).strip("/")
                folders.clear()
            for name in [n for n, info in folders.items() if _is_hidden(n, info)]:
                del folders[name]


def _is_hidden(name: str, info: dict[str, object]) -> bool:
    return name.startswith(".") or bool(info.get("islink"))


def read_card(name: str, run_uri: str) -> Card:
    """What the index says of a run, without reading its rows."""
    try:
        return _card(name, run_uri)
    except RefineryError as error:
        return Card(name=name, problem=str(error))


def _card(name: str, run_uri: str) -> Card:
    record, declared = ledger.read_run(run_uri), ledger.read_declared(run_uri)
    seal, done = ledger.read_seal(run_uri), sorted(ledger.committed(run_uri))
    columns = [c for c in declared.pictures if c != "input"] or list(declared.pictures)
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
        rows=seal["rows"] if seal else None,
        failed=seal["failed"] if seal else None,
        is_sealed=seal is not None,
        front=front,
        column=column,
    )
