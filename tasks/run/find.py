"""Runs below a folder."""

import difflib
from contextlib import suppress

from models.errors import LedgerError, RefineryError
from tasks.storage.files import exists, join
from tasks.storage.folders import list_folder

MOST_LEVELS = 5
MOST_TRIED, MOST_NAMED = 20, 4


def find_runs(uri: str) -> dict[str, str]:
    """The run at a place, or all runs below it, by name: the path below `uri`, in order.

    A folder is opened for its run.json alone; a run's own folders are not looked into.

    Raises:
        LedgerError: there is no run here.
    """
    uri = uri.rstrip("/") or "/"
    if exists(join(uri, "run.json")):
        return {uri.rsplit("/", 1)[-1]: uri}
    found: dict[str, str] = {}
    waiting = [(folder, 1) for folder in list_folder(uri, is_whole=True)[0]]
    while waiting:
        name, level = waiting.pop()
        folders, files = list_folder(join(uri, name))
        if "run.json" in files:
            found[name] = join(uri, name)
        elif level < MOST_LEVELS:
            waiting += [(f"{name}/{folder}", level + 1) for folder in folders]
    if not found:
        raise LedgerError(
            f"{uri}: no run here or in a folder below (run.json is missing){meant(uri)}; give "
            "the folder that `refinery invert IN OUT` wrote as OUT, or one above it"
        )
    return dict(sorted(found.items()))


def meant(uri: str) -> str:
    """For a message that there is no run: those right below, else the nearest name beside it."""
    parent, slash, name = uri.rstrip("/").rpartition("/")
    with suppress(RefineryError):  # of the place itself is told, not of those about it
        below = sorted(list_folder(uri)[0])[:MOST_TRIED]
        if found := [name for name in below if exists(join(uri, f"{name}/run.json"))]:
            return f"; below it are the runs {', '.join(found[:MOST_NAMED])}"
        beside = [folder for folder in list_folder(parent or slash or ".")[0] if folder != name]
        if found := difflib.get_close_matches(name, beside, 1, 0.5):
            return f"; did you mean {parent + slash + found[0]}?"
    return ""
