"""Principal components of W as directions."""

import pytest
import torch

from models.editing.ganspace import ganspace_direction, spread_along
from models.errors import ConfigError
from models.statistics import compute_statistics
from models.stylegan2.generator import Generator, weights_hash


def test_a_step_is_a_deviation_along_the_component(tiny_generator: Generator) -> None:
    statistics = compute_statistics(tiny_generator, samples=2000)
    found = ganspace_direction(statistics, 2, layers=(1, 2))
    z = torch.randn(2000, 16, generator=torch.Generator().manual_seed(0))
    w = tiny_generator.mapping(z)[:, 0]
    values, vectors = torch.linalg.eigh((w - w.mean(0)).T @ (w - w.mean(0)) / len(w))
    cosine = float(found.vector @ vectors[:, -3])
    assert abs(cosine) == pytest.approx(1.0, abs=1e-4)
    assert found.unit == pytest.approx(float(values[-3].sqrt()), rel=1e-4)
    assert found.card["share_of_variance"] == pytest.approx(float(values[-3] / values.sum()), 1e-3)
    assert (found.name, found.layers) == ("component-2", (1, 2))
    assert found.generator_hash == weights_hash(tiny_generator)


def test_a_set_strength_is_the_published_formula(tiny_generator: Generator) -> None:
    """delta = (strength - coord) v sigma on the rows; a second time changes nothing."""
    statistics = compute_statistics(tiny_generator, samples=500)
    found = ganspace_direction(statistics, 1, layers=(0, 1, 2), is_set=True)
    w_plus = torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(1))
    v, sigma = statistics.w_component[1], statistics.w_component_std[1]
    coord = (w_plus[:, 0] - statistics.w_mean) @ v / sigma
    delta = (2.5 - coord)[:, None, None] * v * sigma
    want = torch.cat([w_plus[:, :3] + delta, w_plus[:, 3:]], 1)
    once = found.apply(w_plus, 2.5)
    torch.testing.assert_close(once, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.apply(once, 2.5), once, atol=1e-5, rtol=1e-5)
    # Row 0 is not in the range: it is the published behaviour that nothing is undone then.
    later = ganspace_direction(statistics, 1, layers=(3, 4), is_set=True)
    twice = later.apply(later.apply(w_plus, 2.5), 2.5)
    assert (twice - later.apply(w_plus, 2.5)).abs().max() > 0.1


def test_spread_along_any_vector(tiny_generator: Generator) -> None:
    statistics = compute_statistics(tiny_generator, samples=500)
    z = torch.randn(500, 16, generator=torch.Generator().manual_seed(0))
    w = tiny_generator.mapping(z)[:, 0]
    vector = torch.randn(16, generator=torch.Generator().manual_seed(2))
    want = (w @ vector / vector.norm()).std(correction=0)
    assert spread_along(statistics, vector) == pytest.approx(float(want), rel=1e-4)
    with pytest.raises(ValueError, match=r"expected a vector of 16 numbers, found \[3\]"):
        spread_along(statistics, torch.ones(3))


def test_a_component_that_is_not_there(tiny_generator: Generator) -> None:
    statistics = compute_statistics(tiny_generator, samples=50)
    with pytest.raises(ConfigError, match=r"expected a component in 0..15, got 16"):
        ganspace_direction(statistics, 16)
