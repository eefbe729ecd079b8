"""The commit protocol under all interleavings: no committed row is lost, no shard is there twice,
and running again heals. The programs are the real ones; the store is `interleavings`'s."""

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from models.errors import LedgerError
from tasks.job import ShardSpec
from tasks.run import compact, ledger
from tasks.run.marker import Marker, Part
from tasks.run.run_json import RunHandle
from tasks.storage import files, once
from tasks.work import attempt
from tasks.work.shard import do_shard
from tests.tasks.run import interleavings
from tests.tasks.run.interleavings import Checker, Contents, State, apply, freeze, mounted

URI = "memory://run"
RUN = RunHandle(uri=URI, run_id="0" * 16)
SPEC = ShardSpec(id=0, kind="files", uri="memory://in", members=("a",), num_samples=1)
RUN_JSON = {
    "run_id": "0" * 16,
    "config": {},
    "manifest": "m",
    "weights": {},
    "num_shards": 1,
    "code_version": "1",
}
START = {"/run/run.json": json.dumps(RUN_JSON).encode()}


class Serial:
    """In place of threads, whose order would differ from replay to replay."""

    def __init__(self, *_: Any) -> None: ...

    def __enter__(self) -> "Serial":
        return self

    def __exit__(self, *_: Any) -> None: ...

    map = staticmethod(map)


class Clock:
    """A stopwatch that stands still."""

    seconds: dict[str, float] = {}
    wall_s = 0.0

    def __call__(self, stage: str) -> Any:
        return nullcontext()


class Station:
    """No pictures: what the attempt stores is in `write_parts`."""

    stages, layout, device = ("write",), SimpleNamespace(pictures=()), torch.device("cpu")

    def read(self, *_: Any) -> Iterator[Any]:
        return iter(())


class Named:
    """Names of attempts: the program's."""

    hex = ""

    @staticmethod
    def uuid4() -> "type[Named]":
        return Named


def write_parts(
    rows: Any, layout: Any, run: RunHandle, shard: int, name: str, generation: int
) -> dict[str, Part]:
    path = f"latents/{ledger.shard_name(shard, generation)}-{name}.parquet"
    files.write_bytes(files.join(run.uri, path), name.encode())
    return {"latents": Part(path=path, rows=1, bytes=len(name), sha256="0" * 64)}


@pytest.fixture(autouse=True)
def _deterministic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "open_filesystem", interleavings.open_filesystem)
    monkeypatch.setattr(once, "open_filesystem", interleavings.open_filesystem)
    monkeypatch.setattr(ledger, "ThreadPoolExecutor", Serial)
    monkeypatch.setattr(ledger, "PART_KINDS", ("latents",))
    for module in (ledger, attempt):
        monkeypatch.setattr(module, "utc_now", lambda: "2026-01-01T00:00:00+00:00")
    for module in (attempt, compact):
        monkeypatch.setattr(module, "uuid", Named)
    monkeypatch.setattr(compact, "_joined", lambda *_: (b"rows of both", 2))
    monkeypatch.setattr(compact, "TABLE_KINDS", ("latents",))
    monkeypatch.setattr(attempt, "Stopwatch", lambda _: Clock())
    monkeypatch.setattr(attempt, "write_parts", write_parts)


# ---------------------------------------------------------------------------- programs


def work(shard: int = 0) -> Any:
    """An attempt, on a worker."""
    return do_shard(replace(SPEC, id=shard), RUN, Station())  # type: ignore[arg-type]


def drive() -> None:
    """A driver with its worker: what is pending, seal, clean up. No age protects anything."""
    for shard in ledger.pending(URI):
        work(shard)
    ledger.seal(URI)
    ledger.remove_orphans(URI, older_than_s=0)


def give_up() -> None:
    """A driver that takes the worker for dead."""
    ledger.quarantine(URI, 0, "its worker does not answer")
    ledger.seal(URI)
    ledger.remove_orphans(URI, older_than_s=0)


def collect() -> None:
    ledger.remove_orphans(URI, older_than_s=0)


def shrink() -> None:
    """A compaction, and its clean-up."""
    compact.compact(URI)
    ledger.seal(URI)
    ledger.remove_orphans(URI, older_than_s=0)


# ---------------------------------------------------------------------------- what must hold


class Law:
    """What must hold of every state, by what the real code reads from its store."""

    def __init__(self, again: Callable[[], None] = drive) -> None:
        self._again = again
        self._commits: dict[Contents, set[int]] = {}
        self._heals: dict[Contents, bool] = {}

    def broken(self, before: State, after: State) -> str:
        """The sentence that a step breaks, or nothing."""
        if not self.committed(before.store) <= self.committed(after.store):
            return "a committed row was lost"
        if after.store not in self._heals:
            self._heals[after.store] = self._is_healed(after.store)
        return "" if self._heals[after.store] else "running again does not heal"

    def committed(self, store: Contents) -> set[int]:
        """Shards whose rows a reader can read; each has one marker by construction."""
        if store not in self._commits:
            with live(dict(store)):
                found = ledger.read_commits(URI, with_parts=True)
                self._commits[store] = {*found.markers, *found.covered}
        return self._commits[store]

    def _is_healed(self, store: Contents) -> bool:
        contents = dict(store)
        Named.hex = "again"
        with live(contents):
            try:
                self._again()
            except LedgerError:
                return False
            seal = ledger.read_seal(URI)
            assert seal is not None
            is_whole = all(f"/run/{part['path']}" in contents for part in seal["parts"])
        shards = range(json.loads(contents["/run/run.json"])["num_shards"])
        return is_whole and self.committed(freeze(contents)) == {*shards}


