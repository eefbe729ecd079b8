"""The method `lsap`: e4e's pass with its own weight file and its own name in messages."""

from pathlib import Path

import pytest
import torch

from models.encoders.checkpoint import build_encoder, save_encoder
from models.errors import AssetError
from models.inversion import weights
from models.inversion.base import SampleRng
from models.inversion.registry import load_method, method_class
from models.stylegan2.generator import Generator, weights_hash
from pipeline.method_table import field_docs
from tests.models.tiny_networks import ARCHITECTURE


def test_it_is_e4e_with_the_bundled_file_of_its_name(
    tiny_generator: Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = {"generator_hash": weights_hash(tiny_generator)}
    asked = []

    def find(digest: str, file: str) -> Path:
        asked.append(file)
        torch.manual_seed(len(file))
        return save_encoder(build_encoder(ARCHITECTURE), tmp_path / file, card)

    monkeypatch.setattr(weights, "find_for_generator", find)
    lsap, e4e = (load_method(name, tiny_generator) for name in ("lsap", "e4e"))
    assert asked == ["lsap.safetensors", "e4e.safetensors"]
    by_hand = load_method("e4e", tiny_generator, checkpoint=str(tmp_path / "lsap.safetensors"))
    images, rng = torch.rand(2, 3, 32, 32) * 2 - 1, SampleRng([0, 1])
    found = lsap.invert(images, None, rng).w_plus
    assert torch.equal(found, by_hand.invert(images, None, rng).w_plus)
    assert not torch.equal(found, e4e.invert(images, None, rng).w_plus)
    assert lsap.hashes() == {"lsap": by_hand.hashes()["e4e"]}


def test_without_weights_it_names_its_training(tiny_generator: Generator) -> None:
    with pytest.raises(AssetError, match=r"lsap: no bundled weights .* `refinery train lsap`"):
        load_method("lsap", tiny_generator)


def test_a_broken_picture_fails_under_its_name(tiny_generator: Generator, tmp_path: Path) -> None:
    path = save_encoder(build_encoder(ARCHITECTURE), tmp_path / "any.safetensors", {})
    method = load_method("lsap", tiny_generator, checkpoint=str(path))
    images = torch.zeros(2, 3, 32, 32)
    images[1, 0, 0, 0] = torch.nan
    found = method.invert(images, None, SampleRng([0, 1]))
    assert list(found.failures) == [1]
    assert found.failures[1].startswith("lsap: the encoder's output is not finite")


def test_inherited_settings_are_documented() -> None:
    assert "official e4e" in field_docs(method_config("lsap"))["checkpoint"]
    docs = field_docs(method_config("lsap_o"))
    assert docs["nscd_weight"].startswith("Weight of the codes' distance")
    assert docs["steps"].startswith("Updates for each picture")


def method_config(name: str) -> type:
    return method_class(name).Config
