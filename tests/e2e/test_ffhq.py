"""docs/ffhq.md as a stranger walks it: files of official layout and size, pictures in a bucket."""

import gzip
import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from benchmarks.official import write_e4e
from pipeline.cli import run_app
from tasks.run.ledger import read_markers
from tasks.run.manifest import read_shard_size
from tasks.run.prediction import read_prediction
from tasks.run.query import query
from tasks.run.run_json import read_declared, read_run
from tasks.storage.files import read_bytes, write_bytes
from tests.conftest import make_picture_bytes

PAGE = (Path(__file__).parents[2] / "docs/ffhq.md").read_text()
SLOW = [pytest.mark.slow, pytest.mark.timeout(3000)]
SIZES = [pytest.param(side, marks=SLOW) for side in (256, 1024)]
INLINE = ["--engine", "inline"]


@pytest.fixture(params=SIZES)
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, int]:
    path = tmp_path / "e4e_ffhq_encode.pt"
    return write_e4e(path, request.param), request.param


def test_from_a_bucket_to_edits_and_domains(
    checkpoint: tuple[Path, int],
    shared: Path,
    s3: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    path, side = checkpoint
    with gzip.open(shared / "golden/encoders/manifest.json.gz") as file:
        wanted = json.load(file)["layouts"][f"e4e_{side}"]["state_dict"]
    saved = torch.load(path, weights_only=False, mmap=True)["state_dict"]
    assert {name: list(value.shape) for name, value in saved.items()} == wanted
    for number in range(3):
        write_bytes(f"{s3}/photos/{number}.png", make_picture_bytes(number))
    config = tmp_path / "ffhq.toml"
    config.write_text(PAGE.partition("```toml\n")[2].partition("```")[0])
    sets = ["--set", "input.fit=crop", "--set", "perceptual=refinery"]
    flags = ["--config", str(config), *INLINE, *sets]
    photos, run, edits = f"{s3}/photos", f"{s3}/runs/faces", f"{s3}/runs/edits"

    assert run_app(["plan", photos, run, *flags]) == 0
    said = read_prediction(run)
    assert said is not None
    assert said.rows == 3
    assert run_app(["invert", photos, run, *flags, "--no-flow"]) == 0
    summary = capsys.readouterr().out
    for figure in ("time", "disk", "memory"):
        assert re.search(rf"{figure}.*\(predicted ", summary), summary
    markers = list(read_markers(run).values())
    taken = sum(part.bytes for marker in markers for part in marker.parts.values())
    assert taken == pytest.approx(said.bytes, rel=0.1)
    assert max(marker.memory_bytes for marker in markers) == pytest.approx(
        said.memory_bytes, rel=0.2
    )
    is_large = side > 256
    assert read_declared(run).pictures == ("thumbnail" if is_large else "input", "inversion")
    assert read_shard_size(run) == (64 if is_large else 256)
    assert read_run(run)["config"]["methods"][0]["settings"]["checkpoint"] == str(path.name)

    (tmp_path / "sefa.toml").write_text(f'generator = "{path}"\ncount = 1\nlayers = [2, 3]\n')
    assert run_app(["directions", "fit", "sefa", "--config", str(tmp_path / "sefa.toml")]) == 0
    (direction,) = (tmp_path / "directions").glob("*.json")
    adapt = "adapt style --text 'fantasy painting of a face' --set steps=1 --set batch=2"
    adapt += f" --set validation_codes=2 --set generator={path}"
    assert run_app(shlex.split(adapt)) == 0
    wish = ["--edit", f"{direction}=2", "--domain", "domains/style", "--each"]
    assert run_app(["edit", run, edits, *wish, *INLINE, "--no-flow"]) == 0
    found = query(edits, "SELECT count(*) AS rows FROM edits").to_pylist()
    assert found == [{"rows": 6}]
    assert run_app(["verify", edits]) == 0
    assert run_app(["query", edits, "SELECT count(*) FROM edits"]) == 0
    assert run_app(["report", run]) == 0
    assert b"Predicted time" in read_bytes(f"{run}/report.html")
