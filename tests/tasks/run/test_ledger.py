"""Identity of a run, markers, quarantine, sealing, orphans."""

import dataclasses
import json
import logging
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from models.errors import LedgerError
from tasks.job import InputConfig, JobConfig, MethodConfig, OutputConfig
from tasks.run import ledger
from tasks.run.identity import identity_digest
from tasks.run.manifest import ManifestInfo
from tasks.run.marker import Marker, Part
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


def create(uri: str, **changes: Any) -> ledger.RunHandle:
    values = {
        "job": JOB,
        "manifest_info": INFO,
        "hashes": HASHES,
        "code_version": "1.0",
        "declared": DECLARED,
    }
    return ledger.create_run(uri, **{**values, **changes})


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


@pytest.fixture
def run(tmp_path: Path) -> str:
    return create(str(tmp_path / "run")).uri


def test_the_same_settings_are_the_same_run(run: str) -> None:
    first = ledger.open_run(run)
    assert create(run) == first
    assert len(first.run_id) == 16
    assert first.code_version == "1.0"
    record = ledger.read_run(run)
    assert (record["num_shards"], record["num_samples"], record["num_bytes"]) == (3, 10, 1000)
    assert record["config"]["methods"][1]["settings"] == {"steps": 20, "space": "w"}
    assert identity_digest(record) == first.run_id


def test_the_place_is_not_part_of_the_identity(run: str, tmp_path: Path) -> None:
    assert create(str(tmp_path / "other")).run_id == ledger.open_run(run).run_id


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
    assert text.startswith(f"{run} holds run {ledger.open_run(run).run_id}, which was made with")
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
        ledger.open_run(str(tmp_path))


@pytest.mark.parametrize("text", ["{", "[]", '{"run_id": "x"}'])
def test_damaged_run_json(run: str, text: str) -> None:
    Path(run, "run.json").write_text(text)
    with pytest.raises(LedgerError, match=r"run\.json: damaged"):
        ledger.read_run(run)


def test_markers_come_back(run: str) -> None:
    assert ledger.read_markers(run) == {}
    marker = make_marker(2)
    ledger.write_marker(run, marker)
    ledger.write_marker(run, make_marker(100_000))
    assert ledger.read_marker(run, 2) == marker
    assert ledger.read_marker(run, 1) is None
    assert list(ledger.read_markers(run)) == [2, 100_000]
    assert json.loads(Path(run, "commits/00002.json").read_text())["seconds"]["read"] == 0.5


def test_marker_written_by_hand_is_refused(run: str) -> None:
    Path(run, "commits").mkdir()
    for text in ("", "[]", "{}", '{"parts": {"latents": {}}, "notes": []}'):
        Path(run, "commits/00001.json").write_text(text)
        with pytest.raises(LedgerError, match=r"commits/00001\.json: not a commit marker"):
            ledger.read_markers(run)


def test_pending_is_manifest_minus_markers(run: str) -> None:
    assert ledger.pending(run) == [0, 1, 2]
    ledger.write_marker(run, make_marker(1))
    Path(run, "commits/notes.txt").write_text("not a marker")
    Path(run, "commits/x.json").write_text("{}")
    assert ledger.pending(run) == [0, 2]


