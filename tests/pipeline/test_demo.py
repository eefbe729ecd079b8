"""The demo's road, with a tiny generator and one step in a loop instead of Ray."""

import io
import json
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from pipeline.cli import run_app
from pipeline.demo import run_demo
from tests.conftest import ROOT, make_tiny_generator
from tests.e2e.small_dataset import write_dataset


@pytest.mark.timeout(600)
def test_the_demo_ends_with_the_table_and_the_report_and_can_be_asked(
    tmp_path: Path,
    face_bytes: list[bytes],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    dataset = write_dataset(tmp_path, make_tiny_generator(), face_bytes)
    config = tmp_path / "demo.toml"
    config.write_text(Path(dataset.config).read_text() + 'kind = "inline"\n')
    shown, progress = io.StringIO(), io.StringIO()
    consoles = Console(file=shown, width=160), Console(file=progress, width=160)
    assert run_demo(*consoles, str(tmp_path / "runs"), str(config), adapt_steps=2) == 0
    text = shown.getvalue()
    (folder,) = (tmp_path / "runs").iterdir()
    for name, line in zip(("run", "edits"), text.splitlines()[-2:], strict=True):
        assert line == str(folder / name / "report.html")
        assert (folder / name / "report.html").stat().st_size > 10_000
    assert (folder / "domains" / "painted" / "tokens.safetensors").exists()
    assert "│ painted │       25 │" in text
    assert "--set steps=2" in text
    assert "│ 2 of 2 │" in text
    for name in ("astronaut", "drawn-00", "broken-empty", "broken-text", "broken-truncated"):
        assert f"│ {name} " in text
    assert "28 in 1 shards, 3 failed" in text
    assert "1/1 shards, 28 images, 3 failed" in progress.getvalue()
    assert (folder / "pictures" / "TERMS.md").exists()
    ask_as_the_readme_does(folder, capsys)
    monkeypatch.chdir(tmp_path)
    read_as_the_notebook_does()


def read_as_the_notebook_does() -> None:
    """The cells of docs/runs.ipynb, on the demo below the current folder."""
    cells = json.loads((ROOT / "docs/runs.ipynb").read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    names: dict[str, Any] = {}
    for number, source in enumerate(sources):
        exec(compile(source, f"docs/runs.ipynb, cell {number}", "exec"), names)
    run, drawn = names["run"], names["drawn"]
    assert len(drawn) == 6
    assert names["codes"].shape == (6, *run.snapshot.declared.shape)
    np.testing.assert_array_equal(names["codes"][2], run.code(drawn[2]))
    np.testing.assert_array_equal(names["again"], run.pictures(names["batch"].sample_keys))
    assert names["item"]["inversion"].shape[:2] == (8, 3)
    first = names["data"][0]
    psnr = run.query("SELECT psnr FROM samples WHERE sample_key = $key", key=first["sample_key"])
    assert first["psnr"] == psnr["psnr"][0].as_py()
    assert "painted" in names["variants"]


def ask_as_the_readme_does(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its lines on the demo's runs, as they stand there."""
    (block,) = re.findall(
        r"```sh\ndemo=[^\n]*\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )
    shown = {}
    for line in block.splitlines():
        _, name, *rest = shlex.split(line.replace("$demo", str(folder)), comments=True)
        engine = ["--engine", "inline", "--no-flow"] if name in ("index", "invert") else []
        capsys.readouterr()
        assert run_app([name, *rest, *engine]) == 0, (line, capsys.readouterr())
        shown[name] = capsys.readouterr().out
    for kind, run in (("invert", "run"), ("edit", "edits")):
        assert re.search(rf"│ {run} +│ {kind} ", shown["runs"])
    assert shown["query"].count("│ demo-000000.tar:") == 3
    assert shown["similar"].count("│ demo-000000.tar:drawn-") == 3
    assert "astronaut" not in shown["similar"]
    assert shown["reproduce"].count("same bytes") > 3
    assert "in both       28" in shown["diff"]
    assert list(shown) == [
        *("runs", "query", "index", "similar", "duplicates", "reproduce", "invert", "diff")
    ]
