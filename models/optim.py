"""Optimisers that torch does not carry: Ranger for encoders, a row-wise Adam for codes.

Legend: N batch (rows).
"""

# torch keeps its fused list operations behind names with an underscore.
# pyright: reportPrivateImportUsage=false

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

SETTLED = 10_000
"""Periods of Lookahead after which Ranger's moments have no trace of their start."""


class Ranger(torch.optim.Optimizer):
    """RAdam with gradient centralisation and Lookahead, as pSp and e4e train with.

    RAdam (arXiv 1908.03265), gradient centralisation on tensors of two or more dimensions
    (arXiv 2004.01461), Lookahead (arXiv 1907.08610): every k steps the slow weights move a share
    `alpha` towards the fast ones, and the fast ones restart from there.

    Args:
        params: parameters or groups, as in every torch optimiser.
        lr: learning rate (1e-4 in the originals).
        betas, eps: of Adam; the defaults are Ranger's.
        rectify_above: length of the approximated moving average from which RAdam divides by the
            second moment; before, it is momentum SGD.
        k, alpha: Lookahead's period and share.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.95, 0.999),
        eps: float = 1e-5,
        rectify_above: float = 5.0,
        k: int = 6,
        alpha: float = 0.5,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "rectify_above": rectify_above,
            "k": k,
            "alpha": alpha,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(group, params)
        return loss

    @torch.no_grad()
    def settle(self) -> None:
        """Moments as after a long training, from the gradients at hand, for parameters without any.

        A short refinement of a trained network cannot spend its updates on RAdam's warm-up: the
        first moment becomes the gradient, the second its square plus the mean square of its tensor,
        and the count is past all rectification (and a multiple of Lookahead's period).
        """
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None or self.state[p]:
                    continue
                gradient = _centralised(p.grad)
                square = gradient.square()
                self.state[p] = {
                    "step": SETTLED * group["k"],
                    "exp_avg": gradient.clone(),
                    "exp_avg_sq": square + square.mean(),
                    "slow": p.detach().clone(),
                }

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        for p in params:
            if not self.state[p]:
                self.state[p] = {
                    "step": 0,
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                    "slow": p.detach().clone(),
                }
            self.state[p]["step"] += 1
        beta1, beta2 = group["betas"]
        gradients = [_centralised(p.grad) for p in params]  # type: ignore[arg-type]
        moments = [self.state[p]["exp_avg"] for p in params]
        squares = [self.state[p]["exp_avg_sq"] for p in params]
        torch._foreach_lerp_(moments, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        # Parameters of one group may have joined at different steps (rows that open later).
        for step in sorted({self.state[p]["step"] for p in params}):
            chosen = [i for i, p in enumerate(params) if self.state[p]["step"] == step]
            size, is_rectified = _radam_step(step, beta1, beta2, group["rectify_above"])
            fast = [params[i] for i in chosen]
            first = [moments[i] for i in chosen]
            if is_rectified:
                roots = torch._foreach_sqrt([squares[i] for i in chosen])
                torch._foreach_add_(roots, group["eps"])
                torch._foreach_addcdiv_(fast, first, roots, -size * group["lr"])
            else:
                torch._foreach_add_(fast, first, alpha=-size * group["lr"])
            if step % group["k"] == 0:
                slow = [self.state[p]["slow"] for p in fast]
                torch._foreach_lerp_(slow, fast, group["alpha"])
                torch._foreach_copy_(fast, slow)


def _centralised(gradient: Tensor) -> Tensor:
    if gradient.ndim < 2:
        return gradient
    return gradient - gradient.mean(dim=tuple(range(1, gradient.ndim)), keepdim=True)


def _radam_step(step: int, beta1: float, beta2: float, threshold: float) -> tuple[float, bool]:
    """RAdam's factor of the learning rate, and whether the second moment divides."""
    decayed = beta2**step
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * step * decayed / (1 - decayed)
    unbias = 1 / (1 - beta1**step)
    if length <= threshold:
        return unbias, False
    rectification = math.sqrt(
        (1 - decayed)
        * (length - 4)
        / (longest - 4)
        * (length - 2)
        / length
        * longest
        / (longest - 2)
    )
    return rectification * unbias, True


class RowAdam:
    """Adam over tensors whose first dimension is the batch; its rows can be dropped one by one.

    A row's result does not depend on its neighbours: nothing is summed across rows, and a row that
    leaves takes its moments with it.

    Args:
        tensors: [N, ...] each, updated in place.
        betas, eps: of Adam (arXiv 1412.6980).
    """

    def __init__(
        self,
        tensors: Sequence[Float[Tensor, "N ..."]],
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        self.tensors = list(tensors)
        self.betas, self.eps, self.count = betas, eps, 0
        self.moments = [torch.zeros_like(t) for t in self.tensors]
        self.squares = [torch.zeros_like(t) for t in self.tensors]

    @torch.no_grad()
    def step(self, gradients: Sequence[Float[Tensor, "N ..."]], learning_rate: float) -> None:
        """One update of every row."""
        gradients = list(gradients)
        self.count += 1
        beta1, beta2 = self.betas
        size = learning_rate / (1 - beta1**self.count)
        correction = math.sqrt(1 - beta2**self.count)
        torch._foreach_lerp_(self.moments, gradients, 1 - beta1)
        torch._foreach_mul_(self.squares, beta2)
        torch._foreach_addcmul_(self.squares, gradients, gradients, 1 - beta2)
        roots = torch._foreach_sqrt(self.squares)
        torch._foreach_div_(roots, correction)
        torch._foreach_add_(roots, self.eps)
        torch._foreach_addcdiv_(self.tensors, self.moments, roots, -size)

    @torch.no_grad()
    def keep(self, rows: Bool[Tensor, " N"]) -> None:
        """Drop every row that is not in `rows`; `tensors` are replaced by smaller ones."""
        self.tensors = [t[rows] for t in self.tensors]
        self.moments = [t[rows] for t in self.moments]
        self.squares = [t[rows] for t in self.squares]
