"""Reference outputs of other people's programs, and the tolerances that their README writes "
"down."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from models.stylegan2.generator import Generator

FORMS = ("auto", "grouped", "implicit", "folded")


class Golden:
    """One `io.npz`: `golden["in.z"]` is a tensor; `noise(i)` the shared noise maps."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with np.load(folder / "io.npz") as values:
            self._values = {name: torch.from_numpy(values[name]) for name in values.files}

    def __getitem__(self, name: str) -> Tensor:
        return self._values[name].clone()

    def names(self, start: str) -> list[str]:
        return [name for name in self._values if name.startswith(start)]

    def noise(self) -> list[Tensor]:
        return [self[f"in.noise_shared_{i}"] for i in range(len(self.names("in.noise_shared_")))]


@pytest.fixture(scope="session")
def rosinality_64(shared: Path) -> Golden:
    return Golden(shared / "golden" / "rosinality_64")


@pytest.fixture(scope="session")
def nv_ada_64(shared: Path) -> Golden:
    return Golden(shared / "golden" / "nv_ada_64")


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def net(generator: Generator, form: str) -> Generator:
    """The module's generator, frozen, in every form."""
    generator.form = form
    return generator.requires_grad_(False)


def _largest(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.detach().double() - expected.double()).abs().max())


@pytest.fixture(scope="session")
def assert_images() -> Callable[[Tensor, Tensor], None]:
    def check(found: Tensor, expected: Tensor) -> None:
        assert expected.abs().max() > 1  # the reference is no blank picture
        assert _largest(found, expected) <= 1e-4

    return check


@pytest.fixture(scope="session")
def assert_codes() -> Callable[[Tensor, Tensor], None]:
    def check(found: Tensor, expected: Tensor) -> None:
        assert _largest(found, expected) <= 2e-5

    return check


@pytest.fixture(scope="session")
def assert_logits() -> Callable[[Tensor, Tensor], None]:
    def check(found: Tensor, expected: Tensor) -> None:
        assert _largest(found, expected) <= 3e-5 * float(expected.abs().max())

    return check


@pytest.fixture(scope="session")
def assert_exact() -> Callable[..., None]:
    """In float64 what is left is rounding: of a picture, and of the gradient of its codes."""

    def check(golden: Golden, image: Tensor, codes: Tensor, picture: str, gradient: str) -> None:
        assert _largest(image, golden[f"out64.{picture}"]) < 1e-5
        (image * golden["in.cotangent"].double()).sum().backward()
        assert codes.grad is not None
        expected = golden[f"out64.{gradient}"]
        assert float((codes.grad - expected).norm() / expected.norm()) < 1e-6

    return check


@pytest.fixture(scope="session")
def assert_gradient() -> Callable[[Tensor | None, Tensor], None]:
    """Relative L2, never the largest difference: LeakyReLU has a kink."""

    def check(found: Tensor | None, expected: Tensor) -> None:
        assert found is not None
        assert found.shape == expected.shape
        difference = (found.double() - expected.double()).norm()
        assert float(difference / expected.double().norm()) <= 1e-4

    return check
