"""Identity of a run, markers, quarantine, sealing, orphans."""

import dataclasses
import json
import logging
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from models.errors import LedgerError, ShardError
from tasks.job import InputConfig, JobConfig, MethodConfig, OutputConfig
from tasks.run import ledger, run_json
from tasks.run.identity import identity_digest
from tasks.run.manifest import ManifestInfo
from tasks.run.marker import Marker, Part
from tasks.run.records import DamagedError, NewerError
from tasks.storage.files import join, write_bytes
from tasks.work.kinds import load_job
from tests.tasks.small_run import DECLARED

JOB = JobConfig(
    generator="faces64",
    methods=(
        MethodConfig(name="e4e"),
        MethodConfig(name="wplus", settings={"steps": 20, "space": "w"}),
    ),
    input=InputConfig(fit="resize"),
    output=OutputConfig(pictures=("inversion",)),
)
INFO = ManifestInfo(num_shards=3, num_samples=10, num_bytes=1000, sha256="m" * 64)
HASHES = {"generator": "a" * 64, "methods.0.e4e.e4e": "b" * 64}


def create(uri: str, **changes: Any) -> run_json.RunHandle:
    values = {
        "job": JOB,
        "manifest_info": INFO,
        "hashes": HASHES,
        "code_version": "1.0",
        "declared": DECLARED,
    }
    return run_json.create_run(uri, **{**values, **changes})


def make_marker(shard: int, run_id: str = "r", **changes: Any) -> Marker:
    part = Part(path=f"latents/{shard:05d}-aa.parquet", rows=4, bytes=9, sha256="c" * 64)
    values = {
        "shard": shard,
        "attempt": "aa",
        "run_id": run_id,
        "rows": 4,
        "failed": 1,
        "parts": {"latents": part},
        "seconds": {"read": 0.5, "decode": 0.25, "invert": 1.0, "score": 0.1, "write": 0.2},
        "wall_s": 2.5,
        "failures": {"decode": 1},
        "notes": ("a", "b"),
        "device": "cpu",
    }
    return Marker(**{**values, **changes})


def commit(
    uri: str, shard: int, generation: int = 0, attempt: str = "aa", **changes: Any
) -> Marker:
    """A commit and the part that it names, nine bytes."""
    path = f"latents/{ledger.shard_name(shard, generation)}-{attempt}.parquet"
    write_bytes(join(uri, path), b"123456789")
    part = Part(path=path, rows=4, bytes=9, sha256="c" * 64)
    marker = make_marker(shard, attempt=attempt, parts={"latents": part}, **changes)
    return ledger.write_marker(uri, marker, generation)


@pytest.fixture
def run(tmp_path: Path) -> str:
    return create(str(tmp_path / "run")).uri


def test_the_same_settings_are_the_same_run(run: str) -> None:
    first = run_json.run_handle(run)
    assert create(run) == first
    assert len(first.run_id) == 16
    assert first.code_version == "1.0"
    record = run_json.read_run(run)
    assert (record["num_shards"], record["num_samples"], record["num_bytes"]) == (3, 10, 1000)
    assert record["config"]["methods"][1]["settings"] == {"steps": 20, "space": "w"}
    assert identity_digest(record) == first.run_id


def test_the_place_is_not_part_of_the_identity(run: str, tmp_path: Path) -> None:
    assert create(str(tmp_path / "other")).run_id == run_json.run_handle(run).run_id


