"""Frechet distance against closed forms and SciPy's matrix square root."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from models.losses.frechet import FeatureMoments, FrechetFeatures, frechet_distance


def features(count: int, size: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=rng)
    return torch.randn(count, size, generator=rng) @ mix * scale


def test_two_points_have_a_closed_form():
    # Means 0 and 3; variances 2 and 8 with N - 1, 1 and 4 with N.
    a, b = torch.tensor([[-1.0], [1.0]]), torch.tensor([[1.0], [5.0]])
    unbiased = 9 + (2**0.5 - 8**0.5) ** 2
    assert frechet_distance(a, b) == pytest.approx(unbiased)
    assert frechet_distance(a, b, is_unbiased=False) == pytest.approx(9 + (1 - 2) ** 2)


@pytest.mark.parametrize("is_unbiased", [True, False])
def test_equals_the_matrix_square_root(is_unbiased):
    a, b = features(300, 20, 0), features(200, 20, 1, 1.5) + 0.3
    x, y = a.double().numpy(), b.double().numpy()
    sa = np.cov(x.T, bias=not is_unbiased)
    sb = np.cov(y.T, bias=not is_unbiased)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum()
    expected += np.trace(sa + sb - 2 * sqrtm(sa @ sb).real)
    assert frechet_distance(a, b, is_unbiased) == pytest.approx(expected, rel=1e-9)


def test_fewer_pictures_than_features():
    # On a set's own span nothing changes, so the distance is that of the first five coordinates.
    a, b = features(7, 5, 0), features(9, 5, 1)
    rotation = torch.linalg.qr(features(40, 40, 2).double()).Q
    padded = [torch.nn.functional.pad(x.double(), (0, 35)) @ rotation for x in (a, b)]
    assert frechet_distance(*padded) == pytest.approx(frechet_distance(a, b), rel=1e-9)
    assert frechet_distance(padded[0], padded[0]) == pytest.approx(0, abs=1e-9)


def test_a_stream_of_moments_equals_the_whole():
    a, b = features(100, 12, 0) + 50, features(80, 12, 1) + 49
    parts = [FeatureMoments.of(part) for part in a.split(33)]
    total = parts[0]
    for part in parts[1:]:
        total = total.merged(part)
    assert total.count == 100
    np.testing.assert_allclose(total.scatter / 99, np.cov(a.double().numpy().T), rtol=1e-9)
    assert frechet_distance(total, b) == pytest.approx(frechet_distance(a, b), rel=1e-6)


def test_trunk_features_order_sets_by_quality():
    extractor = FrechetFeatures()
    assert extractor.name == "frechet_trunk_distance"
    rng = torch.Generator().manual_seed(0)
    coarse = torch.rand(96, 3, 8, 8, generator=rng) * 2 - 1
    pictures = torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bicubic")
    found = extractor(pictures)
    assert found.shape == (96, 224)
    real = extractor.moments(pictures[:48].split(20))
    same = frechet_distance(real, extractor.moments(pictures[48:].split(16)))
    noise = 0.3 * torch.randn(48, 3, 32, 32, generator=rng)
    noisy = frechet_distance(real, extractor(pictures[48:] + noise))
    flat = frechet_distance(real, extractor(pictures[48:] * 0.3))
    assert 0 < same < noisy
    assert same < flat
    assert frechet_distance(real, found[:48]) == pytest.approx(0, abs=1e-4 * same)


def test_errors():
    a = torch.zeros(5, 3)
    with pytest.raises(ValueError, match=r"at least two pictures, found 1 \(second set\)"):
        frechet_distance(a, a[:1])
    with pytest.raises(ValueError, match="one length, found 3 and 2"):
        frechet_distance(a, a[:, :2])
    with pytest.raises(ValueError, match="found none"):
        FrechetFeatures().moments([])
