"""Directions from labelled pictures: the regression against closed forms, and the whole path."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from models.errors import AssetError, ConfigError
from models.inversion.base import Inversion, Method, SampleRng
from models.stylegan2.generator import Generator
from tasks.training.directions import (
    Label,
    balanced_accuracy,
    fit_directions,
    logistic_fit,
    read_column,
)


def test_one_dimension_has_the_sign_of_the_property() -> None:
    codes = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    is_with = torch.tensor([True, True, False, False])
    assert logistic_fit(codes, is_with).tolist() == [-1.0]


def test_it_is_the_minimum_of_the_regularised_loss() -> None:
    """The gradient of the loss is zero along the found normal, for the best length and bias."""
    draw = torch.Generator().manual_seed(0)
    codes = torch.randn(200, 3, generator=draw, dtype=torch.float64) * torch.tensor([1.0, 5.0, 0.2])
    is_with = codes @ torch.tensor([1.0, -0.2, 0.0]).double() + 0.1 > 0
    vector = logistic_fit(codes, is_with, ridge=0.1).double()
    x = (codes - codes.mean(0)) / codes.std(0)
    along = vector * codes.std(0)  # the normal in standardised codes, up to its length
    weight = torch.where(is_with, 0.5 / is_with.double().mean(), 0.5 / (~is_with).double().mean())

    def gradient(parameters: torch.Tensor) -> torch.Tensor:
        slope, bias = parameters[0] * along, parameters[1]
        wrong = weight * (torch.sigmoid(x @ slope + bias) - is_with.double())
        return torch.cat([x.T @ wrong / len(x) + 0.1 * slope, wrong.mean()[None]])

    found = torch.tensor([1.0, 0.0], dtype=torch.float64)
    for _ in range(50):  # Newton on length and bias alone

        def two(p: torch.Tensor) -> torch.Tensor:
            full = gradient(p)
            return torch.stack([full[:3] @ along, full[3]])

        step = torch.linalg.solve(torch.func.jacrev(two)(found), two(found))
        found = found - step
    assert gradient(found).abs().max() < 2e-6
    assert found[0] > 0


def test_a_stronger_ridge_turns_to_the_difference_of_means() -> None:
    draw = torch.Generator().manual_seed(1)
    codes = torch.randn(500, 4, generator=draw)
    codes[:, 1] += codes[:, 0]
    is_with = codes[:, 0] > 0
    x = (codes - codes.mean(0)) / codes.std(0)
    means = (x[is_with].mean(0) - x[~is_with].mean(0)) / codes.std(0)
    cosines = [
        float(torch.cosine_similarity(logistic_fit(codes, is_with, ridge), means, 0))
        for ridge in (1e-3, 1e3)
    ]
    assert cosines[1] > 0.9999
    assert cosines[0] < 0.95


def test_accuracy_weighs_both_kinds_the_same() -> None:
    train = (torch.tensor([[0.0], [2.0]]), torch.tensor([False, True]))
    held = (torch.tensor([[0.0], [0.5], [3.0], [3.0], [0.0]]), torch.tensor([0, 0, 0, 1, 1]).bool())
    found = balanced_accuracy(torch.ones(1), train, held)
    assert found == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_one_kind_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="with and without the property"):
        logistic_fit(torch.zeros(3, 2), torch.ones(3, dtype=torch.bool))
    with pytest.raises(ConfigError, match="expected low < high"):
        Label(name="age", column="age", low=3.0, high=3.0)


class Brightness(Method):
    """Codes that hold the mean of each channel."""

    summary = "for tests"

    def invert(self, images: torch.Tensor, init: Inversion | None, rng: SampleRng) -> Inversion:
        codes = torch.zeros(len(images), self.generator.num_ws, self.generator.w_dim)
        codes[:, :, :3] = images.mean((2, 3))[:, None]
        codes[:, 1, :3] += 0.3  # rows are averaged
        return Inversion(w_plus=codes)

    def hashes(self) -> dict[str, str]:
        return {"eye": "00ff"}


def write(path: Path, seed: int, n: int = 80) -> str:
    """Pictures of one colour; `red` and `both` (red + green) say how much of it they have."""
    rng = np.random.default_rng(seed)
    colours = rng.integers(0, 256, (n, 3), dtype=np.uint8)
    data = []
    for colour in colours:
        buffer = io.BytesIO()
        Image.fromarray(np.broadcast_to(colour, (32, 32, 3)).copy()).save(buffer, "PNG")
        data.append(buffer.getvalue())
    red = colours[:, 0].astype(float)
    pq.write_table(pa.table({"image": data, "red": red, "both": red + colours[:, 1]}), path)
    return str(path)


def test_from_pictures_to_directions(tiny_generator: Generator, tmp_path: Path) -> None:
    train, held = write(tmp_path / "a.parquet", 0), write(tmp_path / "b.parquet", 1)
    method = Brightness(tiny_generator, None)
    red = Label(name="red", column="red", low=100, high=150)
    both = Label(name="both", column="both", low=200, high=300)
    found = fit_directions(method, [train], [held], [red, both], terms="free")
    # Red alone is what is orthogonal to red + green: (1 -1 0); and the other way round green.
    red_found = found["red"]
    assert red_found.vector[:3].tolist() == pytest.approx([2**-0.5, -(2**-0.5), 0.0], abs=0.15)
    assert abs(float(found["both"].vector[1])) > 0.95
    assert red_found.card["leaves_alone"] == ["both"]
    assert red_found.card["terms"] == "free"
    plain = fit_directions(method, [train], [held], [red], is_conditional=False)["red"]
    assert plain.vector[:3].tolist() == pytest.approx([1.0, 0.0, 0.0], abs=0.2)
    assert plain.accuracy == 1.0
    colours = read_column([train], "red") / 127.5 - 1
    assert plain.unit == pytest.approx(float(colours.std()), rel=0.1)


def test_a_missing_label_is_named(tiny_generator: Generator, tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", 0, n=2)
    with pytest.raises(AssetError, match="cannot read the column 'age'"):
        read_column([path], "age")