def test_pending_needs_one_listing_and_opens_no_marker(
    run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger.write_marker(run, make_marker(0))
    listed, read = [], []
    list_files, read_bytes = ledger.list_files, ledger.read_bytes
    monkeypatch.setattr(
        ledger, "list_files", lambda uri, *a: (listed.append(uri), list_files(uri, *a))[1]
    )
    monkeypatch.setattr(
        ledger, "read_bytes", lambda uri, *a: (read.append(uri), read_bytes(uri, *a))[1]
    )
    assert ledger.pending(run) == [1, 2]
    assert listed == [f"{run}/commits"]
    assert read == [f"{run}/run.json"]


def test_a_run_of_a_million_samples_is_cheap(tmp_path: Path) -> None:
    uri = f"memory://{tmp_path.name}"
    info = dataclasses.replace(INFO, num_shards=1000, num_samples=1_000_000)
    handle = create(uri, manifest_info=info)
    for shard in range(999):
        ledger.write_marker(uri, make_marker(shard, handle.run_id, rows=1000))
    tracemalloc.start()
    try:
        started = time.monotonic()
        assert ledger.pending(uri) == [999]
        assert len(ledger.read_markers(uri)) == 999
        assert time.monotonic() - started < 20
        assert tracemalloc.get_traced_memory()[1] < 16 * 2**20
    finally:
        tracemalloc.stop()


def test_quarantine_until_a_later_success(run: str) -> None:
    assert ledger.read_quarantine(run) == {}
    ledger.quarantine(run, 1, "tar in.tar is corrupt", attempts=3)
    entry = ledger.read_quarantine(run)[1]
    assert (entry.shard, entry.reason, entry.attempts) == (1, "tar in.tar is corrupt", 3)
    assert entry.run_id == ledger.open_run(run).run_id
    assert ledger.pending(run) == [0, 1, 2]  # running again retries it
    ledger.write_marker(run, make_marker(1))
    assert ledger.read_quarantine(run) == {}


def test_damaged_quarantine_file(run: str) -> None:
    ledger.quarantine(run, 1, "x")
    Path(run, "failed/00001.json").write_text('{"shard": 1}')
    with pytest.raises(LedgerError, match=r"failed/00001\.json: damaged"):
        ledger.read_quarantine(run)


def test_seal_wants_every_shard(run: str) -> None:
    ledger.write_marker(run, make_marker(0))
    ledger.quarantine(run, 2, "gone")
    with pytest.raises(LedgerError, match=r"1 of 3 shards are neither .* \(first: 00001\)"):
        ledger.seal(run)
    assert ledger.read_seal(run) is None
    ledger.write_marker(run, make_marker(1))
    assert ledger.seal(run) == f"{run}/_SEALED.json"
    sealed = ledger.read_seal(run)
    assert sealed["quarantined"] == [2]
    assert (sealed["rows"], sealed["failed"]) == (8, 2)
    assert [part["path"] for part in sealed["parts"]] == [
        "latents/00000-aa.parquet",
        "latents/00001-aa.parquet",
    ]
    ledger.write_marker(run, make_marker(2))
    ledger.seal(run)
    assert ledger.read_seal(run)["quarantined"] == []
    assert len(ledger.read_seal(run)["parts"]) == 3


def test_damaged_seal(run: str) -> None:
    Path(run, "_SEALED.json").write_text("{}")
    with pytest.raises(LedgerError, match=r"_SEALED\.json: damaged"):
        ledger.read_seal(run)


def test_orphans_go_after_sealing_and_named_parts_stay(run: str) -> None:
    for kind, name in [
        ("latents", "00000-aa.parquet"),
        ("latents", "00000-bb.parquet"),
        ("images", "00000-bb.parquet"),
        ("residuals", ".00000-bb.parquet.1f.partial"),
        ("index", "kept.bin"),
    ]:
        Path(run, kind).mkdir(exist_ok=True)
        Path(run, kind, name).write_bytes(b"x")
    with pytest.raises(LedgerError, match="not sealed"):
        ledger.remove_orphans(run)
    for shard in range(3):
        ledger.write_marker(run, make_marker(shard))
    ledger.seal(run)
    assert ledger.remove_orphans(run) == [
        "latents/00000-bb.parquet",
        "images/00000-bb.parquet",
        "residuals/.00000-bb.parquet.1f.partial",
    ]
    assert Path(run, "latents/00000-aa.parquet").exists()
    assert Path(run, "index/kept.bin").exists()
    assert ledger.remove_orphans(run) == []


def test_object_storage(s3: str) -> None:
    uri = f"{s3}/runs/one"
    handle = create(uri)
    assert create(uri) == handle
    ledger.write_marker(uri, make_marker(0))
    assert ledger.pending(uri) == [1, 2]
    for shard in (1, 2):
        ledger.write_marker(uri, make_marker(shard))
    ledger.seal(uri)
    assert ledger.remove_orphans(uri) == []
    assert len(ledger.read_seal(uri)["parts"]) == 3
