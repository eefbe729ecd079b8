"""SeFa against its definition and against published implementations' outputs."""

from pathlib import Path

import numpy as np
import pytest
import torch

from models.checkpoints.load import load_generator
from models.editing.ganspace import spread_along
from models.editing.sefa import sefa_directions, sefa_factors
from models.errors import ConfigError
from models.statistics import compute_statistics
from models.stylegan2.generator import Generator, weights_hash


def test_factors_are_the_eigenvectors(tiny_generator: Generator) -> None:
    """A^T A v = lambda v with rows of A of norm 1; largest first; signs are fixed."""
    vectors, values = sefa_factors(tiny_generator, (0, 3, 7))
    affines = [tiny_generator.conv(0).conv, tiny_generator.conv(3).conv]
    affines.append(tiny_generator.layers()[-1][1])
    rows = torch.cat([a.modulation.weight for a in affines]).double()
    rows = rows / rows.norm(dim=1, keepdim=True)
    torch.testing.assert_close(rows.T @ rows @ vectors.T, vectors.T * values)
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(16).double())
    assert bool((values[:-1] >= values[1:]).all())
    assert float(values.sum()) == pytest.approx(len(rows))  # each channel weighs the same
    assert bool((vectors.gather(1, vectors.abs().argmax(1, keepdim=True)) > 0).all())


def test_directions_move_the_layers_they_come_from(tiny_generator: Generator) -> None:
    statistics = compute_statistics(tiny_generator, samples=500)
    found = sefa_directions(tiny_generator, statistics, (5, 2), count=3)
    vectors, values = sefa_factors(tiny_generator, (2, 5))
    assert [d.name for d in found] == ["sefa-0", "sefa-1", "sefa-2"]
    for index, direction in enumerate(found):
        torch.testing.assert_close(direction.vector, vectors[index].float())
        assert direction.layers == (2, 5)
        assert direction.unit == spread_along(statistics, direction.vector)
        assert direction.card["eigenvalue"] == pytest.approx(float(values[index]), abs=1e-6)
        assert direction.generator_hash == weights_hash(tiny_generator)


@pytest.mark.parametrize("layers", [(), (8,), (-1,), (2, 2)])
def test_layers_that_are_not_there(tiny_generator: Generator, layers: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r"expected different layers in 0..7, got"):
        sefa_factors(tiny_generator, layers)


def test_too_many_directions(tiny_generator: Generator) -> None:
    statistics = compute_statistics(tiny_generator, samples=50)
    with pytest.raises(ConfigError, match=r"expected a count in 1..16, got 17"):
        sefa_directions(tiny_generator, statistics, (0,), count=17)


GOLDEN = {
    "e4e.all": range(9),
    "e4e.l0-3": range(4),
    "e4e.l4-7": range(4, 8),
    "e4e.l8": (8,),
    "genforce.all": range(10),
    "genforce.l0-3": range(4),
    "genforce.l4,6": (4, 6),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_published_implementations(shared: Path, case: str) -> None:
    """Same eigenvalues and, where they are simple, same eigenvectors up to sign; theirs are sorted
    here, as they are left in the order of a solver."""
    generator = load_generator(str(shared / "golden/rosinality_64/checkpoint.pt"))
    golden = np.load(shared / "golden/sefa/io.npz")
    theirs = torch.from_numpy(golden[f"{case}.eigval"]).double()
    order = theirs.argsort(descending=True)
    theirs, rows = theirs[order], torch.from_numpy(golden[f"{case}.eigvec_rows"]).double()[order]
    vectors, values = sefa_factors(generator, tuple(GOLDEN[case]))
    torch.testing.assert_close(values, theirs, atol=2e-5, rtol=1e-5)
    cosines = (vectors[:8] * rows[:8]).sum(1).abs()
    assert float(cosines.min()) > 1 - 1e-6
    # Float32 solvers of the originals: the leading subspace agrees far better than that.
    inside = torch.linalg.svdvals(vectors[:4] @ rows[:4].T)
    assert float(inside.min()) > 1 - 1e-7


def test_double_precision_truth(shared: Path) -> None:
    generator = load_generator(str(shared / "golden/rosinality_64/checkpoint.pt"))
    golden = np.load(shared / "golden/sefa/io.npz")
    for name, layers in (("norm_conv_only", range(9)), ("norm_with_last_torgb", range(10))):
        vectors, values = sefa_factors(generator, tuple(layers))
        want = torch.from_numpy(golden[f"truth64.{name}.eigval"])
        torch.testing.assert_close(values, want, atol=1e-5, rtol=1e-6)
        rows = torch.from_numpy(golden[f"truth64.{name}.eigvec_rows"])
        assert float((vectors[:8] * rows[:8]).sum(1).abs().min()) > 1 - 1e-8
