"""The shard ledger: which shards of a run are done, which gave up.

    run.json              which work the run is (`tasks.run.run_json`)
    commits/00042.json    the commit of shard 42 (`tasks.run.marker`): readers see only parts it
                          names; 00042.1.json, 00042.2.json, ... supersede it
    failed/00042.json     shard 42 was given up, with the reason; a later commit supersedes it
    _SEALED.json          every shard is committed or given up; lists all parts

The protocol, for any number of attempts, drivers and clean-ups at once, on clocks that disagree:

1. An attempt takes the first generation of its shard that is free (`open_shard`), writes its parts
   under names that hold this generation and that nobody else uses, and last its marker.
2. A file in commits/ is created, never replaced and never deleted. So of all attempts at one
   generation the first to create the marker is the commit; the others read it and are done.
3. The highest generation counts. A commit whose marker or parts are damaged is no commit: the shard
   is pending, and the next attempt takes the next generation.
4. A file is removed only when no marker can come to name it: because a marker of its generation is
   there and names others, or because the clean-up itself has taken the place (`Closed`). An
   attempt that finds its place closed ends, and is tried again in the next generation.

Time decides nothing but courtesy: what is closed is left alone for a day first, so that attempts at
work are not sent back. tests/tasks/run/test_protocol.py walks through all interleavings.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from types import MappingProxyType

from pydantic import TypeAdapter

from models.errors import LedgerError, ShardError
from tasks.run.marker import Closed, Covered, Marker
from tasks.run.records import (
    SEAL,
    Count,
    DamagedError,
    Moment,
    NewerError,
    Seal,
    ShardId,
    parse,
    to_json,
)
from tasks.run.run_json import read_run, utc_now
from tasks.storage.files import (
    exists,
    file_info,
    find_bytes,
    join,
    list_files,
    list_times,
    remove,
    write_bytes,
)
from tasks.storage.once import create_bytes, creates_once

logger = logging.getLogger(__name__)

TABLE_KINDS = ("latents", "images", "residuals")
"""Parts in Parquet, which SQL sees."""
PART_KINDS = (*TABLE_KINDS, "vectors", "exact")
ORPHAN_AGE_S = 86_400.0
"""Attempts that are older are taken for dead."""
_READERS = 16  # markers are fetched by so many threads: a GET is mostly waiting
_PLACE = re.compile(r"(\d{5,})(?:\.(\d+))?\.json")
_PART = re.compile(r"\.?(\d{5,})(?:\.(\d+))?-.+")


@dataclass(frozen=True, kw_only=True)
class Quarantined:
    """A shard that was given up.

    Attributes:
        attempts: how often it was tried.
        at: UTC, ISO 8601.
    """

    shard: ShardId
    reason: str
    attempts: Count
    run_id: str
    at: Moment


_QUARANTINED = TypeAdapter(Quarantined)


def shard_name(shard: int, generation: int = 0) -> str:
    """How a shard is written in file names: 42 -> "00042", in its next generation "00042.1"."""
    return f"{shard:05d}.{generation}" if generation else f"{shard:05d}"


# ---------------------------------------------------------------------------- commits


@dataclass(frozen=True)
class Commits:
    """What stands in commits/, by shard.

    Attributes:
        markers: the commits that count, in order of shards.
        covered: shards whose rows stand in another's parts, and which one's (`tasks.run.compact`).
        damaged: shards whose commit is no good, and why: its marker or a part that it names.
        counted: the generation that these are of: the last of its shard that is not closed.
        last: the last generation of each shard that has any.
    """

    markers: dict[int, Marker] = field(default_factory=dict)
    covered: dict[int, int] = field(default_factory=dict)
    damaged: dict[int, DamagedError] = field(default_factory=dict)
    counted: dict[int, int] = field(default_factory=dict)
    last: dict[int, int] = field(default_factory=dict)

    @property
    def compacted(self) -> set[int]:
        """Shards that are covered, and those that cover them."""
        return {*self.covered, *self.covered.values()}

    def has(self, shard: int) -> bool:
        """Whether the shard is committed."""
        return shard in self.markers or shard in self.covered

    def refuse_newer(self) -> None:
        """For those who would do damaged shards again.

        Raises:
            NewerError: one of them was committed by a later version of this program.
        """
        for error in self.damaged.values():
            if isinstance(error, NewerError):
                raise error


def place_of(name: str) -> tuple[int, int] | None:
    """Shard and generation of a file in commits/."""
    match = _PLACE.fullmatch(name)
    return (int(match[1]), int(match[2] or 0)) if match else None


def read_commits(
    run_uri: str,
    *,
    with_parts: bool = False,
    names: Iterable[str] | None = None,
    known: Mapping[int, tuple[int, Marker]] = MappingProxyType({}),
) -> Commits:
    """All commits: one listing, and one GET of about 1 KB for each shard.

    Args:
        with_parts: see by a listing of each of their folders that all parts are there.
        names: of the files in commits/, where they are listed already.
        known: generation and commit of shards that need not be read again.
    """
    found = Commits()
    if names is None:
        names = (name for name, _, _ in list_files(join(run_uri, "commits"), LedgerError))
    for shard, generation in filter(None, map(place_of, names)):
        found.last[shard] = max(generation, found.last.get(shard, 0))
    shards = sorted(found.last)

    def counted(shard: int) -> tuple[int, Marker | DamagedError | None]:
        return known.get(shard) or _counted(run_uri, shard, found.last[shard])

    with ThreadPoolExecutor(_READERS) as pool:
        for shard, (generation, place) in zip(shards, pool.map(counted, shards), strict=True):
            if place is None:
                continue
            found.counted[shard] = generation
            if isinstance(place, Marker):
                found.markers[shard] = place
            else:
                found.damaged[shard] = place
    lost = _lost_parts(run_uri, found.markers) if with_parts and found.markers else {}
    _resolve(found, lost)
    return found


def _counted(run_uri: str, shard: int, last: int) -> tuple[int, Marker | DamagedError | None]:
    """The highest generation that is not closed, and what is there; None where all are."""
    for generation in range(last, -1, -1):
        try:
            place = _read_place(run_uri, shard, generation)
        except DamagedError as error:
            return generation, error
        if isinstance(place, Marker):
            return generation, place
    return 0, None


def _read_place(run_uri: str, shard: int, generation: int) -> Marker | Closed | None:
    uri = _place(run_uri, shard, generation)
    data = find_bytes(uri)
    place = None if data is None else Marker.from_json(data, uri)
    if place is not None and place.shard != shard:
        raise _damaged(uri, f"damaged (it is of shard {shard_name(place.shard)})")
    return place


def _place(run_uri: str, shard: int, generation: int) -> str:
    return join(run_uri, "commits", f"{shard_name(shard, generation)}.json")


def _lost_parts(run_uri: str, markers: Mapping[int, Marker]) -> dict[int, DamagedError]:
    """Shards with a part that is missing or of another size than its marker says, and why."""
    kinds = {kind for marker in markers.values() for kind in marker.parts}
    sizes = {
        f"{kind}/{name}": size
        for kind in kinds
        for name, size, _ in list_files(join(run_uri, kind), LedgerError)
    }
    lost: dict[int, DamagedError] = {}
    for shard, marker in markers.items():
        for part in marker.parts.values():
            size = sizes.get(part.path)
            if size != part.bytes:
                state = "missing" if size is None else f"of {size} bytes, not {part.bytes}"
                lost[shard] = _damaged(join(run_uri, part.path), state)
    return lost


def _resolve(found: Commits, lost: Mapping[int, DamagedError]) -> None:
    """Leave out what is covered by a whole commit, and what is lost."""
    for shard, marker in found.markers.items():
        others = [covered for covered in marker.covers if covered.shard != shard]
        if shard not in lost and all(_is_current(found, covered) for covered in others):
            found.covered.update({covered.shard: shard for covered in others})
        elif others and shard not in lost:
            name = f"commits/{shard_name(shard, found.counted[shard])}.json"
            lost = {**lost, shard: _damaged(name, "a shard that it covers was done again")}
    for shard in found.covered:
        found.markers.pop(shard, None)
        found.damaged.pop(shard, None)
    for shard, error in lost.items():
        if found.markers.pop(shard, None) is not None:
            found.damaged[shard] = error


def _is_current(found: Commits, covered: Covered) -> bool:
    """Whether the shard was not done again since it was covered."""
    return found.counted.get(covered.shard, -1) == covered.generation


def _damaged(what: str, how: str) -> DamagedError:
    return DamagedError(f"{what}: {how}; run the run's command again, which redoes its shard")


def open_shard(run_uri: str, shard: int) -> tuple[int, Marker | None]:
    """The generation in which an attempt at a shard may commit, and the commit that is there, which
    needs no attempt. One GET where the shard is fresh.

    Raises:
        NewerError: a later version of this program has committed it.
    """
    free, found = _climb(run_uri, shard)
    if isinstance(found, NewerError):
        raise found
    if not isinstance(found, Marker) or is_whole(run_uri, found):
        return free, found if isinstance(found, Marker) else None
    # Its parts are gone: lost, or covered by another shard's and collected.
    commits = read_commits(run_uri, with_parts=True)
    return free, commits.markers.get(commits.covered.get(shard, -1))


def read_marker(run_uri: str, shard: int) -> Marker | None:
    """The last commit of one shard, or None: a GET for each generation, and one that finds no
    further.

    Raises:
        DamagedError: it is no good.
    """
    _, found = _climb(run_uri, shard)
    if isinstance(found, DamagedError):
        raise found
    return found


def read_generations(run_uri: str, shard: int) -> Iterator[Marker]:
    """All commits of one shard, the first one first; a GET for each that is asked for.

    Raises:
        DamagedError: one of them is no good.
    """
    generation = 0
    while (place := _read_place(run_uri, shard, generation)) is not None:
        if isinstance(place, Marker):
            yield place
        generation += 1


def _climb(run_uri: str, shard: int) -> tuple[int, Marker | DamagedError | None]:
    """The first generation that is free, and what counts below it."""
    generation, found = 0, None
    while True:
        try:
            place = _read_place(run_uri, shard, generation)
        except DamagedError as error:
            place = error
        if place is None:
            return generation, found
        if not isinstance(place, Closed):
            found = place
        generation += 1


def is_whole(run_uri: str, marker: Marker) -> bool:
    """Whether all parts of a commit are there, in their size."""
    infos = ((part, file_info(join(run_uri, part.path))) for part in marker.parts.values())
    return all(info is not None and info[0] == part.bytes for part, info in infos)


def write_marker(run_uri: str, marker: Marker, generation: int = 0) -> Marker:
    """Commit: from here on readers see the parts that the marker names.

    Returns:
        The commit of this generation: another attempt's, where that was faster.

    Raises:
        ShardError: the place is closed; another try takes the next one.
    """
    uri = _place(run_uri, marker.shard, generation)
    if marker.wall_s > ORPHAN_AGE_S / 2 and not creates_once(uri):
        raise ShardError(
            f"shard {shard_name(marker.shard)}: this attempt took {marker.wall_s:.0f} s, so that "
            "its files may be removed while it commits (the server ignores If-None-Match); it is "
            "tried again"
        )
    if create_bytes(uri, marker.to_json()):
        return marker
    first = _read_place(run_uri, marker.shard, generation)
    if isinstance(first, Marker):
        return first
    raise ShardError(
        f"shard {shard_name(marker.shard)}: this attempt came so late that it was taken for dead, "
        f"and what it wrote was removed ({uri} is closed); it is tried again"
    )


def committed(run_uri: str) -> set[int]:
    """Ids of the shards that have a commit."""
    found = read_commits(run_uri)
    return {*found.markers, *found.covered}


def read_markers(
    run_uri: str,
    *,
    names: Iterable[str] | None = None,
    known: Mapping[int, tuple[int, Marker]] = MappingProxyType({}),
) -> dict[int, Marker]:
    """The commits by shard, in order of shards; those that are damaged are left out with a
    warning. About 1 KB a shard: a run of a million samples has a few thousand. Arguments are those
    of `read_commits`."""
    found = read_commits(run_uri, names=names, known=known)
    for error in found.damaged.values():
        logger.warning("left out: %s", error)
    return found.markers


def pending(run_uri: str) -> list[int]:
    """Shards of the manifest without a commit whose parts are all there, in order; those given up
    before are among them, so that running again retries them.

    Raises:
        NewerError: a later version of this program has worked here.
    """
    found = read_commits(run_uri, with_parts=True)
    found.refuse_newer()
    return [i for i in range(read_run(run_uri)["num_shards"]) if not found.has(i)]


# ---------------------------------------------------------------------------- giving up


def quarantine(run_uri: str, shard_id: int, reason: str, *, attempts: int = 1) -> None:
    """Record that a shard was given up; the run goes on without it."""
    record = Quarantined(
        shard=shard_id,
        reason=reason,
        attempts=attempts,
        run_id=read_run(run_uri)["run_id"],
        at=utc_now(),
    )
    uri = join(run_uri, "failed", f"{shard_name(shard_id)}.json")
    write_bytes(uri, to_json(record))


def read_quarantine(run_uri: str, commits: Commits | None = None) -> dict[int, Quarantined]:
    """Shards that were given up and not committed since, in order; where the file about it is
    damaged, that is the reason.

    Args:
        commits: of the run, where they have been read already.
    """
    folder = join(run_uri, "failed")
    names = [name for name, _, _ in list_files(folder, LedgerError)]
    given_up = sorted(int(match[1]) for name in names if (match := _PLACE.fullmatch(name)))
    done = commits or (read_commits(run_uri) if given_up else Commits())
    advice = "delete this file and run again, which retries its shard"
    found: dict[int, Quarantined] = {}
    for shard in given_up:
        uri = join(folder, f"{shard_name(shard)}.json")
        data = None if done.has(shard) else find_bytes(uri)
        if data is None:
            continue
        try:
            found[shard] = parse(_QUARANTINED, data, uri, newest=1, advice=advice)
        except DamagedError as error:
            found[shard] = Quarantined(shard=shard, reason=str(error), attempts=0, run_id="", at="")
    return found


# ---------------------------------------------------------------------------- the end of a run


def seal(run_uri: str, forecast: Mapping[str, Mapping[str, float]] | None = None) -> str:
    """Write _SEALED.json: the run is over, these are all its parts. Sealing again replaces it.

    Args:
        forecast: what was predicted and what it took, by name, where anything was.

    Returns:
        The URI of _SEALED.json.

    Raises:
        LedgerError: a shard is neither committed nor given up.
    """
    record, commits = read_run(run_uri), read_commits(run_uri, with_parts=True)
    commits.refuse_newer()
    markers, given_up = commits.markers, read_quarantine(run_uri, commits)
    shards = range(record["num_shards"])
    waiting = [i for i in shards if not commits.has(i) and i not in given_up]
    if waiting:
        raise LedgerError(
            f"{run_uri}: cannot seal, {len(waiting)} of {record['num_shards']} shards are neither "
            f"committed nor given up (first: {shard_name(waiting[0])}); run its command again"
        )
    sealed = {
        "run_id": record["run_id"],
        "num_shards": record["num_shards"],
        "rows": sum(marker.rows for marker in markers.values()),
        "failed": sum(marker.failed for marker in markers.values()),
        "quarantined": sorted(given_up),
        "parts": [
            {"shard": shard, "kind": kind, **asdict(part)}
            for shard, marker in markers.items()
            for kind, part in sorted(marker.parts.items())
        ],
        "sealed_at": utc_now(),
        **({"forecast": forecast} if forecast else {}),
    }
    uri = join(run_uri, "_SEALED.json")
    write_bytes(uri, to_json(sealed))
    return uri


def is_sealed(run_uri: str) -> bool:
    """Whether _SEALED.json is there, damaged or not."""
    return exists(join(run_uri, "_SEALED.json"))


def read_seal(run_uri: str) -> Seal | None:
    """_SEALED.json, or None while the run is open.

    Raises:
        DamagedError: it is no good.
    """
    uri = join(run_uri, "_SEALED.json")
    data = find_bytes(uri)
    advice = "run the run's command again, which seals it anew"
    return None if data is None else parse(SEAL, data, uri, newest=1, advice=advice)


def read_finished(run_uri: str) -> Commits:
    """All commits of a run that is to be worked on as a whole.

    Raises:
        LedgerError: it is not sealed, or a commit is damaged.
    """
    if read_seal(run_uri) is None:
        raise LedgerError(
            f"{run_uri}: the run is not finished, so its samples may still change; run its command "
            "again, which finishes it"
        )
    commits = read_commits(run_uri, with_parts=True)
    for error in commits.damaged.values():
        raise error
    return commits


def remove_orphans(run_uri: str, older_than_s: float = ORPHAN_AGE_S) -> list[str]:
    """Delete files in the part folders that no marker names nor will: what attempts left behind
    that were killed or came second. It may run at any time, beside attempts at work.

    Args:
        older_than_s: a file whose attempt could still commit stays for so long, seconds by the
            store's clock; so does what a later generation has superseded, for who is reading it.

    Returns:
        The removed paths, relative to the run.
    """
    files = {
        f"{kind}/{name}": written
        for kind in PART_KINDS
        for name, _, written in list_times(join(run_uri, kind))
    }
    places = {name: written for name, _, written in list_times(join(run_uri, "commits"))}
    beats = [written for _, _, written in list_times(join(run_uri, "drivers"))]
    now = max([*files.values(), *places.values(), *beats], default=0.0)
    commits = read_commits(run_uri, with_parts=True)
    named = {part.path for marker in commits.markers.values() for part in marker.parts.values()}
    named |= _sealed_paths(run_uri)
    orphans = {path: written for path, written in files.items() if path not in named}
    can_close = not orphans or creates_once(join(run_uri, "commits", "any"))
    if not can_close:  # an attempt may replace a commit: only time tells that it is dead
        older_than_s = max(older_than_s, ORPHAN_AGE_S)

    def is_over(path: str, written: float) -> bool:
        match = _PART.fullmatch(path.partition("/")[2])
        if match is None:
            return False
        shard, generation = int(match[1]), int(match[2] or 0)
        counted, is_old = commits.counted.get(shard, -1), now - written >= older_than_s
        if generation > commits.last.get(
            shard, -1
        ):  # it may still be committed, until it is closed
            return is_old and (not can_close or _close(run_uri, shard, generation))
        if generation <= counted and shard in commits.damaged:
            return False  # what is lost may be restored, and need it
        over = commits.covered.get(shard, shard)
        if over != shard or generation < counted:  # somebody may be reading it
            by = f"{shard_name(over, commits.counted[over])}.json"
            return now - places.get(by, now) >= older_than_s
        return can_close or is_old  # it came second

    removed = [path for path, written in orphans.items() if is_over(path, written)]
    remove([join(run_uri, path) for path in removed])
    if removed:
        logger.info("removed %d files of unfinished attempts from %s", len(removed), run_uri)
    return removed


def _sealed_paths(run_uri: str) -> set[str]:
    """What the seal names stays until it is sealed anew."""
    try:
        seal = read_seal(run_uri)
    except DamagedError:
        return set()
    return {part["path"] for part in seal["parts"]} if seal else set()


def _close(run_uri: str, shard: int, generation: int) -> bool:
    """Take the place of a marker, so that none can come; False where one was faster."""
    reason = "its attempts were taken for dead and their files removed"
    run_id = read_run(run_uri)["run_id"]
    place = Closed(shard=shard, run_id=run_id, closed=reason, at=utc_now())
    if create_bytes(_place(run_uri, shard, generation), place.to_json()):
        return True
    try:
        return isinstance(_read_place(run_uri, shard, generation), Closed)
    except DamagedError:
        return False
