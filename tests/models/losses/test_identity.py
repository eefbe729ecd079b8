"""Identity: strict loading in the official names, crop, cosine."""

import gzip
import json

import pytest
import torch
from torch import nn

from models.errors import AssetError
from models.losses.identity import ArcFace, Identity, load_identity


class FlatFace(nn.Module):
    """A stand-in for ArcFace that shows what it is given."""

    def forward(self, face: torch.Tensor) -> torch.Tensor:
        assert face.shape[2:] == (112, 112)
        return nn.functional.normalize(face.flatten(1), dim=1)


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """Official names and shapes without the memory: every tensor is one repeated value."""
    with torch.device("meta"):
        shapes = ArcFace().state_dict()
    return {
        name: torch.tensor(0 if "tracked" in name else 0.5).to(value.dtype).expand(value.shape)
        for name, value in shapes.items()
    }


def test_names_and_shapes_are_the_official_ones(shared):
    with gzip.open(shared / "golden/encoders/manifest.json.gz", "rt") as file:
        expected = json.load(file)["recipe"]["arcface_ir_se50_112"]["keys"]
    with torch.device("meta"):
        found = ArcFace().state_dict()
    assert {k: list(v.shape) for k, v in found.items()} == {k: v[0] for k, v in expected.items()}


def test_load_is_strict(state, tmp_path):
    path = tmp_path / "model_ir_se50.pth"
    torch.save(state, path)
    found = load_identity(path)
    assert found.name == "identity"
    assert float(found.network.body[7].res_layer[2].weight[0]) == 0.5
    assert not found.network.training
    assert len(found.hash) == 64
    missing = {k: v for k, v in state.items() if k != "output_layer.3.bias"}
    torch.save(missing | {"extra": torch.zeros(2)}, path)
    with pytest.raises(AssetError, match=r"1 missing \(output_layer\.3\.bias \[512\]\).*extra"):
        load_identity(path)


def test_load_errors(tmp_path):
    path = tmp_path / "net.pth"
    with pytest.raises(AssetError, match=r"no such file; give dlib's face network .*ArcFace"):
        load_identity(path)
    path.write_bytes(b"no")
    with pytest.raises(AssetError, match="not a readable torch checkpoint"):
        load_identity(path)
    torch.save([1], path)
    with pytest.raises(AssetError, match="expected a state dict, found list"):
        load_identity(path)


def test_arcface_embeds_on_the_unit_sphere():
    torch.manual_seed(0)
    network = ArcFace().eval()
    with torch.no_grad():
        found = network(torch.rand(1, 3, 112, 112) * 2 - 1)
    assert found.shape == (1, 512)
    assert float(found.norm()) == pytest.approx(1, abs=1e-5)


def test_only_the_crop_counts():
    identity = Identity(FlatFace())
    a = torch.rand(2, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    outside = a.clone()
    outside[:, :, :35], outside[:, :, 223:], outside[..., :32], outside[..., 220:] = 1, 1, 1, 1
    torch.testing.assert_close(identity(a, outside), torch.ones(2))
    inside = a.clone()
    inside[1, :, 35:40, 32:60] = -1
    similarity = identity(a, inside)
    assert float(similarity[0]) == pytest.approx(1, abs=1e-5)
    assert float(similarity[1]) < 0.99


def test_cosine_has_a_closed_form_at_every_size():
    identity = Identity(FlatFace())
    for size in (64, 256, 512):
        red = torch.zeros(1, 3, size, size)
        red[:, 0] = 1
        grey = torch.ones(1, 3, size, size)
        assert float(identity(red, grey)) == pytest.approx(3**-0.5, abs=1e-4)
        assert float(identity(grey, -grey)) == pytest.approx(-1, abs=1e-4)
        torch.testing.assert_close(
            identity.compare(identity.features(red), identity.features(grey)), identity(red, grey)
        )


def test_a_larger_picture_is_averaged():
    identity = Identity(FlatFace())
    small = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    large = small.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(identity.features(large), identity.features(small))
