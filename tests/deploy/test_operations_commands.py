"""The commands of docs/operations.md for one machine, run in order as they stand there, on a small
bucket."""

import re
import shlex
from pathlib import Path

import pytest

from pipeline.cli import run_app
from tasks.storage.files import exists, write_bytes
from tests.conftest import make_tiny_generator
from tests.deploy.test_operations_doc import TEXT
from tests.e2e.small_dataset import Dataset, write_dataset


@pytest.fixture
def dataset(tmp_path: Path, face_bytes: list[bytes]) -> Dataset:
    return write_dataset(tmp_path / "dataset", make_tiny_generator(), face_bytes)


@pytest.mark.timeout(300)
def test_a_run_on_one_machine(
    s3: str, dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in sorted(Path(dataset.source).iterdir()):
        write_bytes(f"{s3}/pictures/faces/{path.name}", path.read_bytes())
    (block,) = re.findall(r"## One machine\n\n```sh\n(.*?)```", TEXT, re.DOTALL)
    said: dict[str, str] = {}
    for line in block.splitlines():
        words = [word.replace("s3://", f"{s3}/") for word in shlex.split(line, comments=True)][1:]
        if words[0] in ("plan", "invert"):
            # The bundled encoder takes minutes here: the small generator instead.
            words = [word for word in words if word not in ("--method", "e4e")]
            words += ["--config", dataset.config, "--set", "engine.kind=inline"]
        if words[0] == "invert":
            words.append("--no-flow")
        assert run_app(words) == 0, line
        said[words[0]] = " ".join(capsys.readouterr().out.split())
    assert list(said) == ["plan", "invert", "status", "verify", "query", "report"]
    assert "12 in 6 shards, 1 failed" in said["invert"]
    assert "6 of 6 committed" in said["status"]
    assert said["verify"].endswith("clean")
    assert "decode" in said["query"]
    assert exists(f"{s3}/refinery/runs/faces/report.html")
