"""Any checkpoint to ours or to rosinality's, discriminator and provenance included."""

import pytest
import torch

from models.checkpoints.convert import convert
from models.checkpoints.load import load_discriminator, load_generator
from models.errors import AssetError, ConfigError
from models.stylegan2.generator import weights_hash


@pytest.fixture
def snapshot(dump_nvidia, nvidia_generator, nvidia_discriminator):
    return dump_nvidia(
        {
            "G_ema": nvidia_generator(c=3, clamp=256),
            "D": nvidia_discriminator(c=3, clamp=256, group=2),
        }
    )


@pytest.mark.parametrize("name", ["out.safetensors", "out.pt", "out.pth"])
def test_convert_keeps_everything(snapshot, tmp_path, name):
    written = convert(snapshot, tmp_path / name, card={"terms": "mine"})
    assert written[0] == tmp_path / name
    assert all(path.is_file() for path in written)
    source, target = load_generator(snapshot), load_generator(written[0])
    assert weights_hash(source) == weights_hash(target)
    assert source.architecture == target.architecture
    d, e = load_discriminator(snapshot), load_discriminator(written[0])
    assert weights_hash(d) == weights_hash(e)
    assert (e.stddev_group, e.conv_clamp, e.c_dim) == (2, 256.0, 3)
    assert not list(tmp_path.glob("*.tmp"))
    if name == "out.safetensors":
        assert [p.name for p in written] == [
            "out.safetensors",
            "out.json",
            "out.discriminator.safetensors",
            "out.discriminator.json",
        ]
        card = target.provenance["card"]
        assert card["terms"] == "mine"
        assert card["provenance"]["source"] == "network.pkl"


def test_there_and_back(snapshot, tmp_path):
    convert(snapshot, tmp_path / "a.pt")
    convert(tmp_path / "a.pt", tmp_path / "b.safetensors")
    convert(tmp_path / "b.safetensors", tmp_path / "c.pt")
    assert weights_hash(load_generator(tmp_path / "c.pt")) == weights_hash(load_generator(snapshot))


def test_half_precision(snapshot, tmp_path):
    written = convert(snapshot, tmp_path / "h.safetensors", dtype=torch.float16)
    exact, half = load_generator(snapshot), load_generator(written[0])
    assert torch.equal(half.conv1.conv.weight, exact.conv1.conv.weight.half().float())


def test_generator_alone(dump_nvidia, nvidia_generator, tmp_path, caplog):
    path = dump_nvidia({"G_ema": nvidia_generator()})
    written = convert(path, tmp_path / "g.safetensors")
    assert [p.name for p in written] == ["g.safetensors", "g.json"]
    assert "the discriminator is left out" in caplog.text


def test_requests_that_make_no_sense(snapshot, tmp_path):
    with pytest.raises(ConfigError, match=r"suffix '.onnx'; expected .safetensors"):
        convert(snapshot, tmp_path / "g.onnx")
    with pytest.raises(AssetError, match="no folder"):
        convert(snapshot, tmp_path / "nowhere" / "g.pt")
    pt = convert(snapshot, tmp_path / "g.pt")[0]
    with pytest.raises(ConfigError, match="is the source itself"):
        convert(pt, tmp_path / "g.pt")
    with pytest.raises(AssetError, match="no such file"):
        convert(tmp_path / "missing.pkl", tmp_path / "h.pt")
