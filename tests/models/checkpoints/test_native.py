"""Our own format: two files that must belong together."""

import json

import pytest
import torch

from models.checkpoints.load import load_discriminator, load_generator
from models.checkpoints.native import save_discriminator, save_generator
from models.errors import AssetError
from models.stylegan2.discriminator import Discriminator
from models.stylegan2.generator import weights_hash

CARD = {"terms": "CC0-1.0", "provenance": {"trained_on": "smooth noise"}, "images": 7}


@pytest.mark.parametrize("name", ["tiny", "tiny.safetensors", "tiny.v2"])
def test_round_trip(tmp_path, tiny_generator, name):
    path = save_generator(tiny_generator, tmp_path / name, CARD)
    assert path.name == name.removesuffix(".safetensors") + ".safetensors"
    loaded = load_generator(path)
    assert weights_hash(loaded) == weights_hash(tiny_generator)
    assert loaded.architecture == tiny_generator.architecture
    assert loaded.provenance["format"] == "native"
    assert loaded.provenance["terms"] == "CC0-1.0"
    assert loaded.provenance["latent_avg"] == "stored"
    card = loaded.provenance["card"]
    assert card["images"] == 7
    assert card["provenance"] == {"trained_on": "smooth noise"}
    assert card["generator_hash"] == weights_hash(tiny_generator)
    assert card["architecture"]["widths"] == {"4": 16, "8": 16, "16": 8, "32": 8}
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [path.name, path.name.removesuffix(".safetensors") + ".json"]
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_small_and_its_hash_is_stable(tmp_path, tiny_generator, dtype):
    full = save_generator(tiny_generator, tmp_path / "full", {})
    half = save_generator(tiny_generator, tmp_path / "half", {}, dtype)
    assert half.stat().st_size < 0.65 * full.stat().st_size
    loaded = load_generator(half)
    assert loaded.conv1.conv.weight.dtype == torch.float32
    assert loaded.provenance["card"]["generator_hash"] == weights_hash(loaded)
    assert weights_hash(loaded) != weights_hash(tiny_generator)
    again = load_generator(save_generator(loaded, tmp_path / "again", {}, dtype))
    assert weights_hash(again) == weights_hash(loaded)
    assert (tmp_path / "again.safetensors").read_bytes() == half.read_bytes()
    w_plus = torch.randn(1, 8, 16)
    difference = loaded.synthesis(w_plus) - tiny_generator.synthesis(w_plus)
    limit = 2e-3 if dtype == torch.float16 else 2e-2
    scale = tiny_generator.synthesis(w_plus).abs().max()
    assert 0 < float(difference.abs().max() / scale) < limit


def test_weights_that_do_not_fit_are_refused(tmp_path, tiny_generator):
    tiny_generator.style[1].weight.data[0, 0] = 1e6
    with pytest.raises(AssetError, match=r"style.1.weight: values up to 1e\+06 do not fit"):
        save_generator(tiny_generator, tmp_path / "big", {}, torch.float16)
    assert list(tmp_path.iterdir()) == []


def test_provenance_is_inherited(tmp_path, tiny_generator):
    tiny_generator.provenance = {
        "format": "nvidia",
        "source": "ffhq.pkl",
        "terms": "non-commercial",
        "card": None,
    }
    card = load_generator(save_generator(tiny_generator, tmp_path / "g", {})).provenance["card"]
    assert card["terms"] == "non-commercial"
    assert card["provenance"] == {"format": "nvidia", "source": "ffhq.pkl"}


def test_changed_weights_are_noticed(tmp_path, tiny_generator):
    path = save_generator(tiny_generator, tmp_path / "g", {})
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(AssetError, match=r"sha256 .* of the weights, .* in the card"):
        load_generator(path)


def _edit_card(path, **changes):
    card_path = path.with_suffix(".json")
    card_path.write_text(json.dumps({**json.loads(card_path.read_text()), **changes}))


def test_changed_cards_are_noticed(tmp_path, tiny_generator):
    path = save_generator(tiny_generator, tmp_path / "g", {})
    good = json.loads(path.with_suffix(".json").read_text())
    _edit_card(path, architecture={**good["architecture"], "w_dim": 17})
    with pytest.raises(AssetError, match=r"has shape .* expected"):
        load_generator(path)
    _edit_card(path, architecture={**good["architecture"], "widths": {"4": 16}})
    with pytest.raises(AssetError, match="bad architecture in the card"):
        load_generator(path)
    _edit_card(path, architecture=good["architecture"], generator_hash="0" * 64)
    with pytest.raises(AssetError, match="the card names generator 000000000000"):
        load_generator(path)
    _edit_card(path, format="style-refinery 99")
    with pytest.raises(AssetError, match="found 'style-refinery 99', expected 'style-refinery 1'"):
        load_generator(path)
    path.with_suffix(".json").write_text("{")
    with pytest.raises(AssetError, match="cannot be read as JSON"):
        load_generator(path)
    path.with_suffix(".json").unlink()
    with pytest.raises(AssetError, match=r"no card g.json beside it"):
        load_generator(path)


def test_unknown_latent_avg_is_estimated(tmp_path, tiny_generator, caplog):
    tiny_generator.latent_avg.fill_(float("nan"))
    loaded = load_generator(save_generator(tiny_generator, tmp_path / "g", {}))
    assert loaded.provenance["latent_avg"] == "estimated from 10000 samples, seed 0"
    assert "no latent_avg" in caplog.text


def test_discriminator_beside_its_generator(tmp_path, tiny_generator):
    path = save_generator(tiny_generator, tmp_path / "g", {})
    with pytest.raises(AssetError, match=r"no g.discriminator.safetensors beside it"):
        load_discriminator(path)
    d = Discriminator(8, {4: 4, 8: 6}, c_dim=2, mapping_layers=3, stddev_group=2, conv_clamp=5.0)
    beside = save_discriminator(d, tmp_path / "g.discriminator", {"terms": "CC0-1.0"})
    image, c = torch.randn(2, 3, 8, 8), torch.eye(2)
    for source in (path, beside):
        loaded = load_discriminator(source)
        assert torch.equal(loaded(image, c), d(image, c))
        assert (loaded.stddev_group, loaded.conv_clamp, loaded.c_dim) == (2, 5.0, 2)
    with pytest.raises(AssetError, match="found a discriminator, expected a generator"):
        load_generator(beside)


def test_folder_that_cannot_be_written(tmp_path, tiny_generator):
    (tmp_path / "file").touch()
    with pytest.raises(AssetError, match="cannot write the generator"):
        save_generator(tiny_generator, tmp_path / "file" / "g", {})
