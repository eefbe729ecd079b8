"""Boundaries between two kinds of codes, against closed forms and optimality conditions."""

import pytest
import torch
from torch import Tensor

from models.editing.boundary import BoundaryLoss, balanced_accuracy, fit_boundary

LOSSES: tuple[BoundaryLoss, ...] = ("logistic", "svm")


@pytest.mark.parametrize("loss", LOSSES)
def test_one_dimension_has_the_sign_of_the_property(loss: BoundaryLoss) -> None:
    codes = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
    is_with = torch.tensor([True, True, False, False])
    assert fit_boundary(codes, is_with, loss=loss).tolist() == [-1.0]


@pytest.mark.parametrize("loss", LOSSES)
def test_it_is_the_minimum_of_the_regularised_loss(loss: BoundaryLoss) -> None:
    """The gradient of the loss is zero along the found normal, for the best length and bias."""
    draw = torch.Generator().manual_seed(0)
    codes = torch.randn(200, 3, generator=draw, dtype=torch.float64) * torch.tensor([1.0, 5.0, 0.2])
    is_with = codes @ torch.tensor([1.0, -0.2, 0.0]).double() + 0.1 > 0
    vector = fit_boundary(codes, is_with, 0.1, loss).double()
    x = (codes - codes.mean(0)) / codes.std(0)
    along = vector * codes.std(0)  # the normal in standardised codes, up to its length
    weight = torch.where(is_with, 0.5 / is_with.double().mean(), 0.5 / (~is_with).double().mean())
    sign = 2 * is_with.double() - 1

    def gradient(parameters: Tensor) -> Tensor:
        slope, bias = parameters[0] * along, parameters[1]
        value = x @ slope + bias
        if loss == "logistic":
            wrong = weight * (torch.sigmoid(value) - is_with.double())
        else:
            wrong = -2 * weight * sign * (1 - sign * value).clamp(min=0)
        return torch.cat([x.T @ wrong / len(x) + 0.1 * slope, wrong.mean()[None]])

    found = torch.tensor([1.0, 0.0], dtype=torch.float64)
    for _ in range(50):  # Newton on length and bias alone

        def two(p: Tensor) -> Tensor:
            full = gradient(p)
            return torch.stack([full[:3] @ along, full[3]])

        found = found - torch.linalg.solve(torch.func.jacrev(two)(found), two(found))
    assert gradient(found).abs().max() < 2e-6
    assert found[0] > 0


def test_a_stronger_ridge_turns_to_the_difference_of_means() -> None:
    draw = torch.Generator().manual_seed(1)
    codes = torch.randn(500, 4, generator=draw)
    codes[:, 1] += codes[:, 0]
    is_with = codes[:, 0] > 0
    x = (codes - codes.mean(0)) / codes.std(0)
    means = (x[is_with].mean(0) - x[~is_with].mean(0)) / codes.std(0)
    for loss in LOSSES:
        cosines = [
            float(torch.cosine_similarity(fit_boundary(codes, is_with, ridge, loss), means, 0))
            for ridge in (1e-3, 1e3)
        ]
        assert cosines[1] > 0.9999
        assert cosines[0] < 0.95


def test_accuracy_weighs_both_kinds_the_same() -> None:
    train = (torch.tensor([[0.0], [2.0]]), torch.tensor([False, True]))
    held = (torch.tensor([[0.0], [0.5], [3.0], [3.0], [0.0]]), torch.tensor([0, 0, 0, 1, 1]).bool())
    found = balanced_accuracy(torch.ones(1), train, held)
    assert found == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_it_also_works_in_inference_mode() -> None:
    with torch.inference_mode():
        codes = torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 1.0], [3.0, 0.0]])
        found = fit_boundary(codes, codes[:, 0] > 1.5)
    assert float(found[0]) > 0.9


def test_one_kind_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="with and without the property"):
        fit_boundary(torch.zeros(3, 2), torch.ones(3, dtype=torch.bool))