def live(contents: dict[str, bytes]) -> mounted:
    """The store itself, without a checker."""
    return mounted(lambda op: apply(contents, op))


def check(
    programs: dict[str, Callable[[], Any]],
    law: Law,
    faults: int = 1,
    start: dict[str, bytes] = START,
) -> tuple[str, int]:
    """The first sentence that is broken, and the number of steps looked at."""

    def name(program: str) -> None:
        Named.hex = program

    steps = 0
    for before, after in Checker(programs, faults, name).states(start):
        steps += 1
        if problem := law.broken(before, after):
            return problem, steps
    return "", steps


def lost_part() -> dict[str, bytes]:
    """A shard whose committed part has gone."""
    contents = dict(START)
    Named.hex = "first"
    with live(contents):
        drive()
    del contents["/run/latents/00000-first.parquet"]
    return contents


def two_shards() -> dict[str, bytes]:
    """A finished run of two shards."""
    contents = {"/run/run.json": json.dumps({**RUN_JSON, "num_shards": 2}).encode()}
    Named.hex = "first"
    with live(contents):
        drive()
    return contents


def lost_common_part() -> dict[str, bytes]:
    """Two shards that were compacted; the common part has gone, the old ones have not."""
    contents = two_shards()
    with live(contents):
        compact.compact(URI)
        ledger.seal(URI)
    del contents["/run/latents/00000.1-first.parquet"]
    return contents


def with_orphan() -> dict[str, bytes]:
    """What a killed attempt has left behind."""
    return {"/run/latents/00000-dead.parquet": b"dead"}


CASES: dict[str, tuple[dict[str, Callable[[], Any]], Callable[[], dict[str, bytes]], int]] = {
    "two drivers": ({"a": drive, "b": drive}, dict[str, bytes], 2),
    "two drivers and gc": ({"a": drive, "b": drive, "c": collect}, dict[str, bytes], 0),
    "three workers": ({"a": work, "b": work, "c": drive}, dict[str, bytes], 1),
    "given up, comes back": ({"a": give_up, "b": work, "c": drive}, dict[str, bytes], 1),
    "redo of a lost part": ({"a": drive, "b": work, "c": work}, lost_part, 0),
    "compaction": ({"a": shrink, "b": collect}, two_shards, 1),
    "lost common part": ({"a": drive, "b": collect}, lost_common_part, 1),
    "two compactions": ({"a": shrink, "b": shrink}, two_shards, 1),
    "left behind": ({"a": drive, "b": collect, "c": collect}, with_orphan, 0),
}
"""Programs, what is there before, and how many faults may happen."""


@pytest.mark.parametrize("case", CASES)
def test_every_interleaving(case: str) -> None:
    programs, start, faults = CASES[case]
    problem, steps = check(programs, Law(), faults, {**START, **start()})
    assert problem == ""
    assert steps > 1000


# ---------------------------------------------------------------------------- the checker checked


def old_work() -> None:
    """The protocol of version 0.1: look, then write over whatever is there."""
    part = write_parts([], None, RUN, 0, Named.hex, 0)
    uri = f"{URI}/commits/00000.json"
    marker = Marker(
        shard=0,
        attempt=Named.hex,
        run_id=RUN.run_id,
        rows=1,
        failed=0,
        parts=part,
        seconds={},
        wall_s=0.0,
    )
    if not files.exists(uri):
        files.write_bytes(uri, marker.to_json())


def old_drive() -> None:
    """A shard with a marker is done; what no marker names goes once the run is sealed."""
    if not files.exists(f"{URI}/commits/00000.json"):
        old_work()
    ledger.seal(URI)
    named = {p.path for m in ledger.read_markers(URI).values() for p in m.parts.values()}
    found = [f"latents/{name}" for name, _, _ in files.list_files(f"{URI}/latents")]
    files.remove([files.join(URI, path) for path in found if path not in named])


def test_a_store_without_conditions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writes replace each other there, and only age removes: what is committed stays readable."""
    for module in (ledger, once):
        monkeypatch.setattr(module, "creates_once", lambda *_: False)
    problem, steps = check({"a": drive, "b": drive}, Law(), 1)
    assert problem == ""
    assert steps > 1000


def test_the_old_protocol_is_found_out() -> None:
    problem, _ = check({"a": old_drive, "b": old_work}, Law(old_drive), faults=0)
    assert problem == "a committed row was lost"


@pytest.mark.parametrize(
    ("name", "replacement", "case", "sentence"),
    [
        (
            "create_bytes",
            lambda uri, data: files.write_bytes(uri, data) is None,
            "two drivers and gc",
            "a committed row was lost",
        ),
        ("_close", lambda *_: True, "given up, comes back", "a committed row was lost"),
        ("is_whole", lambda *_: True, "redo of a lost part", "running again does not heal"),
    ],
)
def test_each_rule_is_needed(
    name: str,
    replacement: Any,
    case: str,
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    programs, start, faults = CASES[case]
    contents = {**START, **start()}
    monkeypatch.setattr(ledger, name, replacement)
    problem, _ = check(programs, Law(), faults, contents)
    assert problem == sentence
