"""`refinery retry`: what was given up is tried again, and the run is as if nothing had happened."""

from pathlib import Path

import pytest

from pipeline.cli import run_app
from tasks.run.ledger import read_markers
from tests.e2e.small_dataset import Dataset, fingerprint, rows, run_inline


@pytest.fixture
def mended(
    dataset: Dataset, face_bytes: list[bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> tuple[str, str]:
    """A run in which two pictures were broken that are whole now; and how it should be."""
    source, run = tmp_path / "in", str(tmp_path / "run")
    source.mkdir()
    for index in range(8):
        (source / f"{index}.png").write_bytes(face_bytes[index])
    good = str(tmp_path / "good")
    flags = ["--config", dataset.config, "--engine", "inline", "--no-flow"]
    assert run_app(["invert", str(source), good, *flags]) == 0
    for index, data in ((2, b""), (5, b"no picture")):
        (source / f"{index}.png").write_bytes(data)
    assert run_app(["invert", str(source), run, *flags]) == 0
    for index in (2, 5):
        (source / f"{index}.png").write_bytes(face_bytes[index])
    assert "8 in 4 shards, 2 failed" in capsys.readouterr().out
    return run, good


def parts(run: str) -> dict[int, str]:
    return {shard: marker.parts["images"].sha256 for shard, marker in read_markers(run).items()}


def test_failed_rows_are_tried_again(
    mended: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    run, good = mended
    before = read_markers(run)
    assert run_app(["retry", run, "--failed", "--engine", "inline"]) == 0
    out = capsys.readouterr().out
    assert "8 in 4 shards, 0 failed" in out
    assert "4 rows in" in out  # two shards of two
    after = read_markers(run)
    assert [s for s in after if after[s] != before[s]] == [1, 2]
    assert rows(run, "run_id, image_uri").equals(rows(good, "run_id, image_uri"))
    assert parts(run) == parts(good)
    assert run_app(["verify", run]) == 0
    commits = sorted(path.name for path in Path(run, "commits").iterdir())
    assert commits == [
        "00000.json",
        "00001.1.json",
        "00001.json",
        "00002.1.json",
        "00002.json",
        "00003.json",
    ]
    assert run_app(["retry", run, "--failed", "--engine", "inline"]) == 0
    assert "0 rows in" in capsys.readouterr().out
    assert read_markers(run) == after


def test_a_condition_chooses(mended: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = mended
    where = "error LIKE '%empty%'"
    assert run_app(["retry", run, "--where", where, "--engine", "inline"]) == 0
    assert "8 in 4 shards, 1 failed" in capsys.readouterr().out
    assert [s for s, marker in read_markers(run).items() if marker.failed] == [2]
    assert run_app(["retry", run, "--where", where, "--engine", "inline"]) == 2
    assert "no failed row meets --where" in capsys.readouterr().err
    assert run_app(["retry", run, "--set", "seed=1"]) == 2
    assert "only engine.* may be set" in capsys.readouterr().err


def test_what_fails_again_keeps_its_row(mended: tuple[str, str]) -> None:
    run, _ = mended
    (Path(run).parent / "in" / "5.png").write_bytes(b"no picture")
    (Path(run).parent / "in" / "2.png").unlink()
    assert run_app(["retry", run, "--failed", "--engine", "inline"]) == 0
    failures = {shard: dict(marker.failures) for shard, marker in read_markers(run).items()}
    assert failures == {0: {}, 1: {"read": 1}, 2: {"decode": 1}, 3: {}}
    assert run_app(["verify", run]) == 0


def test_quarantined_shards_are_tried_again(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: str
) -> None:
    run = str(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr("tasks.work.invert.read_shard", broken_reader)
        summary = run_inline(dataset, run, "engine.max_attempts=1")
        assert list(summary.outcome.quarantined) == [3]
    assert run_app(["retry", run, "--engine", "inline"]) == 0
    assert fingerprint(run) == fingerprint(undisturbed)


def broken_reader(spec: object, config: object) -> object:
    from tasks.input.read import read_shard
    from tasks.job import InputConfig, ShardSpec

    assert isinstance(spec, ShardSpec)
    assert isinstance(config, InputConfig)
    if spec.id == 3:
        raise ValueError("a passing fault")
    return read_shard(spec, config)
