"""`refinery compact` and `refinery gc`: fewer files, the same rows, readers undisturbed, kills."""

import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from models.checkpoints.load import load_generator
from models.errors import ShardError
from pipeline.cli import run_app
from tasks.run import ledger, run_json
from tasks.run.manifest import read_manifest
from tasks.run.query import open_views
from tasks.run.source import plan_source, source_marker
from tasks.run.stored import read_inversions
from tasks.storage.crash import COMPACT_POINTS, EXIT_CODE
from tasks.verify.run import verify
from tests.e2e.small_dataset import Dataset, fingerprint, rows, run_inline


@pytest.fixture
def run(dataset: Dataset, tmp_path: Path) -> str:
    """A finished run of six shards, twelve parts."""
    uri = str(tmp_path / "run")
    run_inline(dataset, uri)
    return uri


def part_files(run: str) -> list[str]:
    return sorted(
        f"{kind}/{path.name}" for kind in ledger.PART_KINDS for path in Path(run, kind).glob("*")
    )


def test_fewer_files_the_same_rows(run: str, dataset: Dataset) -> None:
    before, originals = rows(run, "shard"), part_files(run)
    assert run_app(["compact", run]) == 0
    (marker,) = ledger.read_markers(run).values()
    assert (marker.rows, marker.failed, marker.failures) == (12, 1, {"decode": 1})
    assert ledger.committed(run) == set(range(6))
    assert rows(run, "shard").equals(before)
    assert verify(run).problems == []
    # Each row can be found by its shard.
    keys = pq.read_table(Path(run, marker.parts["latents"].path))["sample_key"].to_pylist()
    for covered, spec in zip(marker.covers, read_manifest(run), strict=True):
        found = keys[covered.first_row : covered.first_row + covered.rows]
        assert (covered.shard, found) == (spec.id, list(spec.members))
    seal = ledger.read_seal(run)
    assert seal is not None
    assert [part["path"] for part in seal["parts"]] == [
        part.path for _, part in sorted(marker.parts.items())
    ]
    # Nobody may be reading what a day has passed over.
    assert set(originals) < set(part_files(run))
    assert run_app(["gc", run]) == 0
    assert set(originals) < set(part_files(run))
    assert run_app(["gc", run, "--older-than-h", "0"]) == 0
    assert part_files(run) == sorted(part.path for part in marker.parts.values())
    compacted = fingerprint(run)
    for command in (["compact"], ["status"], ["verify"], ["report"], ["gc", "--older-than-h", "0"]):
        assert run_app([command[0], run, *command[1:]]) == 0
    assert run_inline(dataset, run).outcome.rows_now == 0
    assert fingerprint(run) == compacted
    assert rows(run, "shard").equals(before)


def test_shards_above_the_size_stay_as_they_are(run: str) -> None:
    size = sum(part.bytes for part in ledger.read_markers(run)[0].parts.values())
    assert run_app(["compact", run, "--target-mb", str(2.5 * size / 1e6)]) == 0
    markers = ledger.read_markers(run)
    assert [len(marker.covers) for marker in markers.values()] == [2, 2, 2]
    # Larger files later: what is covered by what is covered is found.
    before = rows(run, "shard")
    assert run_app(["compact", run]) == 0
    (marker,) = ledger.read_markers(run).values()
    assert [(covered.shard, covered.first_row) for covered in marker.covers] == [
        (shard, 2 * shard) for shard in range(6)
    ]
    assert run_app(["gc", run, "--older-than-h", "0"]) == 0
    assert len(part_files(run)) == 2
    assert rows(run, "shard").equals(before)
    assert verify(run).problems == []


def test_readers_go_on_with_what_they_began(run: str) -> None:
    generator = load_generator(run_json.read_run(run)["config"]["generator"])
    batches = read_inversions(run, generator, batch=2)
    first = next(batches)
    specs = list(plan_source(run))
    with open_views(run) as session:
        assert run_app(["compact", run]) == 0
        assert run_app(["gc", run]) == 0
        codes = session.ask("SELECT w_plus FROM latents WHERE status = 'ok'")
        assert codes.num_rows == 11
    keys = [*first.sample_keys, *(key for batch in batches for key in batch.sample_keys)]
    assert len(keys) == len(set(keys)) == 11
    assert [source_marker(spec).shard for spec in specs] == list(range(6))
    again = [key for batch in read_inversions(run, generator) for key in batch.sample_keys]
    assert again == keys


def test_a_shard_that_is_done_again_takes_the_place_of_the_common_parts(run: str) -> None:
    """The common part is lost before the old ones are gone: they count again."""
    before = rows(run, "shard")
    assert run_app(["compact", run]) == 0
    (marker,) = ledger.read_markers(run).values()
    Path(run, marker.parts["latents"].path).unlink()
    assert ledger.pending(run) == [0]
    assert ledger.open_shard(run, 3)[1] is not None
    assert set(ledger.read_commits(run, with_parts=True).markers) == {1, 2, 3, 4, 5}
    assert before.num_rows == 12


@pytest.mark.parametrize("point", COMPACT_POINTS)
def test_killed_and_run_again(run: str, point: str, tmp_path: Path) -> None:
    before = rows(run, "shard")
    environment = {**os.environ, "REFINERY_CRASH": f"{point}:0:{tmp_path / 'token'}"}
    command = [sys.executable, "-m", "pipeline.cli", "compact", run]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == EXIT_CODE, done.stdout + done.stderr
    assert rows(run, "shard").equals(before)
    assert verify(run).problems == []
    assert run_app(["compact", run]) == 0
    assert verify(run).problems == []
    assert rows(run, "shard").equals(before)
    assert run_app(["gc", run, "--older-than-h", "0"]) == 0
    assert len(part_files(run)) == 2
    assert verify(run).notes == []
    assert rows(run, "shard").equals(before)


def test_what_is_wrong_is_said(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("compact", "gc"):
        assert run_app([command, str(tmp_path / "nothing")]) == 2
        assert "no run here" in capsys.readouterr().err
        assert not (tmp_path / "nothing").exists()
    assert run_app(["gc", run, "--older-than-h", "-1"]) == 2
    assert "expected 0 or more" in capsys.readouterr().err
    assert run_app(["compact", run, "--target-mb", "0"]) == 2
    Path(run, "_SEALED.json").unlink()
    assert run_app(["compact", run]) == 2
    assert "the run is not finished" in capsys.readouterr().err


def test_work_planned_before_is_refused_when_its_parts_are_gone(run: str) -> None:
    specs = list(plan_source(run))
    assert run_app(["compact", run]) == 0
    assert run_app(["gc", run, "--older-than-h", "0"]) == 0
    with pytest.raises(ShardError, match="compacted since this work was planned"):
        source_marker(specs[2])
