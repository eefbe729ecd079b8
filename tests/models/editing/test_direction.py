"""Directions: what applying, projecting and storing them does to the numbers."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.checkpoints.load import load_generator
from models.editing.direction import (
    Direction,
    apply_edits,
    bundled_directions,
    load_direction,
    save_direction,
)
from models.errors import AssetError
from models.stylegan2.generator import Generator


def unit(*values: float) -> torch.Tensor:
    return torch.tensor(values) / torch.tensor(values).norm()


def direction(vector: torch.Tensor, **changes: object) -> Direction:
    return Direction(
        name="age", vector=vector, generator_hash="ab" * 32, **{"unit": 2.0, **changes}
    )


def test_strength_is_in_units_along_the_vector() -> None:
    w_plus = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0))
    moved = direction(unit(3.0, 4.0)).apply(w_plus, 1.5) - w_plus
    torch.testing.assert_close(moved, torch.tensor([1.8, 2.4]).expand(3, 4, 2))
    there = direction(unit(3.0, 4.0)).apply(w_plus, 3.0)
    torch.testing.assert_close(direction(unit(3.0, 4.0)).apply(there, -3.0), w_plus)


def test_only_its_layers_move() -> None:
    moved = direction(unit(1.0, 0.0), layers=(1, 3)).apply(torch.zeros(1, 4, 2), 1.0)
    assert moved[0].tolist() == [[0, 0], [2, 0], [0, 0], [2, 0]]


def test_a_vector_for_each_row() -> None:
    rows = torch.eye(4)[:, :2]
    found = direction(rows)
    assert (found.space, direction(rows[0]).space) == ("w_plus", "w")
    torch.testing.assert_close(found.apply(torch.zeros(1, 4, 2), 0.5)[0], rows)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"its vector is \[2\], the codes are \[1, 4, 3\]"):
        direction(unit(1.0, 0.0)).apply(torch.zeros(1, 4, 3), 1.0)
    with pytest.raises(ValueError, match=r"expected layers in 0..3, found \[4\]"):
        direction(unit(1.0, 0.0), layers=(4,)).apply(torch.zeros(1, 4, 2), 1.0)


def test_each_picture_its_own_strength() -> None:
    w_plus = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0))
    some = direction(unit(3.0, 4.0), layers=(0, 2))
    steps = torch.tensor([1.0, -2.0, 0.0])
    rows = [some.apply(w_plus[n : n + 1], float(steps[n])) for n in range(3)]
    assert torch.equal(some.apply(w_plus, steps), torch.cat(rows))


def test_a_set_strength_is_the_coordinate_of_row_0() -> None:
    """delta = (strength - coordinate) sigma v, and applied again it changes nothing."""
    w_plus = torch.randn(5, 4, 2, generator=torch.Generator().manual_seed(0))
    vector = unit(3.0, 4.0)
    some = direction(vector, layers=(0, 3), origin=0.7)
    moved = some.apply(w_plus, 1.5)
    coordinate = (w_plus[:, 0] @ vector - 0.7) / 2.0
    delta = (1.5 - coordinate)[:, None] * 2.0 * vector
    torch.testing.assert_close(moved[:, 0], w_plus[:, 0] + delta)
    torch.testing.assert_close(moved[:, 3], w_plus[:, 3] + delta)
    assert torch.equal(moved[:, 1:3], w_plus[:, 1:3])
    torch.testing.assert_close(some.apply(moved, 1.5), moved)
    torch.testing.assert_close(some.apply(some.apply(w_plus, -9.0), 1.5)[:, 0], moved[:, 0])
    assert torch.equal(some.apply(w_plus[2:3], 1.5), moved[2:3])
    for other in ({"channels": (1, 1)}, {"vector": torch.eye(4)[:, :2]}):
        with pytest.raises(ValueError, match="a strength can be set in space w only"):
            direction(**{"vector": vector, "origin": 0.0, **other})


def test_style_space() -> None:
    """Codes stay, channels move: those of the layers that are named and are not zero."""
    some = direction(torch.tensor([0.6, 0.0, 0.0, 0.0, 0.0, 0.8]), channels=(2, 3, 1))
    assert some.space == "s"
    w_plus = torch.randn(2, 4, 2, generator=torch.Generator().manual_seed(0))
    assert some.apply(w_plus, 3.0) is w_plus
    shift = some.style_shift(-1.5) or {}
    assert list(shift) == [0, 2]
    torch.testing.assert_close(shift[0], torch.tensor([-1.8, 0.0]))
    torch.testing.assert_close(shift[2], torch.tensor([-2.4]))
    each = some.style_shift(torch.tensor([1.0, 2.0])) or {}
    torch.testing.assert_close(each[0], torch.tensor([[1.2, 0.0], [2.4, 0.0]]))
    assert list(replace(some, layers=(1, 2)).style_shift(1.0) or {}) == [2]
    assert direction(unit(1.0, 0.0)).style_shift(1.0) is None
    with pytest.raises(ValueError, match=r"expected layers in 0..2, found \[3\]"):
        replace(some, layers=(3,)).style_shift(1.0)
    with pytest.raises(ValueError, match="its layers have 4 style channels"):
        direction(torch.zeros(6), channels=(2, 2))


def test_edits_add_up() -> None:
    w_plus = torch.randn(2, 4, 2, generator=torch.Generator().manual_seed(0))
    one, two = direction(unit(1.0, 0.0)), direction(unit(0.0, 1.0), layers=(1,))
    style = direction(torch.tensor([1.0, 0.0, 0.0]), channels=(2, 1))
    other = direction(torch.tensor([0.0, 0.6, 0.8]), channels=(2, 1))
    steps = torch.tensor([1.0, 2.0])
    moved, shift = apply_edits(w_plus, [(one, 1.0), (style, 2.0), (two, steps), (other, steps)])
    torch.testing.assert_close(moved, two.apply(one.apply(w_plus, 1.0), steps))
    assert shift is not None
    torch.testing.assert_close(shift[0], torch.tensor([[4.0, 1.2], [4.0, 2.4]]))
    torch.testing.assert_close(shift[1], torch.tensor([[1.6], [3.2]]))
    assert apply_edits(w_plus, [(one, 0.0)])[1] is None


def test_without_is_the_orthogonal_projection() -> None:
    first, second = direction(unit(1.0, 1.0, 0.0)), direction(unit(0.0, 1.0, 1.0))
    rest = direction(unit(1.0, 2.0, 3.0)).without(first, second)
    # What is orthogonal to (1 1 0) and (0 1 1) is (1 -1 1); of (1 2 3) it keeps 2 / sqrt 3.
    torch.testing.assert_close(rest.vector, unit(1.0, -1.0, 1.0))
    assert rest.unit == pytest.approx(2.0 * (2 / 3**0.5) / 14**0.5)
    with pytest.raises(ValueError, match="nothing of it is left"):
        first.without(second, first)


@pytest.mark.parametrize(
    ("shape", "more"),
    [((8, 16), {}), ((16,), {"origin": -0.25}), ((16,), {"channels": (10, 6)})],
)
def test_round_trip(tmp_path: Path, shape: tuple[int, ...], more: dict[str, object]) -> None:
    vector = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    stored = direction(vector, layers=(0, 1), accuracy=0.75, card={"terms": "test"}, **more)
    path = save_direction(stored, tmp_path / "new" / "age.json")
    back = load_direction(path)
    assert torch.equal(back.vector, stored.vector)
    assert replace(back, vector=vector) == replace(stored, vector=vector)
    assert [p.name for p in path.parent.iterdir()] == ["age.json"]


@pytest.mark.parametrize("fault", ["missing", "not JSON", "format", "not finite", "unknown field"])
def test_a_wrong_file_is_an_asset_error(fault: str, tmp_path: Path) -> None:
    path = save_direction(direction(unit(1.0, 2.0)), tmp_path / "age.json")
    record = json.loads(path.read_text())
    if fault == "missing":
        path.unlink()
    elif fault == "not JSON":
        path.write_text("{")
    else:
        wrong = {"format": {"format": "x"}, "not finite": {"vector": [1.0, float("nan")]}}
        path.write_text(json.dumps({**record, **wrong.get(fault, {"colour": 1})}))
    with pytest.raises(AssetError, match=r"age.json: cannot read"):
        load_direction(path)


def test_another_generator_is_refused(tiny_generator: Generator) -> None:
    with pytest.raises(AssetError, match=r"made for generator abababababab\.\.\., this one is"):
        direction(unit(1.0, 0.0)).check_generator(tiny_generator)


def test_faces64_ships_age_smile_and_gender(tiny_generator: Generator) -> None:
    generator = load_generator("faces64")
    found = bundled_directions(generator)
    assert set(found) >= {"age", "smile", "gender"}
    for name in ("age", "smile", "gender"):
        found[name].check_generator(generator)
        assert found[name].vector.shape == (generator.num_ws, generator.w_dim)
        assert float(found[name].vector.norm()) == pytest.approx(1.0, abs=1e-5)
        assert found[name].accuracy is not None
        assert found[name].accuracy > 0.75
        assert "non-commercial" in found[name].card["terms"]
    # Conditional: each was made orthogonal to the others' plain boundaries.
    assert abs(float((found["age"].vector * found["smile"].vector).sum())) < 0.2
    assert bundled_directions(tiny_generator) == {}
