"""Encoder files: our format round-trips, official ones load strictly, wrong ones are named."""

import argparse
import gzip
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from models.encoders.checkpoint import (
    build_encoder,
    load_encoder,
    save_encoder,
)
from models.encoders.e4e import Encoder4Editing
from models.encoders.psp import GradualStyleEncoder
from models.errors import AssetError
from tests.models.tiny_networks import ARCHITECTURE


@pytest.fixture
def native(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    card = {"generator_hash": "ab" * 32, "terms": "test"}
    return save_encoder(build_encoder(ARCHITECTURE), tmp_path / "e4e.safetensors", card)


def official_state(shared: Path, name: str = "e4e_256") -> dict[str, torch.Tensor]:
    """A state of the official names and shapes that takes no memory: every tensor is one number."""
    with gzip.open(shared / "golden" / "encoders" / "manifest.json.gz") as file:
        shapes = json.load(file)["layouts"][name]["state_dict"]
    state = {}
    for index, (key, shape) in enumerate(shapes.items()):
        value = torch.tensor(0 if key.endswith("tracked") else 0.5 + index / 1000)
        state[key] = value.expand(shape)
    return state


def save_official(path: Path, state: dict[str, torch.Tensor], **top: Any) -> Path:
    torch.save({"state_dict": state, **top}, path)
    return path


def test_native_round_trip_keeps_half_precision_values(native: Path) -> None:
    torch.manual_seed(0)
    original = build_encoder(ARCHITECTURE).state_dict()
    loaded = load_encoder(native, 8, 16)
    assert isinstance(loaded.encoder, Encoder4Editing)
    assert not loaded.encoder.training
    # The weights are as readable as any other file (packages are installed for other users).
    assert native.stat().st_mode == native.with_suffix(".json").stat().st_mode
    assert loaded.encoder.architecture == ARCHITECTURE
    assert loaded.generator_hash == "ab" * 32
    assert loaded.card["terms"] == "test"
    for name, value in loaded.encoder.state_dict().items():
        want = original[name].half().float() if original[name].ndim > 1 else original[name]
        assert torch.equal(value, want), name
        assert value.dtype == original[name].dtype


def test_a_damaged_file_is_named(native: Path) -> None:
    data = bytearray(native.read_bytes())
    data[-1] ^= 1
    native.write_bytes(data)
    with pytest.raises(AssetError, match=r"e4e\.safetensors: sha256 is .* damaged"):
        load_encoder(native, 8, 16)


def test_a_missing_card_and_a_card_of_something_else_are_named(native: Path) -> None:
    card = native.with_suffix(".json")
    content = json.loads(card.read_text())
    card.write_text(json.dumps({**content, "kind": "generator"}))
    with pytest.raises(AssetError, match=r"expected kind .* found 'generator'"):
        load_encoder(native, 8, 16)
    card.unlink()
    with pytest.raises(AssetError, match=r"e4e\.json: no such file; it belongs beside"):
        load_encoder(native, 8, 16)


def test_a_card_of_another_architecture_names_the_difference(native: Path) -> None:
    card = native.with_suffix(".json")
    content = json.loads(card.read_text())
    content["architecture"]["head_width"] = 12
    card.write_text(json.dumps(content))
    with pytest.raises(AssetError, match=r"styles\.0\.convs\.0\.weight expected \[12, 32, 3, 3\]"):
        load_encoder(native, 8, 16)


def test_an_encoder_for_other_rows_is_refused(native: Path) -> None:
    with pytest.raises(AssetError, match="predicts 8 rows of 16, the generator needs 10 rows"):
        load_encoder(native, 10, 16)


@pytest.mark.parametrize(
    ("encoder_type", "cls"),
    [("Encoder4Editing", Encoder4Editing), ("GradualStyleEncoder", GradualStyleEncoder)],
)
def test_official_checkpoint_loads_strictly(
    shared: Path, tmp_path: Path, encoder_type: str, cls: type
) -> None:
    state = official_state(shared)
    average = torch.randn(14, 512)
    options = argparse.Namespace(encoder_type=encoder_type, start_from_latent_avg=True)
    path = save_official(tmp_path / "official.pt", state, latent_avg=average, opts=options)
    loaded = load_encoder(path, 14, 512)
    assert type(loaded.encoder) is cls
    assert loaded.latent_avg is not None
    assert torch.equal(loaded.latent_avg, average)
    assert loaded.generator_hash is None
    found = loaded.encoder.state_dict()
    for key in ("body.3.shortcut_layer.0.weight", "styles.13.convs.10.bias", "latlayer2.weight"):
        assert torch.equal(found[key], state[f"encoder.{key}"])


def test_options_decide_what_is_added(shared: Path, tmp_path: Path) -> None:
    state = {k: v for k, v in official_state(shared).items() if k.startswith("encoder.")}
    options = {"encoder_type": "GradualStyleEncoder", "start_from_latent_avg": False}
    path = save_official(tmp_path / "absolute.pt", state, opts=options)
    average = load_encoder(path, 14, 512).latent_avg
    assert average is not None
    assert not average.any()
    bare = {k.removeprefix("encoder."): v for k, v in state.items()}
    torch.save(bare, tmp_path / "bare.pt")
    assert load_encoder(tmp_path / "bare.pt", 14, 512).latent_avg is None


def test_a_wrong_official_checkpoint_says_what_differs(shared: Path, tmp_path: Path) -> None:
    path = save_official(tmp_path / "e4e.pt", official_state(shared))
    with pytest.raises(AssetError, match=r"18 rows of 512: \d+ missing \(styles\.14\.convs"):
        load_encoder(path, 18, 512)
    state = official_state(shared)
    state["encoder.input_layer.0.weight"] = torch.zeros(()).expand(64, 6, 3, 3)
    del state["encoder.latlayer1.bias"]
    state["encoder.extra.weight"] = torch.zeros(())
    path = save_official(tmp_path / "six.pt", state)
    expected = (
        r"1 missing \(latlayer1\.bias \[512\]\); 1 unexpected \(extra\.weight \[\]\); 1 of another "
        r"shape \(input_layer\.0\.weight expected \[64, 3, 3, 3\] found \[64, 6, 3, 3\]\)"
    )
    with pytest.raises(AssetError, match=expected):
        load_encoder(path, 14, 512)


def test_other_encoder_types_and_files_are_refused(tmp_path: Path) -> None:
    path = save_official(tmp_path / "w.pt", {}, opts={"encoder_type": "SingleStyleCodeEncoder"})
    with pytest.raises(AssetError, match="its encoder is a SingleStyleCodeEncoder; expected one"):
        load_encoder(path, 14, 512)
    (tmp_path / "text.pt").write_text("not a checkpoint")
    with pytest.raises(AssetError, match=r"text\.pt: not a readable torch checkpoint"):
        load_encoder(tmp_path / "text.pt", 14, 512)
    with pytest.raises(AssetError, match="no such file; set `checkpoint`"):
        load_encoder(tmp_path / "absent.pt", 14, 512)


class _Harmless:
    """A pickle that would call a function when it is loaded."""

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (Path("executed"),)


def test_a_pickle_that_runs_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "opts": _Harmless()}, "evil.pt")
    Path("plain.pt").write_bytes(pickle.dumps(_Harmless()))
    for name in ("evil.pt", "plain.pt"):
        with pytest.raises(AssetError, match=r"refused to load|not a readable torch checkpoint"):
            load_encoder(name, 14, 512)
    assert not Path("executed").exists()