def test_another_code_version_goes_on_with_a_warning(
    run: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        handle = create(run, code_version="2.0")
    assert handle.code_version == "2.0"
    assert "code version 1.0, goes on with 2.0" in caplog.text


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        (
            {"job": dataclasses.replace(JOB, batch=8, seed=1, perceptual="none")},
            [
                '  config.perceptual: "auto" in the run, "none" now',
                "  config.seed: 0 in the run, 1",
            ],
        ),
        (
            {"job": dataclasses.replace(JOB, methods=JOB.methods[:1])},
            [
                '  config.methods.1.name: "wplus" in the run, (not set) now',
                "  config.methods.1.settings.steps: 20 in the run, (not set) now",
            ],
        ),
        (
            {"hashes": {**HASHES, "generator": "d" * 64}},
            [f'  weights.generator: "{"a" * 64}" in the run, "{"d" * 64}" now'],
        ),
        (
            {"manifest_info": dataclasses.replace(INFO, sha256="n" * 64)},
            ["  manifest: ", "  (manifest: the input files, their contents or the shard size"],
        ),
    ],
)
def test_another_run_is_refused_with_every_difference(
    run: str, changes: dict[str, Any], lines: list[str]
) -> None:
    before = Path(run, "run.json").read_bytes()
    with pytest.raises(LedgerError) as caught:
        create(run, **changes)
    text = str(caught.value)
    assert text.startswith(
        f"{run} holds run {run_json.run_handle(run).run_id}, which was made with"
    )
    for line in lines:
        assert f"\n{line}" in text
    assert "config.generator" not in text
    assert "config.batch" not in text
    assert "choose another output folder" in text
    assert Path(run, "run.json").read_bytes() == before


def test_job_comes_back(run: str) -> None:
    assert load_job(run) == JOB


def test_no_run_here(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match=r"no run here \(run\.json is missing\)"):
        run_json.run_handle(str(tmp_path))


@pytest.mark.parametrize("text", ["{", "[]", '{"run_id": "x"}'])
def test_damaged_run_json(run: str, text: str) -> None:
    Path(run, "run.json").write_text(text)
    with pytest.raises(LedgerError, match=r"run\.json: damaged"):
        run_json.read_run(run)


