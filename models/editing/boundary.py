"""InterFaceGAN: the normal of the hyperplane between codes with a property and codes without it
(arXiv 1907.10786, section 3). Both losses are convex and minimised in float64 by LBFGS.

Legend: N training codes, M held-out codes, D numbers of a code.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

BoundaryLoss = Literal["logistic", "svm"]


def fit_boundary(
    codes: Float[Tensor, "N D"],
    is_with: Bool[Tensor, " N"],
    ridge: float = 1.0,
    loss: BoundaryLoss = "logistic",
) -> Float[Tensor, " D"]:
    """Unit normal of the separating hyperplane, towards the codes with the property.

    Fitted on standardised codes, both kinds weighing the same.

    Args:
        ridge: weight of half the squared norm of the coefficients against the mean loss. Small
            values give the sharpest boundary; its normal then also has parts that cancel what the
            property comes with, and moves pictures little. Large ones turn the normal towards the
            difference of the two kinds' means (of standardised codes), which moves them much and
            takes along what the property comes with.
        loss: "logistic", or "svm" for the squared hinge of a linear support vector machine.

    Raises:
        ValueError: one of the kinds has no code.
    """
    if not is_with.any() or is_with.all():
        raise ValueError("boundary: expected codes with and without the property")
    # Inside, so that it also works where the caller is in inference mode.
    with torch.inference_mode(False), torch.enable_grad():
        x, y = codes.detach().clone().double(), is_with.clone().double()
        mean, std = x.mean(0), x.std(0).clamp(min=1e-12)
        x = (x - mean) / std
        balance = 0.5 * (y / y.mean() + (1 - y) / (1 - y.mean()))

        def objective(slope: Tensor, bias: Tensor) -> Tensor:
            value = x @ slope + bias
            if loss == "svm":
                data = (balance * (1 - (2 * y - 1) * value).clamp(min=0).square()).mean()
            else:
                data = F.binary_cross_entropy_with_logits(value, y, balance)
            return data + 0.5 * ridge * slope.square().sum()

        normal = _minimise(objective, x.shape[1]) / std
    return (normal / normal.norm()).float()


def _minimise(objective: Callable[[Tensor, Tensor], Tensor], size: int) -> Float[Tensor, " D"]:
    """The slope at the minimum of a convex objective of slope and bias."""
    slope = torch.zeros(size, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [slope, bias],
        max_iter=500,
        tolerance_grad=1e-10,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = objective(slope, bias)
        value.backward()
        return value

    optimiser.step(closure)
    return slope.detach()


def balanced_accuracy(
    vector: Float[Tensor, " D"],
    train: tuple[Float[Tensor, "N D"], Bool[Tensor, " N"]],
    held_out: tuple[Float[Tensor, "M D"], Bool[Tensor, " M"]],
) -> float:
    """Mean of both kinds' shares on the right side of the middle between their training means
    (0.5 is chance)."""
    along, is_with = train[0].double() @ vector.double(), train[1]
    middle = (along[is_with].mean() + along[~is_with].mean()) / 2
    said, truth = held_out[0].double() @ vector.double() > middle, held_out[1]
    return float((said[truth].double().mean() + (~said[~truth]).double().mean()) / 2)
