"""Files that have broken readers: each becomes the row, the quarantined shard or the count that it
must, and the run goes on."""

from pathlib import Path

import pytest

from pipeline.cli import run_app
from tasks.run.ledger import read_quarantine
from tasks.run.query import query
from tests.e2e.small_dataset import Dataset
from tests.gnarly import LIMITS, SKIPPED, quarantined, write_gnarly


def flags(dataset: Dataset) -> list[str]:
    sets = [f"input.{name}={value}" for name, value in LIMITS.items()]
    sets += ["engine.shard_size=100", "engine.max_attempts=1"]
    return ["--config", dataset.config, *(word for each in sets for word in ("--set", each))]


def outside(folder: Path, run: str) -> list[Path]:
    """What lies anywhere but in the run."""
    return sorted(path for path in folder.rglob("*") if not str(path).startswith(run))


def test_a_folder_of_gnarly_files(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, run = tmp_path / "in", str(tmp_path / "run")
    expected = write_gnarly(source)
    before = outside(tmp_path, run)

    assert run_app(["plan", str(source), *flags(dataset), "--probe", "0"]) == 0
    out, _ = capsys.readouterr()
    for reason, count in SKIPPED.items():
        assert f"{count} {reason}" in out, out[:1500]

    command = ["invert", str(source), run, *flags(dataset), "--engine", "inline", "--no-flow"]
    assert run_app(command) == 1
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err
    sql = "SELECT sample_key, coalesce(error_kind, status) AS outcome, error FROM latents"
    rows = query(run, sql).to_pylist()
    assert {row["sample_key"]: row["outcome"] for row in rows} == expected
    assert all(row["error"] for row in rows if row["outcome"] != "ok")
    reasons = " ".join(entry.reason for entry in read_quarantine(run).values())
    assert len(read_quarantine(run)) == len(quarantined())
    for name in quarantined():
        assert name in reasons
    assert "internal error" not in reasons
    assert outside(tmp_path, run) == before

    assert run_app(["status", run]) == 1
    out = " ".join(capsys.readouterr().out.split())
    report = Path(run, "report.html").read_text()
    for reason, count in SKIPPED.items():
        assert f"{count} {reason}" in out, out[:1500]
        assert f"{count} {reason}" in report