def test_markers_come_back(run: str) -> None:
    assert ledger.read_markers(run) == {}
    marker = make_marker(2)
    ledger.write_marker(run, marker)
    ledger.write_marker(run, make_marker(100_000))
    assert ledger.read_marker(run, 2) == marker
    assert ledger.read_marker(run, 1) is None
    assert list(ledger.read_markers(run)) == [2, 100_000]
    assert json.loads(Path(run, "commits/00002.json").read_text())["seconds"]["read"] == 0.5


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "EOF"),
        ("[]", "should be an object"),
        ("{}", "shard: Field required"),
        ('{"parts": {"latents": {}}, "notes": []}', "Field required"),
    ],
)
def test_a_marker_written_by_hand_is_named_and_the_rest_works(
    run: str, text: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    commit(run, 0)
    Path(run, "commits/00001.json").write_text(text)
    assert list(ledger.read_markers(run)) == [0]
    assert f"{run}/commits/00001.json: damaged (" in caplog.text
    assert reason in caplog.text
    with pytest.raises(DamagedError, match=reason):
        ledger.read_marker(run, 1)
    assert ledger.pending(run) == [1, 2]
    assert ledger.open_shard(run, 1) == (1, None)
    again = commit(run, 1, generation=1)
    assert ledger.read_marker(run, 1) == again == ledger.read_markers(run)[1]
    assert ledger.pending(run) == [2]


def test_a_newer_marker_is_left_to_the_newer_program(run: str) -> None:
    path = Path(run, "commits/00001.json")
    commit(run, 1)
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    for asked in (ledger.pending, ledger.seal, lambda run: ledger.open_shard(run, 1)):
        with pytest.raises(NewerError, match=r"commits/00001\.json: of format 2, .* up to 1"):
            asked(run)
    assert ledger.read_markers(run) == {}


def test_pending_is_manifest_minus_markers(run: str) -> None:
    assert ledger.pending(run) == [0, 1, 2]
    commit(run, 1)
    Path(run, "commits/notes.txt").write_text("not a marker")
    Path(run, "commits/x.json").write_text("{}")
    assert ledger.pending(run) == [0, 2]


@pytest.mark.parametrize("lost", [None, b"12345678"])
def test_a_commit_whose_part_is_lost_or_cut_is_pending(run: str, lost: bytes | None) -> None:
    for shard in range(3):
        commit(run, shard)
    ledger.seal(run)
    part = Path(run, "latents/00001-aa.parquet")
    part.unlink() if lost is None else part.write_bytes(lost)
    assert ledger.pending(run) == [1]
    assert ledger.open_shard(run, 1) == (1, None)
    reason = "missing" if lost is None else "of 8 bytes, not 9"
    assert reason in str(ledger.read_commits(run, with_parts=True).damaged[1])
    with pytest.raises(LedgerError, match="cannot seal, 1 of 3 shards"):
        ledger.seal(run)
    commit(run, 1, generation=1)
    assert ledger.pending(run) == []
    ledger.seal(run)
    assert ledger.read_seal(run)["parts"][1]["path"] == "latents/00001.1-aa.parquet"


def test_requests(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fresh shard costs an attempt one GET before and one PUT after; a driver a listing of the
    markers and of each kind of part, and one GET for each commit."""
    commit(run, 0)
    asked: list[str] = []

    def spy(module: Any, name: str) -> None:
        call = getattr(module, name)

        def ask(uri: str, *rest: Any) -> Any:
            asked.append(f"{name} {uri.removeprefix(run)}")
            return call(uri, *rest)

        monkeypatch.setattr(module, name, ask)

    for name in ("list_files", "find_bytes", "file_info", "create_bytes"):
        spy(ledger, name)
    spy(run_json, "find_bytes")
    assert ledger.open_shard(run, 1) == (0, None)
    ledger.write_marker(run, make_marker(1))
    assert asked == ["find_bytes /commits/00001.json", "create_bytes /commits/00001.json"]
    asked.clear()
    assert ledger.pending(run) == [1, 2]
    assert sorted(asked) == [
        "find_bytes /commits/00000.json",
        "find_bytes /commits/00001.json",
        "find_bytes /run.json",
        "list_files /commits",
        "list_files /latents",
    ]


def test_a_run_of_a_million_samples_is_cheap(tmp_path: Path) -> None:
    uri = f"memory://{tmp_path.name}"
    info = dataclasses.replace(INFO, num_shards=1000, num_samples=1_000_000)
    handle = create(uri, manifest_info=info)
    for shard in range(999):
        commit(uri, shard, run_id=handle.run_id, rows=1000)
    tracemalloc.start()
    try:
        assert ledger.pending(uri) == [999]
        assert len(ledger.read_markers(uri)) == 999
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    finally:
        tracemalloc.stop()


def test_quarantine_until_a_later_success(run: str) -> None:
    assert ledger.read_quarantine(run) == {}
    ledger.quarantine(run, 1, "tar in.tar is corrupt", attempts=3)
    entry = ledger.read_quarantine(run)[1]
    assert (entry.shard, entry.reason, entry.attempts) == (1, "tar in.tar is corrupt", 3)
    assert entry.run_id == run_json.run_handle(run).run_id
    assert ledger.pending(run) == [0, 1, 2]  # running again retries it
    commit(run, 1)
    assert ledger.read_quarantine(run) == {}


def test_a_damaged_quarantine_file_is_its_reason(run: str) -> None:
    ledger.quarantine(run, 0, "gone")
    ledger.quarantine(run, 1, "x")
    Path(run, "failed/00001.json").write_text('{"shard": 1}')
    found = ledger.read_quarantine(run)
    assert found[0].reason == "gone"
    assert "failed/00001.json: damaged (reason: Field required)" in found[1].reason


def test_seal_wants_every_shard(run: str) -> None:
    commit(run, 0)
    ledger.quarantine(run, 2, "gone")
    with pytest.raises(LedgerError, match=r"1 of 3 shards are neither .* \(first: 00001\)"):
        ledger.seal(run)
    assert ledger.read_seal(run) is None
    commit(run, 1)
    assert ledger.seal(run) == f"{run}/_SEALED.json"
    sealed = ledger.read_seal(run)
    assert sealed["quarantined"] == [2]
    assert (sealed["rows"], sealed["failed"]) == (8, 2)
    assert [part["path"] for part in sealed["parts"]] == [
        "latents/00000-aa.parquet",
        "latents/00001-aa.parquet",
    ]
    commit(run, 2)
    ledger.seal(run)
    assert ledger.read_seal(run)["quarantined"] == []
    assert len(ledger.read_seal(run)["parts"]) == 3


def test_damaged_seal(run: str) -> None:
    Path(run, "_SEALED.json").write_text("{}")
    with pytest.raises(LedgerError, match=r"_SEALED\.json: damaged"):
        ledger.read_seal(run)


def test_files_go_that_no_marker_can_name(run: str) -> None:
    """Those that came second at once; those of a shard without a commit after a day."""
    for shard in (0, 2):
        commit(run, shard)
    orphans = [
        ("latents", "00000-bb.parquet"),
        ("latents", "00001-cc.parquet"),
        ("images", "00000-bb.parquet"),
        ("residuals", ".00000-bb.parquet.1f.partial"),
    ]
    for kind, name in [*orphans, ("latents", "notes.txt"), ("index", "kept.bin")]:
        Path(run, kind).mkdir(exist_ok=True)
        Path(run, kind, name).write_bytes(b"x")
    assert ledger.remove_orphans(run) == [
        "latents/00000-bb.parquet",
        "images/00000-bb.parquet",
        "residuals/.00000-bb.parquet.1f.partial",
    ]
    day = ledger.ORPHAN_AGE_S
    old = Path(run, "latents/00001-cc.parquet")
    os.utime(old, (0, old.stat().st_mtime - day + 60))
    assert ledger.remove_orphans(run) == []
    os.utime(old, (0, old.stat().st_mtime - 120))
    assert ledger.remove_orphans(run) == ["latents/00001-cc.parquet"]
    for path in ("latents/00000-aa.parquet", "latents/notes.txt", "index/kept.bin"):
        assert Path(run, path).exists()
    # It was closed first, so its attempt is sent back, and the shard goes on.
    with pytest.raises(ShardError, match=r"taken for dead.*commits/00001\.json is closed"):
        ledger.write_marker(run, make_marker(1))
    assert (ledger.pending(run), ledger.open_shard(run, 1)) == ([1], (1, None))
    commit(run, 1, generation=1)
    assert ledger.pending(run) == []


def test_a_closed_generation_leaves_the_commit_before_it(run: str) -> None:
    first = commit(run, 0)
    Path(run, "latents/00000.1-bb.parquet").write_bytes(b"x")
    assert ledger.remove_orphans(run, older_than_s=0) == ["latents/00000.1-bb.parquet"]
    assert Path(run, "commits/00000.1.json").exists()
    assert ledger.read_markers(run) == {0: first}
    assert ledger.read_marker(run, 0) == first
    assert ledger.remove_orphans(run, older_than_s=0) == []


def test_what_a_damaged_commit_may_need_stays(run: str) -> None:
    commit(run, 0)
    Path(run, "commits/00000.json").write_text("{")
    commit(run, 1)
    Path(run, "latents/00001-aa.parquet").write_bytes(b"cut")
    assert ledger.remove_orphans(run, older_than_s=0) == []


def test_a_store_without_conditions_is_given_time(
    run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a late marker may land on a commit, its parts stay, and it must not be too late."""
    monkeypatch.setattr(ledger, "creates_once", lambda *_: False)
    commit(run, 0)
    orphan = Path(run, "latents/00000-bb.parquet")
    orphan.write_bytes(b"x")
    assert ledger.remove_orphans(run, older_than_s=0) == []
    os.utime(orphan, (0, orphan.stat().st_mtime - ledger.ORPHAN_AGE_S - 60))
    assert ledger.remove_orphans(run, older_than_s=0) == ["latents/00000-bb.parquet"]
    with pytest.raises(ShardError, match="took 43201 s"):
        ledger.write_marker(run, make_marker(1, wall_s=43201.0))
    assert ledger.read_marker(run, 1) is None


def test_superseded_parts_stay_for_their_readers(run: str) -> None:
    commit(run, 0)
    commit(run, 0, generation=1)
    assert ledger.remove_orphans(run) == []
    path = Path(run, "commits/00000.1.json")
    os.utime(path, (0, path.stat().st_mtime - ledger.ORPHAN_AGE_S - 60))
    assert ledger.remove_orphans(run) == ["latents/00000-aa.parquet"]


def test_object_storage(s3: str) -> None:
    uri = f"{s3}/runs/one"
    handle = create(uri)
    assert create(uri) == handle
    first = commit(uri, 0)
    assert commit(uri, 0, attempt="bb") == first
    assert ledger.pending(uri) == [1, 2]
    for shard in (1, 2):
        commit(uri, shard)
    ledger.seal(uri)
    assert ledger.remove_orphans(uri) == ["latents/00000-bb.parquet"]
    assert len(ledger.read_seal(uri)["parts"]) == 3
