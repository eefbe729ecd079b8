"""The trunk distance, and LPIPS around random backbones."""

import hashlib
import json
import warnings
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from safetensors.torch import load_file, save

from models.checkpoints.bundled import asset_path
from models.errors import AssetError, ConfigError
from models.losses.perceptual import Lpips, TrunkDistance, cached_backbone, load_perceptual
from models.losses.torchvision_shim import ensure_torchvision
from models.losses.trunk import (
    PerceptualTrunk,
    TrunkArchitecture,
    load_trunk,
    tap_distance,
    unit_normalise,
)


def smooth_pictures(count: int, size: int = 64, seed: int = 0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 8, 8, generator=rng) * 2 - 1
    return torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")


@pytest.fixture(scope="module")
def distance() -> TrunkDistance:
    found = load_perceptual("refinery")
    assert isinstance(found, TrunkDistance)
    return found


@pytest.fixture
def no_network(monkeypatch, tmp_path) -> Path:
    """An empty hub cache, and downloads that fail."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def refuse(url: str, **_: object) -> None:
        raise URLError(f"no route to {url}")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    return tmp_path


def test_tap_distance_closed_form():
    # Orthogonal unit vectors differ by 2, equal ones by 0; places and taps are averaged.
    a = torch.zeros(1, 2, 1, 2)
    a[0, 0] = 1
    b = a.clone()
    b[0, :, 0, 1] = torch.tensor([0.0, 1.0])
    other = torch.ones(1, 1, 3, 3)
    assert tap_distance([a], [b]).tolist() == [1.0]
    assert tap_distance([a, other], [b, other]).tolist() == [0.5]


def test_unit_normalise_is_smooth_at_zero():
    x = torch.zeros(1, 4, 1, 1, requires_grad=True)
    (gradient,) = torch.autograd.grad(unit_normalise(x).sum(), x)
    assert gradient.flatten().tolist() == pytest.approx([1000.0] * 4)
    assert float(unit_normalise(torch.full((1, 4, 1, 1), 3.0))[0, 0, 0, 0]) == pytest.approx(0.5)


def test_bundled_trunk_matches_its_card():
    path = asset_path("trunk", "trunk.safetensors")
    trunk, card = load_trunk(path)
    assert card["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.stat().st_size <= 1_500_000
    assert sum(p.numel() for p in trunk.parameters()) == card["parameters"] <= 600_000
    assert card["column"] == "trunk_distance"
    assert card["scores"]["spearman"] >= 0.9 > card["scores"]["spearman_mse"]
    assert not any(p.requires_grad for p in trunk.parameters())
    assert all(v.dtype == torch.float16 for v in load_file(path).values())


@pytest.mark.parametrize("size", [32, 50, 64, 256])
def test_distance_of_equal_and_different_pictures(distance, size):
    a, b = smooth_pictures(2, size), smooth_pictures(2, size, seed=1)
    assert distance(a, a).tolist() == [0.0, 0.0]
    found = distance(a, b)
    assert found.shape == (2,)
    assert bool(((found > 0.05) & (found < 4)).all())
    torch.testing.assert_close(distance(b, a), found)
    torch.testing.assert_close(distance.compare(distance.features(a), distance.features(b)), found)
    torch.testing.assert_close(distance(a[1:], b[1:]), found[1:], rtol=1e-4, atol=1e-6)


def test_more_noise_is_further_away(distance):
    a = smooth_pictures(2)
    noise = torch.randn(a.shape, generator=torch.Generator().manual_seed(0))
    values = torch.stack([distance(a, a + s * noise) for s in (0.02, 0.05, 0.1, 0.2, 0.4)])
    assert bool((values.diff(dim=0) > 0).all())


def test_descending_the_distance_recovers_the_picture(distance):
    target = smooth_pictures(1, 32)
    x = torch.zeros_like(target, requires_grad=True)
    optimizer = torch.optim.Adam([x], lr=0.05)
    features = distance.features(target)
    start = float((x.detach() - target).square().mean())
    for _ in range(60):
        optimizer.zero_grad()
        distance.compare(distance.features(x), features).sum().backward()
        optimizer.step()
    assert float((x.detach() - target).square().mean()) < 0.1 * start


def test_too_small(distance):
    with pytest.raises(ValueError, match="at least 32 px, found 16x64"):
        distance.features(torch.zeros(1, 3, 16, 64))


def test_auto_never_downloads(monkeypatch, no_network):
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("auto asked for a download")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
    assert load_perceptual("auto").name == "trunk_distance"


def test_unknown_name():
    with pytest.raises(ConfigError, match=r"expected one of auto, refinery.*found 'lpips'"):
        load_perceptual("lpips")


def test_missing_backbone_says_where_to_put_it(no_network):
    with pytest.raises(AssetError, match=r"alexnet-owt-7be5be79\.pth.*put it at .*hub") as caught:
        load_perceptual("lpips-alex")
    assert str(cached_backbone("alex")) in str(caught.value)
    assert "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth" in str(caught.value)


def make_reference(net: str) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """The package's own LPIPS around a random backbone, and the backbone in torchvision's names."""
    ensure_torchvision()
    import lpips

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    names = {f"features.{key.split('.', 1)[1]}": v for key, v in reference.net.state_dict().items()}
    return reference, names


def test_lpips_equals_the_package(no_network):
    reference, backbone = make_reference("squeeze")
    path = cached_backbone("squeeze")
    path.parent.mkdir(parents=True)
    torch.save({**backbone, "classifier.1.bias": torch.zeros(2)}, path)
    found = load_perceptual("lpips-squeeze")
    assert found.name == "lpips_squeeze"
    a, b = smooth_pictures(2), smooth_pictures(2, seed=1)
    with torch.no_grad():
        expected = reference(a, b).flatten()
    assert float(expected.min()) > 0
    torch.testing.assert_close(found(a, b), expected, rtol=1e-4, atol=1e-7)
    x = torch.zeros(1, 3, 64, 64, requires_grad=True)
    (gradient,) = torch.autograd.grad(found(x, a[:1]).sum(), x)
    assert bool(gradient.isfinite().all())
    assert float(gradient.abs().sum()) > 0


def test_auto_prefers_lpips_where_a_file_is_given(no_network):
    reference, backbone = make_reference("alex")
    path = no_network / "alex.pth"
    torch.save(backbone, path)
    found = load_perceptual("auto", backbone=path)
    assert found.name == "lpips_alex"
    a, b = smooth_pictures(1), smooth_pictures(1, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(found(a, b), reference(a, b).flatten(), rtol=1e-4, atol=1e-7)


def test_wrong_backbones_are_refused(tmp_path):
    path = tmp_path / "net.pth"
    with pytest.raises(AssetError, match=r"does not fit: expected features\.0\.weight .*nothing"):
        Lpips("squeeze", {})
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(AssetError, match=r"backbone .*net\.pth of lpips-squeeze: not a readable"):
        load_perceptual("lpips-squeeze", backbone=path)
    torch.save([1], path)
    with pytest.raises(AssetError, match="expected a state dict, found list"):
        load_perceptual("lpips-squeeze", backbone=path)


def test_load_trunk_errors(tmp_path):
    path = tmp_path / "trunk.safetensors"
    with pytest.raises(AssetError, match=r"trunk\.safetensors is missing"):
        load_trunk(path)
    path.write_bytes(save(PerceptualTrunk().state_dict()))
    card = {"architecture": TrunkArchitecture(widths=(8, 48), depths=(1, 1)).to_dict()}
    path.with_suffix(".json").write_text(json.dumps(card))
    with pytest.raises(AssetError, match=r"does not fit the architecture of trunk\.json"):
        load_trunk(path)
    path.with_suffix(".json").write_text("{}")
    with pytest.raises(AssetError, match="cannot read"):
        load_trunk(path)
