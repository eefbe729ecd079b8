"""`refinery invert IN OUT --update EARLIER`: what is new or has changed, and a word of the rest."""

import io
import os
import tarfile
from pathlib import Path

import pytest

from pipeline.cli import run_app
from tasks.run.query import query
from tests.e2e.small_dataset import Dataset
from tests.tasks.input_files import add_member


@pytest.fixture
def grown(dataset: Dataset, tmp_path: Path, face_bytes: list[bytes]) -> tuple[Path, list[str]]:
    """A folder whose first state is in tmp_path/first, and the flags of its runs."""
    source = tmp_path / "in"
    source.mkdir()
    for index in range(6):
        (source / f"{index}.png").write_bytes(face_bytes[index])
    write_tar(source / "t.tar", face_bytes[:2])
    write_tar(source / "u.tar", face_bytes[:2])
    flags = ["--config", dataset.config, "--engine", "inline", "--no-flow"]
    assert run_app(["invert", str(source), str(tmp_path / "first"), *flags]) == 0
    return source, flags


def write_tar(path: Path, pictures: list[bytes]) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for index, data in enumerate(pictures):
            add_member(archive, f"{index}.png", data)
    path.write_bytes(buffer.getvalue())


def keys(run: Path) -> list[str]:
    sql = "SELECT sample_key FROM latents ORDER BY sample_key"
    return query(str(run), sql).column(0).to_pylist()


def test_only_what_is_new_or_changed(
    grown: tuple[Path, list[str]],
    tmp_path: Path,
    face_bytes: list[bytes],
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, flags = grown
    os.utime(source / "1.png", (1, 1))  # another etag, the same content
    (source / "2.png").write_bytes(face_bytes[7])  # changed
    (source / "3.png").unlink()
    (source / "0a.png").write_bytes(face_bytes[6])  # new, between others
    (source / "z.png").write_bytes(face_bytes[6])  # new, at the end
    write_tar(source / "u.tar", face_bytes[2:5])
    first, second = tmp_path / "first", tmp_path / "second"
    command = ["invert", str(source), str(second), "--update", str(first), *flags]
    capsys.readouterr()
    assert run_app(command) == 0
    assert keys(second) == ["0a.png", "2.png", "u.tar:0", "u.tar:1", "u.tar:2", "z.png"]
    out = " ".join(capsys.readouterr().out.split())
    assert f"3 unchanged since {first}" in out  # 4 and 5, a shard, and t.tar
    assert f"2 with the same content as in {first}" in out
    assert run_app(["status", str(second)]) == 0
    assert f"3 unchanged since {first}" in " ".join(capsys.readouterr().out.split())
    assert run_app(["verify", str(second)]) == 0
    capsys.readouterr()

    # The same command again resumes; what both runs have done is left alone by the next.
    assert run_app(command) == 0
    assert "0 rows in" in capsys.readouterr().out
    third = [*command[:2], str(tmp_path / "third"), "--update", str(first)]
    assert run_app([*third, "--update", str(second), *flags]) == 0
    assert "nothing new to do" in capsys.readouterr().out
    assert not (tmp_path / "third" / "run.json").exists()


def test_results_of_other_settings_do_not_stand_for_these(
    grown: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, flags = grown
    command = ["invert", str(source), str(tmp_path / "b"), "--update", str(tmp_path / "first")]
    assert run_app([*command, *flags, "--set", "seed=4"]) == 2
    assert "config.seed: 0 in the run, 4 now" in capsys.readouterr().err
    assert run_app([*command[:-1], str(tmp_path / "none"), *flags]) == 2
    assert "no run here" in capsys.readouterr().err


def test_what_an_earlier_run_gave_up_is_done(
    dataset: Dataset, tmp_path: Path, face_bytes: list[bytes]
) -> None:
    source, flags = tmp_path / "in", ["--config", dataset.config, "--engine", "inline", "--no-flow"]
    source.mkdir()
    (source / "a.png").write_bytes(face_bytes[0])
    (source / "b.tar").write_bytes(b"no tar")
    assert run_app(["invert", str(source), str(tmp_path / "first"), *flags]) == 1
    write_tar(source / "b.tar", face_bytes[:2])
    update = ["--update", str(tmp_path / "first")]
    assert run_app(["invert", str(source), str(tmp_path / "second"), *update, *flags]) == 0
    assert keys(tmp_path / "second") == ["b.tar:0", "b.tar:1"]
