"""The demo's road, with a tiny generator and one step in a loop instead of Ray."""

import io
from pathlib import Path

from rich.console import Console

from pipeline.demo import run_demo
from tests.conftest import make_tiny_generator
from tests.e2e.small_dataset import write_dataset


def test_the_demo_ends_with_the_table_and_the_report(
    tmp_path: Path, face_bytes: list[bytes]
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
    for name in ("astronaut", "drawn-00", "broken-empty", "broken-text", "broken-truncated"):
        assert f"│ {name} " in text
    assert "28 in 1 shards, 3 failed" in text
    assert "1/1 shards, 28 images, 3 failed" in progress.getvalue()
    assert (folder / "pictures" / "TERMS.md").exists()
