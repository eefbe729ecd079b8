"""Raw vectors of the field: every layout that is published, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models.editing.files import import_direction
from models.editing.ganspace import ganspace_direction, spread_along
from models.errors import AssetError, ConfigError
from models.statistics import statistics_for
from models.stylegan2.generator import Generator, weights_hash

VECTOR = 3.0 * torch.nn.functional.normalize(
    torch.randn(16, generator=torch.Generator().manual_seed(0)), dim=0
)
ROWS = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))


def write(path: Path, values: torch.Tensor) -> Path:
    if path.suffix == ".npy":
        np.save(path, values.numpy())
    else:
        torch.save(values, path)
    return path


@pytest.mark.parametrize("suffix", [".npy", ".pt"])
@pytest.mark.parametrize("shape", [(16,), (1, 16)])
def test_one_vector(
    tiny_generator: Generator, tmp_path: Path, suffix: str, shape: tuple[int, ...]
) -> None:
    path = write(tmp_path / f"age{suffix}", VECTOR.reshape(shape))
    found = import_direction(path, tiny_generator, layers=(0, 1), terms="MIT")
    torch.testing.assert_close(found.vector, VECTOR / 3)
    assert (found.name, found.space, found.layers) == ("age", "w", (0, 1))
    assert found.generator_hash == weights_hash(tiny_generator)
    assert found.card["terms"] == "MIT"
    # The unit is the deviation of mapped codes along the vector.
    z = torch.randn(20_000, 16, generator=torch.Generator().manual_seed(5))
    along = tiny_generator.mapping(z)[:, 0] @ VECTOR / 3
    assert found.unit == pytest.approx(float(along.std()), rel=0.03)
    given = import_direction(path, tiny_generator, "old", unit=1.0)
    assert (given.name, given.unit) == ("old", 1.0)


@pytest.mark.parametrize("shape", [(8, 16), (1, 8, 16)])
def test_a_vector_for_each_row(
    tiny_generator: Generator, tmp_path: Path, shape: tuple[int, ...]
) -> None:
    """Rows keep their proportions; a step is a deviation along all of them together."""
    path = write(tmp_path / "pose.npy", ROWS.reshape(shape))
    found = import_direction(path, tiny_generator)
    torch.testing.assert_close(found.vector, ROWS / ROWS.norm())
    statistics = statistics_for(tiny_generator)
    sigmas = [spread_along(statistics, row) for row in ROWS]
    shares = ROWS.norm(dim=1) / ROWS.norm()
    assert found.unit == pytest.approx(float(shares @ torch.tensor(sigmas)))
    moved = found.apply(torch.zeros(1, 8, 16), 2.0)[0]
    torch.testing.assert_close(moved, 2 * found.unit * ROWS / ROWS.norm())


def test_equal_rows_step_as_one_vector_does(tiny_generator: Generator, tmp_path: Path) -> None:
    one = import_direction(write(tmp_path / "one.npy", VECTOR), tiny_generator)
    rows = import_direction(write(tmp_path / "rows.npy", VECTOR.expand(8, 16)), tiny_generator)
    w_plus = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(rows.apply(w_plus, 1.5), one.apply(w_plus, 1.5))
    single = torch.zeros(8, 16)
    single[3] = VECTOR
    alone = import_direction(write(tmp_path / "single.npy", single), tiny_generator)
    torch.testing.assert_close(alone.apply(w_plus, 1.5)[:, 3], one.apply(w_plus, 1.5)[:, 3])


@pytest.mark.parametrize("prefix", ["", "lat_"])
@pytest.mark.parametrize("suffix", [".pt", ".npz"])
def test_ganspace_components(
    tiny_generator: Generator, tmp_path: Path, prefix: str, suffix: str
) -> None:
    """In both spellings; with `is_set` equal to our own component of the same numbers."""
    own = statistics_for(tiny_generator)
    content = {
        f"{prefix}comp": own.w_component[:, None],
        f"{prefix}mean": own.w_mean[None],
        f"{prefix}std": own.w_component_std,
    }
    path = tmp_path / f"pca{suffix}"
    if suffix == ".pt":
        torch.save(content, path)
    else:
        np.savez(path, **{k: v.numpy() for k, v in content.items()})
    w_plus = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(2))
    for is_set in (False, True):
        found = import_direction(path, tiny_generator, component=3, is_set=is_set, layers=(0, 2))
        want = ganspace_direction(own, 3, is_set=is_set, layers=(0, 2))
        torch.testing.assert_close(found.apply(w_plus, 1.5), want.apply(w_plus, 1.5))
    with pytest.raises(ConfigError, match=r"holds 16 components; .* \(0..15\), got None"):
        import_direction(path, tiny_generator)
    with pytest.raises(ConfigError, match=r"\(0..15\), got 16"):
        import_direction(path, tiny_generator, component=16)


def test_what_does_not_fit_is_refused(tiny_generator: Generator, tmp_path: Path) -> None:
    cases: dict[str, tuple[Any, str]] = {
        "size": (torch.zeros(1, 512), r"expected 16 numbers, .* found \[1, 512\]: it was made for"),
        "rows": (torch.ones(18, 16), r"for each of 8 rows, .* found \[18, 16\]"),
        "zero": (torch.zeros(16), "all zero or not finite"),
        "nan": (torch.full((16,), float("nan")), "all zero or not finite"),
        "dict": ({"direction": torch.ones(16)}, r"GANSpace's comp, mean and std .*has direction"),
        "list": ([1.0], "expected a tensor or a mapping of tensors"),
    }
    for name, (content, words) in cases.items():
        torch.save(content, tmp_path / f"{name}.pt")
        with pytest.raises(AssetError, match=words):
            import_direction(tmp_path / f"{name}.pt", tiny_generator)
    path = write(tmp_path / "fine.npy", VECTOR)
    with pytest.raises(ConfigError, match="leave out component and is_set"):
        import_direction(path, tiny_generator, component=0)
    with pytest.raises(ConfigError, match="expected a unit above 0, got -1"):
        import_direction(path, tiny_generator, unit=-1)
    with pytest.raises(AssetError, match=r"expected a file ending in \.npy"):
        import_direction(tmp_path / "x.bin", tiny_generator)


class Harmful:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt"])
def test_files_are_data(tiny_generator: Generator, tmp_path: Path, suffix: str) -> None:
    """A pickle inside is refused and not executed; so are a missing and a broken file."""
    path, trace = tmp_path / f"evil{suffix}", tmp_path / "executed"
    values = np.array([Harmful(trace)], dtype=object)
    if suffix == ".npy":
        np.save(path, values, allow_pickle=True)
    elif suffix == ".npz":
        np.savez(path, comp=values)
    else:
        torch.save(Harmful(trace), path)
    with pytest.raises(AssetError, match="cannot read it as plain numbers"):
        import_direction(path, tiny_generator)
    assert not trace.exists()
    path.write_bytes(b"not numbers")
    with pytest.raises(AssetError, match="cannot read it as plain numbers"):
        import_direction(path, tiny_generator)
    path.unlink()
    with pytest.raises(AssetError, match="cannot read it as plain numbers"):
        import_direction(path, tiny_generator)
