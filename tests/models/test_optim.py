"""Ranger against a scalar transcription of its three papers; the row-wise Adam against torch's."""

import math

import pytest
import torch

from models.optim import Ranger, RowAdam


def reference_ranger(
    start: torch.Tensor, gradients: list[torch.Tensor], lr: float
) -> list[torch.Tensor]:
    """RAdam + gradient centralisation + Lookahead, one matrix, step by step in float64."""
    beta1, beta2, eps, k, alpha = 0.95, 0.999, 1e-5, 6, 0.5
    p, slow = start.double().clone(), start.double().clone()
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    found = []
    for t, gradient in enumerate(gradients, start=1):
        g = gradient.double()
        g = g - g.mean(1, keepdim=True)
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        rho_inf = 2 / (1 - beta2) - 1
        rho = rho_inf - 2 * t * beta2**t / (1 - beta2**t)
        m_hat = m / (1 - beta1**t)
        if rho > 5:
            r = math.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
            # Ranger adds eps to sqrt(v) before the bias correction.
            p = p - lr * r * m_hat * math.sqrt(1 - beta2**t) / (v.sqrt() + eps)
        else:
            p = p - lr * m_hat
        if t % k == 0:
            slow = slow + alpha * (p - slow)
            p = slow.clone()
        found.append(p.clone())
    return found


def test_ranger_follows_its_papers() -> None:
    rng = torch.Generator().manual_seed(0)
    start = torch.randn(4, 5, generator=rng)
    gradients = [torch.randn(4, 5, generator=rng) for _ in range(20)]
    parameter = torch.nn.Parameter(start.clone())
    optimizer = Ranger([parameter], lr=1e-2)
    for gradient, want in zip(gradients, reference_ranger(start, gradients, 1e-2), strict=True):
        parameter.grad = gradient.clone()
        optimizer.step()
        torch.testing.assert_close(parameter.detach().double(), want, atol=1e-6, rtol=1e-5)
    assert (parameter - start).abs().max() > 1e-2


def test_ranger_resumes_exactly_and_skips_what_has_no_gradient() -> None:
    def run(steps: list[int], state: dict | None, values: list[torch.Tensor]) -> tuple:
        parameters = [torch.nn.Parameter(v.clone()) for v in values]
        optimizer = Ranger(parameters, lr=1e-2)
        if state is not None:
            optimizer.load_state_dict(state)
        for step in steps:
            rng = torch.Generator().manual_seed(step)
            for index, parameter in enumerate(parameters):
                # The second joins at step 4, as the head of a row that opens later does.
                gradient = torch.randn(parameter.shape, generator=rng)
                parameter.grad = gradient if index == 0 or step >= 4 else None
            optimizer.step()
        return [p.detach() for p in parameters], optimizer.state_dict()

    values = [torch.ones(3, 3), torch.ones(4)]
    whole, _ = run(list(range(12)), None, values)
    half, state = run(list(range(7)), None, values)
    resumed, _ = run(list(range(7, 12)), state, half)
    untouched, _ = run(list(range(4)), None, values)
    assert torch.equal(untouched[1], values[1])
    for a, b in zip(whole, resumed, strict=True):
        assert torch.equal(a, b)


def test_row_adam_is_adam_and_drops_rows_with_their_moments() -> None:
    rng = torch.Generator().manual_seed(0)
    start = torch.randn(3, 2, 4, generator=rng)
    gradients = [torch.randn(3, 2, 4, generator=rng) for _ in range(8)]
    parameter = torch.nn.Parameter(start.clone())
    torch_adam = torch.optim.Adam([parameter], lr=0.1)
    rows = RowAdam([start.clone()])
    for step, gradient in enumerate(gradients):
        parameter.grad = gradient.clone()
        torch_adam.step()
        if step == 4:
            rows.keep(torch.tensor([True, False, True]))
        rows.step([gradient if step < 4 else gradient[[0, 2]]], 0.1)
    torch.testing.assert_close(rows.tensors[0], parameter.detach()[[0, 2]])


def test_row_adam_row_with_nan_leaves_its_neighbour_alone() -> None:
    start = torch.ones(2, 3)
    gradient = torch.ones(2, 3)
    clean, dirty = RowAdam([start.clone()]), RowAdam([start.clone()])
    clean.step([gradient], 0.1)
    gradient[1] = math.nan
    dirty.step([gradient], 0.1)
    assert torch.equal(dirty.tensors[0][0], clean.tensors[0][0])
    assert dirty.tensors[0][1].isnan().all()
    dirty.keep(torch.tensor([True, False]))
    clean.keep(torch.tensor([True, False]))
    for optimizer in (clean, dirty):
        optimizer.step([torch.ones(1, 3)], 0.1)
    assert torch.equal(dirty.tensors[0], clean.tensors[0])
    assert float(clean.tensors[0][0, 0]) == pytest.approx(0.8, abs=1e-5)


def test_a_settled_ranger_takes_full_steps_at_once() -> None:
    """By hand: m = g, v = g^2 + mean g^2, no warm-up; the second update follows from both."""
    start, gradient = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([0.3, -0.4, 0.0])
    p = torch.nn.Parameter(start.clone())
    ranger = Ranger([p], lr=0.1, eps=0.0)
    first, square = gradient, gradient.square() + gradient.square().mean()
    want = start.clone()
    for _ in range(2):
        p.grad = gradient.clone()
        ranger.settle()  # the second call finds moments and leaves them
        ranger.step()
        square = 0.999 * square + 0.001 * gradient.square()
        want = want - 0.1 * first / square.sqrt()
    torch.testing.assert_close(p.detach(), want, rtol=1e-4, atol=1e-5)
    other = torch.nn.Parameter(torch.zeros(2))
    idle = Ranger([other])
    idle.settle()
    assert not idle.state[other]
