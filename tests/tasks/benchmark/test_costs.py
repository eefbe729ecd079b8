"""What a chain costs: its networks, its time with confidence."""

import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from models.inversion.base import Inversion, Method, SampleRng
from models.losses.perceptual import load_perceptual
from models.stylegan2.generator import Generator
from tasks.benchmark.costs import TIMED, costs, half_width, network_parameters, seconds_alone


class WithNetwork(Method):
    """Four outputs of three inputs."""

    summary = "for tests"

    def __init__(self, generator: Generator) -> None:
        super().__init__(generator, None)
        self.net = torch.nn.Linear(3, 4)
        self.others = SimpleNamespace()

    def invert(self, images: torch.Tensor, init: Inversion | None, rng: SampleRng) -> Inversion:
        raise NotImplementedError


class Slow:
    """An inverter that works so many seconds on a picture, and waits as long beside that."""

    def __init__(self, seconds: list[float], methods: list[Method]) -> None:
        self.seconds, self.methods = seconds, methods
        self.seen: list[int] = []

    def invert(self, pictures: np.ndarray, keys: list[str]) -> None:
        seconds = self.seconds[len(self.seen)]
        until = time.process_time() + seconds
        while time.process_time() < until:
            pass
        time.sleep(seconds)
        self.seen.append(int(pictures[0, 0, 0, 0]))


def test_parameters_are_the_networks_own(tiny_generator: Generator) -> None:
    method = WithNetwork(tiny_generator)
    method.perceptual = load_perceptual("refinery")
    assert network_parameters(method) == 3 * 4 + 4
    method.first = WithNetwork(tiny_generator)
    assert network_parameters(method) == 2 * (3 * 4 + 4)
    assert network_parameters(method, is_first=False) == 3 * 4 + 4


def test_the_interval_is_students() -> None:
    """t of 97.5 % with 4 degrees of freedom is 2.776 (any table)."""
    values = [1.0, 2.0, 3.0, 4.0, 5.0]
    assert half_width(values) == pytest.approx(2.7764 * 2.5**0.5 / 5**0.5, rel=1e-4)
    assert half_width([1.0, 1.0]) == 0
    assert half_width([1.0]) is None


def test_pictures_are_timed_one_by_one_after_a_warm_up() -> None:
    inputs = torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 3, 8, 8) / 127.5 - 1
    inverter = Slow([0.2] + [0.01] * TIMED, [])
    found = seconds_alone(inverter, inputs)
    assert len(found) == TIMED
    assert 0.01 <= min(found) <= sorted(found)[TIMED // 2] < 0.015
    assert inverter.seen == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2]


def test_speed_in_batches_has_the_interval_of_its_shards(
    monkeypatch: pytest.MonkeyPatch, tiny_generator: Generator
) -> None:
    markers = {
        i: SimpleNamespace(rows=11, failed=1, seconds={"invert": s}, parts={})
        for i, s in enumerate((1.0, 2.0, 3.0))
    }
    monkeypatch.setattr("tasks.benchmark.costs.read_markers", lambda uri: markers)
    inverter = Slow([0.0] * (TIMED + 1), [WithNetwork(tiny_generator)])
    found = costs("run", inverter, torch.zeros(1, 3, 8, 8))
    assert found["images_per_s"] == pytest.approx(5.0)
    # Seconds 0.2 +- 4.303 * 0.1 / sqrt(3): as a share of 0.2, of 5 images/s.
    assert found["images_per_s_ci"] == pytest.approx(5 * 4.3027 * 0.1 / 3**0.5 / 0.2, rel=1e-4)
    assert found["seconds_per_image"] < 0.05
    assert found["seconds_per_image_ci"] >= 0
    assert found["parameters"] == 16
    assert found["bytes_per_picture"] == 0
