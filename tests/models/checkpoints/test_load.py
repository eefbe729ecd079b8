"""Dispatch by content, bundled names, and what a stranger's file is told."""

import json

import pytest
import torch

from models.checkpoints import bundled
from models.checkpoints.load import load_discriminator, load_generator, sniff
from models.checkpoints.native import save_generator
from models.errors import AssetError
from models.stylegan2.generator import weights_hash


def test_the_suffix_does_not_matter(tmp_path, tiny_generator, dump_nvidia, nvidia_generator):
    rosinality = tmp_path / "weights.pkl"
    torch.save({"g_ema": tiny_generator.state_dict()}, rosinality)
    assert sniff(rosinality) == "rosinality"
    assert load_generator(str(rosinality)).provenance["format"] == "rosinality"
    legacy = tmp_path / "weights.bin"
    torch.save({"g_ema": tiny_generator.state_dict()}, legacy, _use_new_zipfile_serialization=False)
    assert sniff(legacy) == "rosinality"
    assert weights_hash(load_generator(legacy)) == weights_hash(tiny_generator)
    nvidia = dump_nvidia({"G_ema": nvidia_generator()}, name="network.pt")
    assert sniff(nvidia) == "nvidia"
    assert load_generator(nvidia).provenance["format"] == "nvidia"
    native = save_generator(tiny_generator, tmp_path / "g", {})
    assert sniff(native) == "native"


@pytest.mark.parametrize("length", [0x80, 0x4B50, 0x3C, 0x7B, 0x280])
def test_header_lengths_that_look_like_other_formats(tmp_path, length):
    path = tmp_path / "weights"
    path.write_bytes(length.to_bytes(8, "little") + b'{"__metadata__":{}}')
    assert sniff(path) == "native"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "found an empty file"),
        (b"<!DOCTYPE html><html>Sign in", "found a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer.*git lfs pull"),
        (b"\x1f\x8b\x08\x00", "gzip archive: unpack it first"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
        (b'{"format": 1}', "a JSON file: name the .safetensors file beside it"),
        (b"hello world", "first bytes 68 65 6c 6c 6f"),
    ],
)
def test_strangers(tmp_path, content, message):
    path = tmp_path / "generator.pkl"
    path.write_bytes(content)
    for load in (load_generator, load_discriminator):
        with pytest.raises(
            AssetError, match=f"not a checkpoint: .*{message}.*supported: rosinality"
        ):
            load(path)


def test_cut_pickle(dump_nvidia, nvidia_generator):
    path = dump_nvidia({"G_ema": nvidia_generator()})
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(AssetError, match=r"not a readable network pickle .* download it again"):
        load_generator(path)


def test_tensorflow_pickle_is_told_what_to_do(tmp_path):
    path = tmp_path / "stylegan2-ffhq-config-f.pkl"
    path.write_bytes(b"\x80\x03cdnnlib.tflib.network\nNetwork\n)\x81.")
    with pytest.raises(AssetError, match=r"dnnlib.tflib.network.Network.*legacy.py"):
        load_generator(path)


def test_paths_that_lead_nowhere(tmp_path):
    with pytest.raises(AssetError, match="no such file and no bundled generator of that name"):
        load_generator("no-such-thing")
    with pytest.raises(AssetError, match="this is a folder"):
        load_generator(tmp_path)
    with pytest.raises(AssetError, match="found a URL: download it first"):
        load_generator("https://example.org/ffhq.pkl")


@pytest.fixture
def assets(tmp_path, monkeypatch, tiny_generator):
    folder = tmp_path / "assets"
    (folder / "tiny32").mkdir(parents=True)
    save_generator(tiny_generator, folder / "tiny32" / "generator", {}, torch.float16)
    (folder / "tiny32" / "statistics.safetensors").write_bytes(b"x")
    (folder / "trunk").mkdir()
    (folder / "trunk" / "trunk.safetensors").write_bytes(b"x")
    monkeypatch.setattr(bundled, "ASSETS", folder)
    return folder


def test_bundled_names(assets):
    assert bundled.bundled_names() == ["tiny32"]
    generator = load_generator("tiny32")
    assert generator.provenance["format"] == "bundled"
    assert generator.provenance["source"] == "tiny32"
    assert bundled.asset_path("trunk", "trunk.safetensors") == assets / "trunk/trunk.safetensors"
    with pytest.raises(AssetError, match=r"no bundled e4e.safetensors under the name 'tiny32'"):
        bundled.asset_path("tiny32", "e4e.safetensors")
    with pytest.raises(AssetError, match="known names: tiny32"):
        bundled.asset_path("faces1024", "generator.safetensors")
    with pytest.raises(AssetError, match="known names: tiny32"):
        bundled.asset_path("../assets/tiny32", "generator.safetensors")
    with pytest.raises(AssetError, match=r"no generator.discriminator.safetensors beside it"):
        load_discriminator("tiny32")


def test_find_for_generator(assets):
    digest = weights_hash(load_generator("tiny32"))
    found = bundled.find_for_generator(digest, "statistics.safetensors")
    assert found == assets / "tiny32" / "statistics.safetensors"
    assert bundled.find_for_generator(digest, "e4e.safetensors") is None
    assert bundled.find_for_generator("0" * 64, "statistics.safetensors") is None
    # An encoder in a folder of its own names the generator in its own card.
    (assets / "other").mkdir()
    (assets / "other" / "e4e.safetensors").write_bytes(b"x")
    (assets / "other" / "e4e.json").write_text(json.dumps({"generator_hash": digest}))
    found = bundled.find_for_generator(digest, "e4e.safetensors")
    assert found == assets / "other" / "e4e.safetensors"
