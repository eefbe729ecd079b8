"""The third kind of job through the door: new scores of stored pictures."""

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from models.errors import LedgerError
from models.losses.perceptual import load_perceptual
from models.stylegan2.generator import Generator
from pipeline.cli import run_app
from tasks.run.ledger import committed, read_markers
from tasks.run.query import query
from tasks.run.run_json import read_declared
from tasks.verify.run import verify
from tasks.work.device import to_images
from tests.e2e.small_dataset import Dataset, rescore_inline, run_inline
from tests.tasks.small_edit import write_domain
from tests.tasks.work.test_edit import pictures

SCORES = ("mse", "psnr", "ssim", "nscd")


@pytest.fixture
def rescored(calm: dict[str, str]) -> str:
    return calm["rescore"]


def test_the_same_scores_again(undisturbed: str, rescored: str) -> None:
    sql = f"SELECT sample_key, status, error, w_plus, {', '.join(SCORES)} FROM latents ORDER BY 1"
    assert query(rescored, sql).equals(query(undisturbed, sql))
    assert read_declared(rescored).metrics == SCORES
    assert {kind for m in read_markers(rescored).values() for kind in m.parts} == {"latents"}
    commits = query(rescored, "SELECT * FROM shards")
    assert {"read_s", "decode_s", "score_s", "write_s"} <= set(commits.column_names)
    assert "invert_s" not in commits.column_names


def test_the_command_adds_a_network(
    undisturbed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    command = ["rescore", undisturbed, out, "--engine", "inline", "--no-flow"]
    command += ["--set", "perceptual=refinery", "--set", 'metrics=["ssim"]']
    assert run_app(command) == 0
    assert "12 in 6 shards, 1 failed" in capsys.readouterr().out
    distance = load_perceptual("refinery")
    found = query(out, "SELECT sample_key, trunk_distance FROM latents WHERE status = 'ok'")
    assert "mse" not in query(out, "SELECT * FROM latents LIMIT 0").column_names
    stored = pictures(undisturbed)
    for row in found.to_pylist():
        before, after = (
            to_images(stored[name][row["sample_key"]].copy()[None], torch.device("cpu"))
            for name in ("input", "inversion")
        )
        assert row["trunk_distance"] == pytest.approx(float(distance(before, after)), rel=1e-3)
    assert run_app(command) == 0
    assert "0 rows in 0:00:00" in capsys.readouterr().out
    assert run_app(["verify", out]) == 0


def test_edits_are_scored_against_their_inversion(
    undisturbed: str, tmp_path: Path, tiny_generator: Generator
) -> None:
    edits, out = str(tmp_path / "edits"), str(tmp_path / "out")
    oil = write_domain(tiny_generator, tmp_path / "oil")
    flags = ["--engine", "inline", "--no-flow", "--set", "perceptual=none"]
    edit = ["edit", undisturbed, edits, "--domain", oil, *flags, "--set", "attributes=none"]
    assert run_app(edit) == 0
    assert run_app(["rescore", edits, out, *flags, "--set", 'metrics=["psnr"]']) == 0
    found = query(out, "SELECT psnr FROM edits")["psnr"].to_pylist()
    assert len(found) == 11
    assert all(5 < value < 60 for value in found)


def test_pictures_can_be_copied(undisturbed: str, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    rescore_inline(undisturbed, out, 'output.pictures=["inversion"]')
    source = {m.shard: m.parts for m in read_markers(undisturbed).values()}
    for marker in read_markers(out).values():
        if "images" in marker.parts:
            copied = pq.read_table(f"{out}/{marker.parts['images'].path}")
            before = pq.read_table(f"{undisturbed}/{source[marker.shard]['images'].path}")
            assert copied["inversion"].equals(before["inversion"])


def test_inputs_that_the_run_has_not_stored_are_read_again(
    dataset: Dataset, undisturbed: str, tmp_path: Path
) -> None:
    run, out = str(tmp_path / "run"), str(tmp_path / "out")
    assert run_inline(dataset, run, 'output.pictures=["inversion"]').is_clean
    command = ["rescore", run, out, "--engine", "inline", "--no-flow"]
    assert run_app([*command, "--set", 'output.pictures=["input"]']) == 0
    sql = f"SELECT sample_key, status, error, {', '.join(SCORES)} FROM latents ORDER BY 1"
    assert query(out, sql).equals(query(undisturbed, sql))
    sql = "SELECT sample_key, input.bytes FROM images ORDER BY 1"
    assert query(out, sql).equals(query(undisturbed, sql))


def test_a_source_without_the_pictures_is_refused(
    rescored: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["rescore", rescored, str(tmp_path / "out"), "--engine", "inline", "--no-flow"]
    assert run_app(command) == 2
    assert "has stored no pictures 'inversion', only codes" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_damaged_source_is_quarantined_and_retried(undisturbed: str, tmp_path: Path) -> None:
    source, out = tmp_path / "source", str(tmp_path / "out")
    shutil.copytree(undisturbed, source)
    part = source / read_markers(str(source))[1].parts["images"].path
    data = part.read_bytes()
    part.write_bytes(data[:100])
    with pytest.raises(LedgerError, match=f"{part.name}: of 100 bytes, not {len(data)}"):
        rescore_inline(str(source), out)
    part.write_bytes(bytes(len(data)))  # its size is as committed
    summary = rescore_inline(str(source), out)
    assert list(summary.outcome.quarantined) == [1]
    assert any(problem.startswith("shard 00001: given up") for problem in summary.problems)
    part.write_bytes(data)
    assert rescore_inline(str(source), out).is_clean
    assert committed(out) == set(range(6))
    assert verify(out).problems == []
