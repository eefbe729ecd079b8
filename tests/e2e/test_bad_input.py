"""What is wrong is said in one line, before any work where that can be known."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.cli import run_app
from tasks.run.ledger import read_quarantine
from tests.e2e.small_dataset import Dataset, write_tars
from tests.s3_server import S3Server


def test_corrupt_tar_is_quarantined_and_the_run_goes_on(
    dataset: Dataset,
    tmp_path: Path,
    face_bytes: list[bytes],
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, run = write_tars(tmp_path / "tars", face_bytes), str(tmp_path / "run")
    flags = ["--config", dataset.config, "--engine", "inline", "--no-flow"]
    assert run_app(["invert", str(source), run, *flags]) == 1
    out, err = capsys.readouterr()
    assert "3 in 2 shards, 0 failed" in out
    assert "Quarantined shards (run again to retry)" in out
    assert "1 shards quarantined" in err
    assert "Traceback" not in out + err
    (reason,) = read_quarantine(run).values()
    assert "bad.tar" in reason.reason
    assert reason.attempts == 1  # no later try would help
    assert (tmp_path / "run" / "_SEALED.json").exists()

    assert run_app(["status", run]) == 1
    out, _ = capsys.readouterr()
    assert "1 of 2 committed, 0 pending" in out
    assert "bad.tar" in "".join(out.split())
    assert run_app(["query", run, "SELECT count(*) AS n FROM latents"]) == 0
    assert "3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "flags", "why"),
    [
        (None, ["--set", "engine.actor=2"], "engine.actor: unknown key; did you mean 'actors'?"),
        (None, ["--config", "none.toml"], "config none.toml: cannot be read"),
        (None, ["--set", "generator=no/such.pt"], "no/such.pt"),
        (None, ["--method", "w_plus"], "unknown method 'w_plus'; did you mean 'wplus'?"),
        (None, ["--set", "method.0.space=z"], "method.0.space: expected"),
        ("/no/such/folder", [], "/no/such/folder"),
        ("https://example.org/pictures", [], "https:// is not supported"),
        ("s3:/bucket/pictures", [], "Write s3://bucket/pictures"),
    ],
)
def test_wrong_settings_and_places(
    dataset: Dataset, tmp_path: Path, capsys: Any, source: str | None, flags: list[str], why: str
) -> None:
    run = tmp_path / "run"
    config = [] if "--config" in flags else ["--config", dataset.config]
    words = ["invert", source or dataset.source, str(run), *config, *flags, "--no-flow"]
    assert run_app(words) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert why in err
    assert "Traceback" not in err
    assert out == ""
    assert not run.exists()


def test_wrong_checkpoint(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.pt"
    broken.write_bytes(b"this is not a checkpoint")
    flags = ["--config", dataset.config, "--set", f"generator={broken}", "--no-flow"]
    assert run_app(["invert", dataset.source, str(tmp_path / "run"), *flags]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert "broken.pt" in err
    assert not (tmp_path / "run").exists()


def test_output_inside_the_input(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    run = f"{dataset.source}/run"
    flags = ["--config", dataset.config, "--no-flow"]
    assert run_app(["invert", dataset.source, run, *flags]) == 2
    assert "lies inside IN" in capsys.readouterr().err
    assert not Path(run).exists()


def test_wrong_credentials(
    dataset: Dataset,
    s3: str,
    s3_server: S3Server,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    flags = ["--config", dataset.config, "--engine", "inline", "--no-flow"]
    with s3_server.checks_credentials():
        assert run_app(["invert", dataset.source, f"{s3}/run", *flags]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert "the server refused the credentials (InvalidAccessKeyId)" in err
    assert "Check AWS_ACCESS_KEY_ID" in err
    assert "Traceback" not in err


def test_wrong_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(["invert", "only-one"]) == 2
    assert "OUT" in capsys.readouterr().err
