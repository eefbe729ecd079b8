"""Quantised weight changes: error bound, granularity, rows."""

import pytest
import torch

from models.stylegan2.weight_delta import LEVELS, WeightDelta


def changes(*shape: int, scale: float = 1e-3, seed: int = 0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale", [1e-6, 1e-4, 1e-2, 3.0])
def test_the_error_is_at_most_half_a_step(scale: float) -> None:
    delta = changes(2, 1, 6, 5, 3, 3, scale=scale).double()
    found = WeightDelta.quantised(delta.float())
    step = found.step.double()[..., None, None, None]
    assert ((found.value().double() - delta).abs() <= step / 2 * (1 + 1e-5)).all()
    # Not wasteful either: the step is the smallest that holds the largest entry, and a rounding.
    largest = delta.abs().flatten(3).amax(3)
    assert (found.step.double() <= largest / LEVELS * 1.002 + 2**-23).all()


@pytest.mark.parametrize(
    ("shape", "step"),
    [
        ((2, 1, 6, 5, 3, 3), (2, 1, 6)),
        ((2, 6, 5), (2, 6)),
        ((2, 6), (2, 6)),
        ((2, 1), (2, 1)),
        ((2, 1, 3, 1, 1), (2, 1, 3)),
        ((2, 1, 4, 4, 4), (2, 1, 4)),
    ],
)
def test_every_output_channel_has_a_step(shape: tuple[int, ...], step: tuple[int, ...]) -> None:
    found = WeightDelta.quantised(changes(*shape))
    assert found.step.shape == step
    assert found.codes.shape == shape
    assert found.codes.dtype == torch.int8
    assert found.value().shape == shape


def test_a_large_channel_does_not_blur_the_others() -> None:
    delta = changes(1, 1, 3, 5, 3, 3)
    alone = WeightDelta.quantised(delta).value()
    delta[:, :, 0] *= 1000
    torch.testing.assert_close(WeightDelta.quantised(delta).value()[:, :, 1:], alone[:, :, 1:])


def test_by_hand() -> None:
    found = WeightDelta.quantised(torch.tensor([[[127.0, -63.6, 0.2], [0.0, 0.0, 0.0]]]))
    step = float(torch.tensor(1 + 2**-10).half())
    assert found.step.tolist() == [[step, 0.0]]
    assert found.codes.tolist() == [[[127, -64, 0], [0, 0, 0]]]
    assert found.value().tolist() == [[[127 * step, -64 * step, 0.0], [0.0, 0.0, 0.0]]]


def test_the_step_survives_half_precision() -> None:
    found = WeightDelta.quantised(changes(3, 4, 5, scale=1e-5))
    assert torch.equal(found.step.half().float(), found.step)


def test_rows_are_independent_and_join() -> None:
    delta = changes(3, 4, 5)
    whole = WeightDelta.quantised(delta)
    parts = [WeightDelta.quantised(delta[row : row + 1]) for row in range(3)]
    joined = WeightDelta.cat(parts)
    for found in (joined, WeightDelta.cat([whole[:1], whole[1:]]), whole.to("cpu")):
        assert torch.equal(found.codes, whole.codes)
        assert torch.equal(found.step, whole.step)
