"""Every way to find a direction, from its config to its files."""

import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from models.checkpoints.native import save_generator
from models.editing.direction import load_direction
from models.editing.find import find_direction
from models.errors import AssetError, ConfigError
from models.statistics import statistics_for
from models.stylegan2.generator import Generator
from pipeline.config import load_dataclass
from tasks.directions import ways as directions
from tasks.directions.ways import (
    WAYS,
    Component,
    FitDirectionsConfig,
    FitGanspaceConfig,
    FitSefaConfig,
    FitTextConfig,
    ImportConfig,
    TextPair,
    fit,
)


@pytest.fixture
def common(tiny_generator: Generator, tmp_path: Path) -> dict[str, str]:
    path = save_generator(tiny_generator, tmp_path / "tiny.safetensors", {"terms": "test"})
    return {"generator": str(path), "out": str(tmp_path / "found")}


def test_ganspace(common: dict[str, Any], tiny_generator: Generator) -> None:
    named = Component(component=1, name="pose", layers=(0, 1), is_set=True)
    first, second = fit(FitGanspaceConfig(components=(Component(component=0), named), **common))
    assert (first.name, second.name) == ("component-0.json", "pose.json")
    pose = find_direction("pose", tiny_generator, (common["out"],))
    statistics = statistics_for(tiny_generator)
    torch.testing.assert_close(pose.vector, statistics.w_component[1])
    assert pose.layers == (0, 1)
    assert pose.origin is not None
    with pytest.raises(ConfigError, match="two of the same name among pose, pose"):
        fit(FitGanspaceConfig(components=(named, named), **common))


def test_sefa(common: dict[str, Any]) -> None:
    found = fit(FitSefaConfig(layers=(2, 3), count=2, prefix="mid", **common))
    assert [path.name for path in found] == ["mid-0.json", "mid-1.json"]
    values = [load_direction(path).card["eigenvalue"] for path in found]
    assert values[0] > values[1] > 0


def test_a_raw_file(common: dict[str, Any], tmp_path: Path) -> None:
    np.save(tmp_path / "pose.npy", 2 * np.eye(16, dtype=np.float32)[3])
    (path,) = fit(ImportConfig(file=str(tmp_path / "pose.npy"), unit=2.0, terms="MIT", **common))
    found = load_direction(path)
    assert (found.name, found.unit, float(found.vector[3])) == ("pose", 2.0, 1.0)
    assert found.card["terms"] == "MIT"


class Colours:
    """Embeds the mean colour; knows the words red and green."""

    name, hash = "colours", "c0" * 32
    calls = 0

    def to(self, device: object) -> "Colours":
        return self

    def images(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return F.normalize(images.mean((2, 3)) + torch.tensor([0.0, 0.0, 0.5]), dim=1)

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        rows = [[text.count("red"), text.count("green"), 1e-3] for text in texts]
        return F.normalize(torch.tensor(rows), dim=1)


def test_texts(
    common: dict[str, Any], tiny_generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = Colours()
    monkeypatch.setattr(directions, "load_clip", lambda source: clip)
    pairs = (
        TextPair(name="greener", source="red face", target="green face", count=5),
        TextPair(name="redder", source="green face", target="red face", count=5),
    )
    paths = fit(FitTextConfig(pairs=pairs, samples=2, **common))
    greener, redder = (load_direction(path) for path in paths)
    assert (greener.space, greener.card["channels"]) == ("s", 5)
    assert (greener.card["from"], greener.card["clip_sha256"]) == ("red face", clip.hash)
    torch.testing.assert_close(greener.vector, -redder.vector)
    greener.check_generator(tiny_generator)


def test_bad_texts_are_refused_before_any_picture(
    common: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = Colours()
    monkeypatch.setattr(directions, "load_clip", lambda source: clip)
    pairs = (TextPair(name="same", source="red face", target="red mouth"),)
    with pytest.raises(ConfigError, match="have the same embedding"):
        fit(FitTextConfig(pairs=pairs, **common))
    assert clip.calls == 0
    monkeypatch.undo()
    with pytest.raises(AssetError, match=r"no/such/folder"):
        fit(FitTextConfig(pairs=pairs, clip="no/such/folder", **common))


PAGE = Path(__file__).resolve().parents[3] / "docs" / "editing.md"
EXAMPLES = dict(
    re.findall(
        r"```toml\n# refinery directions fit (\w+) --config [^\n]*\n(.*?)```",
        PAGE.read_text("utf-8"),
        re.DOTALL,
    )
)


@pytest.mark.parametrize("way", WAYS)
def test_the_settings_in_the_documents_are_read(way: str, tmp_path: Path) -> None:
    """Every way has an example there, and the command's own reader accepts it."""
    path = tmp_path / "settings.toml"
    path.write_text(EXAMPLES[way], "utf-8")
    config = load_dataclass(WAYS[way][0], str(path), [])
    assert type(config) is WAYS[way][0]
    for name, value in tomllib.loads(EXAMPLES[way]).items():
        read = getattr(config, name)
        assert len(read) == len(value) if isinstance(value, list) else read == value


def test_every_way_has_its_own_settings() -> None:
    assert set(WAYS) == {"boundary", "ganspace", "sefa", "text", "file"}
    kinds = [kind for kind, _ in WAYS.values()]
    assert len(set(kinds)) == len(kinds)
    with pytest.raises(ConfigError, match="no way has settings FitDirectionsConfig; ways: bound"):
        fit(FitDirectionsConfig())
