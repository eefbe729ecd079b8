"""Statistics against brute force on a tiny generator, and LSAP's anchors against the reference."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from models import statistics
from models.checkpoints.load import load_generator
from models.errors import AssetError
from models.statistics import (
    compute_statistics,
    load_statistics,
    save_statistics,
    statistics_for,
)
from models.stylegan2.generator import Generator, GeneratorArchitecture, weights_hash


def brute_force_w(generator: Generator, samples: int, seed: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    z = [
        torch.randn(min(1000, samples - i), generator.z_dim, generator=rng)
        for i in range(0, samples, 1000)
    ]
    return generator.mapping(torch.cat(z))[:, 0]


def test_equals_brute_force(tiny_generator):
    found = compute_statistics(tiny_generator, samples=2500, seed=3)
    w = brute_force_w(tiny_generator, 2500, 3).double().numpy()
    np.testing.assert_allclose(found.w_mean, w.mean(0), atol=1e-6)
    radius = np.sqrt(((w - w.mean(0)) ** 2).sum(1).mean())
    assert found.w_std == pytest.approx(radius, rel=1e-6)
    components = found.w_component.double().numpy()
    np.testing.assert_allclose(components @ components.T, np.eye(16), atol=1e-5)
    covariance = np.cov(w.T, bias=True)
    np.testing.assert_allclose(
        components.T @ np.diag(found.w_component_std.double() ** 2) @ components,
        covariance,
        atol=1e-5 * np.abs(covariance).max(),
    )
    assert bool((found.w_component_std.diff() <= 0).all())
    projected = (w - w.mean(0)) @ components.T
    np.testing.assert_allclose(found.w_component_std, projected.std(0), rtol=1e-4)
    assert found.generator_hash == weights_hash(tiny_generator)
    torch.testing.assert_close(found.latent_avg, tiny_generator.latent_avg)
    torch.testing.assert_close(
        found.average_image,
        tiny_generator.synthesis(tiny_generator.latent_avg.expand(1, 8, 16))[0],
    )


def test_styles_equal_brute_force(tiny_generator):
    found = compute_statistics(tiny_generator, samples=1300, seed=0)
    w = brute_force_w(tiny_generator, 1300, 0)
    layers = tiny_generator.layers()
    assert len(found.style_mean) == len(layers)
    for index, (_, layer, _) in enumerate(layers):
        styles = layer.modulation(w).double().numpy()
        np.testing.assert_allclose(found.style_mean[index], styles.mean(0), atol=1e-5)
        np.testing.assert_allclose(found.style_std[index], styles.std(0), rtol=1e-3, atol=1e-6)
        unit = styles / np.linalg.norm(styles, axis=1, keepdims=True)
        np.testing.assert_allclose(found.style_anchor[index], unit.mean(0), atol=1e-6)


def test_more_anchor_samples_leave_the_rest_alone(tiny_generator):
    plain = compute_statistics(tiny_generator, samples=700)
    more = compute_statistics(tiny_generator, samples=700, anchor_samples=1900)
    # Chunks of 1,000: the first 700 of z are the same numbers only if drawn in the same call.
    w = brute_force_w(tiny_generator, 1900, 0)
    torch.testing.assert_close(more.w_mean, w[:700].mean(0), atol=1e-5, rtol=1e-5)
    unit = torch.nn.functional.normalize(tiny_generator.conv1.conv.modulation(w), dim=1)
    torch.testing.assert_close(more.style_anchor[0], unit.mean(0), atol=1e-5, rtol=1e-5)
    assert (plain.anchor_samples, more.anchor_samples) == (700, 1900)


def test_anchors_equal_the_reference(shared, monkeypatch):
    generator = load_generator(shared / "golden/rosinality_64/checkpoint.pt")
    golden = np.load(shared / "golden/sncd/io.npz")
    z = torch.from_numpy(golden["in.z_samples"])
    w = generator.mapping(z)[:, 0]
    np.testing.assert_allclose(w[:8], golden["out.w_samples_head"], atol=2e-5)
    monkeypatch.setattr(statistics, "_draw", lambda *_: iter([(w, len(w))]))
    found = compute_statistics(generator, samples=len(w))
    # LSAP's style space: the 3x3 layers and the last ToRGB.
    names = [name for name, _, _ in generator.layers()]
    lsap = [i for i, name in enumerate(names) if "rgb" not in name] + [len(names) - 1]
    assert len(lsap) == 10
    for index, layer in enumerate(lsap):
        expected = golden[f"out.anchor_{index}"][0]
        np.testing.assert_allclose(found.style_anchor[layer], expected, atol=5e-7)


def test_round_trip(tiny_generator, tmp_path):
    found = compute_statistics(tiny_generator, samples=50, seed=9)
    back = load_statistics(save_statistics(found, tmp_path / "new" / "statistics.safetensors"))
    for field in fields(found):
        a, b = getattr(found, field.name), getattr(back, field.name)
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b)
        elif isinstance(a, tuple):
            assert len(a) == len(b)
            assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
        else:
            assert a == b
    assert back.seed == 9


def test_unknown_latent_avg_is_the_sample_mean(tiny_generator):
    tiny_generator.latent_avg.fill_(float("nan"))
    found = compute_statistics(tiny_generator, samples=40)
    assert torch.equal(found.latent_avg, found.w_mean)
    assert bool(found.average_image.isfinite().all())


def test_conditional_generator():
    torch.manual_seed(0)
    architecture = GeneratorArchitecture(
        resolution=8, widths={4: 8, 8: 8}, z_dim=8, w_dim=8, mapping_layers=2, c_dim=3
    )
    found = compute_statistics(Generator(architecture).requires_grad_(False), samples=60)
    assert bool(found.w_mean.isfinite().all())
    assert found.w_std > 0


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "_computed", {})
    monkeypatch.setenv("REFINERY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "statistics"


def refuse(*_, **__):
    raise AssertionError("computed although the cache has it")


def test_statistics_for_computes_once_with_100_000_anchor_samples(tiny_generator, empty_cache):
    first = statistics_for(tiny_generator)
    assert statistics_for(tiny_generator) is first
    assert (first.samples, first.anchor_samples) == (10_000, 100_000)
    assert [p.name for p in empty_cache.iterdir()] == [
        f"{weights_hash(tiny_generator)}.safetensors"
    ]
    tiny_generator.input.input += 1.0
    assert statistics_for(tiny_generator) is not first


def test_another_process_reads_the_cache(tiny_generator, empty_cache, monkeypatch):
    first = statistics_for(tiny_generator)
    monkeypatch.setattr(statistics, "_computed", {})  # as another process has it
    monkeypatch.setattr(statistics, "compute_statistics", refuse)
    second = statistics_for(tiny_generator)
    assert second is not first
    assert all(
        torch.equal(a, b) for a, b in zip(first.style_anchor, second.style_anchor, strict=True)
    )
    assert second.w_std == first.w_std


@pytest.mark.parametrize("fault", ["cut off", "other generator", "fewer samples"])
def test_a_wrong_file_in_the_cache_is_replaced(
    fault, tiny_generator, empty_cache, monkeypatch, caplog
):
    good = statistics_for(tiny_generator)
    path = next(empty_cache.iterdir())
    if fault == "cut off":
        path.write_bytes(path.read_bytes()[:200])
    else:
        wrong = {"generator_hash": "0" * 64} if "other" in fault else {"anchor_samples": 50}
        save_statistics(replace(good, w_std=-1.0, **wrong), path)
    monkeypatch.setattr(statistics, "_computed", {})
    assert statistics_for(tiny_generator).w_std == good.w_std
    assert load_statistics(path).w_std == good.w_std
    assert ("computed again" in caplog.text) == (fault == "cut off")


def test_a_cache_that_cannot_be_written_is_no_error(tiny_generator, empty_cache, caplog):
    empty_cache.parent.write_text("a file where the folder should be")
    assert statistics_for(tiny_generator).anchor_samples == 100_000
    assert "cannot be kept for the next start" in caplog.text


def test_a_failed_write_leaves_the_old_file(tiny_generator, tmp_path, monkeypatch):
    found = compute_statistics(tiny_generator, samples=20)
    path = save_statistics(found, tmp_path / "statistics.safetensors")
    before = path.read_bytes()

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space"):
        save_statistics(replace(found, w_std=0.0), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_statistics_for_prefers_the_bundled_file(tiny_generator, monkeypatch, tmp_path):
    monkeypatch.setattr(statistics, "_computed", {})
    stored = compute_statistics(tiny_generator, samples=20)
    path = save_statistics(stored, tmp_path / "statistics.safetensors")
    asked = []

    def find(digest: str, file: str) -> object:
        asked.append((digest, file))
        return path

    monkeypatch.setattr(statistics, "find_for_generator", find)
    assert statistics_for(tiny_generator).samples == 20
    assert asked == [(weights_hash(tiny_generator), "statistics.safetensors")]
    monkeypatch.setattr(statistics, "_computed", {})
    save_statistics(replace(stored, generator_hash="0" * 64), path)
    with pytest.raises(AssetError, match="made for generator 000"):
        statistics_for(tiny_generator)


def test_errors(tiny_generator, tmp_path):
    with pytest.raises(ValueError, match="found samples=1, anchor_samples=1"):
        compute_statistics(tiny_generator, samples=1)
    with pytest.raises(ValueError, match="anchor_samples=5"):
        compute_statistics(tiny_generator, samples=10, anchor_samples=5)
    path = tmp_path / "statistics.safetensors"
    with pytest.raises(AssetError, match="no such file; make it with"):
        load_statistics(path)
    path.write_bytes(b"no")
    with pytest.raises(AssetError, match="cannot read"):
        load_statistics(path)
    from safetensors.torch import save_file

    save_file({"w_mean": torch.zeros(2)}, path)
    with pytest.raises(
        AssetError, match="expected format 'style-refinery statistics 1', found None"
    ):
        load_statistics(path)
