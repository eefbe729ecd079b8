"""Identity through the door: a run's column, and the table of `refinery benchmark inversion`."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from models.errors import AssetError
from models.losses.dlib_face import DlibFace
from models.losses.identity import load_identity
from pipeline.cli import run_app
from tasks.benchmark import faces
from tasks.benchmark.inversion import identity_loss
from tasks.run.query import query
from tests.tasks.small_run import write_pictures

pytestmark = pytest.mark.slow


def lacking() -> None:
    raise AssetError("identity_judge: package of the judge is not installed")


def benchmark(place: Path, data: Path, *options: str) -> dict:
    command = ["benchmark", "inversion", str(place), "--data", str(data), "--engine", "inline"]
    assert run_app([*command, "--methods", "e4e,refine", *options]) == 0
    return json.loads((place / "inversion.json").read_text())


def test_a_method_without_a_network_has_no_note_of_a_loss(tmp_path: Path) -> None:
    assert identity_loss("") == ""
    assert identity_loss(str(tmp_path / "nothing.safetensors")) == ""
    card = {"provenance": {"settings": {"identity": "dlib"}}}
    (tmp_path / "e4e.json").write_text(json.dumps(card))
    said = identity_loss(str(tmp_path / "e4e.safetensors"))
    assert said == "e4e was trained with an identity loss (dlib)"


def test_the_table_knows_persons_and_edits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, face_bytes: list[bytes]
) -> None:
    torch.manual_seed(0)
    save_file(DlibFace().state_dict(), tmp_path / "face.safetensors")
    network = load_identity(tmp_path / "face.safetensors")
    monkeypatch.setattr(faces, "NETWORKS", {"identity": lambda: network, "identity_judge": lacking})
    pictures = write_pictures(tmp_path / "in", face_bytes, broken=0)

    few = benchmark(tmp_path / "few", pictures, "--limit", "3")
    assert few["pictures"] == 3
    all_ = benchmark(tmp_path / "all", pictures)
    assert all_["pictures"] == 8
    assert all_["faces"] == {"identity": network.hash}
    for row in all_["rows"].values():
        assert -1 <= row["identity_edited"] < 1
        assert -1 <= row["identity"] < 1
        assert "identity_judge" not in row
        assert {"age", "smile", "gender"} == set(row["edits"]["smile-3"]["change"])
        # Codes of anything are codes of faces: an edit of age makes the render older.
        assert row["age_change"] > 3
        assert row["smile_change"] > 0
        assert row["seconds_per_image_ci"] > 0

    page = (tmp_path / "all" / "inversion.md").read_text()
    head = next(line for line in page.splitlines() if "age, years" in line)
    assert head.startswith("| method | age, years ↑ | smile, logits ↑ | identity ↑ | LEC ↓ |")
    age = all_["rows"]["e4e"]["age_change"]
    assert f"| e4e | {age:.1f} |" in page
    assert "(identity_judge: package of the judge is not installed)" in page


def test_a_network_trained_with_an_identity_loss_says_so(
    tmp_path: Path, face_bytes: list[bytes]
) -> None:
    bundled = Path(faces.__file__).parents[2] / "models/assets/faces64"
    weights = tmp_path / "weights"
    weights.mkdir()
    card = json.loads((bundled / "e4e.json").read_text())
    card["provenance"].setdefault("settings", {})["identity"] = "dlib_face.safetensors"
    (weights / "e4e.json").write_text(json.dumps(card))
    (weights / "e4e.safetensors").symlink_to(bundled / "e4e.safetensors")
    pictures = write_pictures(tmp_path / "in", face_bytes[:2], broken=0)
    found = benchmark(tmp_path / "out", pictures, "--weights", str(weights))
    note = "e4e was trained with an identity loss (dlib_face.safetensors)"
    assert note in found["notes"]["e4e"]
    assert note in found["notes"]["refine"]  # begins with e4e


def test_a_run_has_the_column_that_the_setting_asks_for(
    tmp_path: Path, face_bytes: list[bytes]
) -> None:
    torch.manual_seed(0)
    network = tmp_path / "face.safetensors"
    save_file(DlibFace().state_dict(), network)
    pictures = write_pictures(tmp_path / "in", face_bytes[:3], broken=0)
    flags = ["--engine", "inline", "--no-flow", "--set", f"identity={network}"]
    flags += ["--set", "perceptual=none"]
    assert run_app(["invert", str(pictures), str(tmp_path / "run"), *flags]) == 0
    rows = query(
        str(tmp_path / "run"),
        "SELECT identity, input, inversion FROM latents JOIN images USING (sample_key)",
    ).to_pylist()
    identity = load_identity(network)
    for row in rows:
        before, after = (pixels(row[name]["bytes"]) for name in ("input", "inversion"))
        assert row["identity"] == pytest.approx(float(identity(before, after)), abs=1e-5)
        assert row["identity"] < 0.9999
    assert len(rows) == 3


def pixels(data: bytes) -> torch.Tensor:
    image = np.array(Image.open(io.BytesIO(data)).convert("RGB"))
    return torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1
