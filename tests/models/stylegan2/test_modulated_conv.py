"""Three exact forms of one operation, in float64: forward 1e-10, gradients 1e-9."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from models.stylegan2.modulated_conv import (
    EPS,
    FrozenKernel,
    choose_form,
    demodulate,
    modulated_conv2d,
)
from models.stylegan2.residual import LowRank

N, O, I, H, W = 3, 6, 5, 6, 7  # noqa: E741

CASES = list(
    itertools.product([False, True], [0, 1, 4], [False, True], [3, 1])
)  # up, rank, demodulate, k
CASES = [case for case in CASES if not (case[0] and case[3] == 1)]


def make_inputs(rank: int, k: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    inputs = {"x": draw(N, I, H, W), "styles": draw(N, I), "weight": draw(O, I, k, k)}
    if rank:
        inputs |= {"u": draw(N, O, rank), "v": draw(N, rank, I, k, k)}
    return inputs


def run(inputs, form, up, should_demodulate):
    residual = LowRank(u=inputs["u"], v=inputs["v"]) if "u" in inputs else None
    return modulated_conv2d(
        inputs["x"],
        inputs["weight"],
        inputs["styles"],
        gain=1.3,
        should_demodulate=should_demodulate,
        up=up,
        residual=residual,
        form=form,
    )


def by_hand(inputs, up, should_demodulate):
    """Sample by sample, straight from the equations."""
    rows = []
    for n in range(N):
        kernel = inputs["weight"] * inputs["styles"][n][None, :, None, None]
        if "u" in inputs:
            kernel = kernel + torch.einsum("or,rikl->oikl", inputs["u"][n], inputs["v"][n])
        if should_demodulate:
            norm = kernel.square().sum(dim=(1, 2, 3), keepdim=True)
            kernel = kernel / (norm + EPS).sqrt()
        x = inputs["x"][n : n + 1]
        if up:
            y = F.conv_transpose2d(x, kernel.transpose(0, 1), stride=2)
        else:
            y = F.conv2d(x, kernel, padding=kernel.shape[2] // 2)
        rows.append(y * 1.3)
    return torch.cat(rows)


@pytest.mark.parametrize(("up", "rank", "should_demodulate", "k"), CASES)
@pytest.mark.parametrize("form", ["grouped", "implicit", "folded", "auto"])
def test_forms_agree_with_the_equations(form, up, rank, should_demodulate, k):
    inputs = make_inputs(rank, k)
    y = run(inputs, form, up, should_demodulate)
    assert y.shape == ((N, O, 2 * H + 1, 2 * W + 1) if up else (N, O, H, W))
    assert float((y - by_hand(inputs, up, should_demodulate)).abs().max()) < 1e-10


@pytest.mark.parametrize(("up", "rank", "should_demodulate", "k"), CASES)
@pytest.mark.parametrize("form", ["implicit", "folded", "auto"])
def test_gradients_agree_with_the_grouped_twin(form, up, rank, should_demodulate, k):
    inputs = {name: t.requires_grad_() for name, t in make_inputs(rank, k).items()}
    y = run(inputs, form, up, should_demodulate)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).double()
    found = torch.autograd.grad(y, list(inputs.values()), cotangent)
    twin = run(inputs, "grouped", up, should_demodulate)
    expected = torch.autograd.grad(twin, list(inputs.values()), cotangent)
    for name, a, b in zip(inputs, found, expected, strict=True):
        assert float(b.abs().max()) > 1e-3, name
        assert float((a - b).abs().max()) < 1e-9, name


@pytest.mark.parametrize(("up", "k"), [(False, 1), (False, 3), (True, 3)])
@pytest.mark.parametrize("should_demodulate", [False, True])
def test_frozen_folded_function(up, k, should_demodulate):
    inputs = make_inputs(0, k)
    inputs["x"].requires_grad_()
    inputs["styles"].requires_grad_()
    y = run(inputs, "folded", up, should_demodulate)
    assert "FoldedConv" in type(y.grad_fn).__name__
    wanted = [inputs["x"], inputs["styles"]]
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).double()
    found = torch.autograd.grad(y, wanted, cotangent)
    twin = run(inputs, "grouped", up, should_demodulate)
    expected = torch.autograd.grad(twin, wanted, cotangent)
    for a, b in zip(found, expected, strict=True):
        assert float((a - b).abs().max()) < 1e-9


@pytest.mark.parametrize("wanted", ["x", "styles"])
def test_frozen_folded_function_with_one_input_that_learns(wanted):
    inputs = make_inputs(0, 3)
    inputs[wanted].requires_grad_()
    found = torch.autograd.grad(run(inputs, "folded", False, True).square().sum(), inputs[wanted])
    expected = torch.autograd.grad(
        run(inputs, "grouped", False, True).square().sum(), inputs[wanted]
    )
    assert float((found[0] - expected[0]).abs().max()) < 1e-9


def test_frozen_folded_function_passes_gradcheck():
    inputs = make_inputs(0, 3)
    weight = inputs["weight"]

    def conv(x, styles):
        return modulated_conv2d(x, weight, styles, up=True, form="folded")

    x, styles = inputs["x"][:2, :, :3, :3], inputs["styles"][:2]
    assert torch.autograd.gradcheck(conv, (x.clone().requires_grad_(), styles.requires_grad_()))


def test_implicit_form_is_twice_differentiable():
    inputs = make_inputs(0, 3)
    weight = inputs["weight"]
    styles = inputs["styles"][:2].requires_grad_()
    x = inputs["x"][:2, :, :3, :3].clone().requires_grad_()

    def conv(x, styles):
        return modulated_conv2d(x, weight, styles, form="implicit")

    assert torch.autograd.gradgradcheck(conv, (x, styles))


@pytest.mark.parametrize("form", ["grouped", "implicit", "folded"])
@pytest.mark.parametrize("up", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_residual_changes_nothing(form, up, dtype):
    inputs = {name: t.to(dtype) for name, t in make_inputs(2, 3).items()}
    inputs["u"] = torch.zeros_like(inputs["u"])
    refined = run(inputs, form, up, True)
    plain = run({k: inputs[k] for k in ("x", "styles", "weight")}, form, up, True)
    assert torch.equal(refined, plain)


@pytest.mark.parametrize("form", ["grouped", "implicit", "folded"])
@pytest.mark.parametrize("rank", [0, 2])
def test_rows_do_not_depend_on_their_batch(form, rank):
    inputs = make_inputs(rank, 3)
    whole = run(inputs, form, True, True)
    for n in range(N):
        one = {k: t if k == "weight" else t[n : n + 1] for k, t in inputs.items()}
        assert torch.allclose(run(one, form, True, True), whole[n : n + 1], atol=1e-13)


def test_demodulation_norm():
    inputs = make_inputs(3, 3)
    residual = LowRank(u=inputs["u"], v=inputs["v"])
    kernel = inputs["weight"] * inputs["styles"][:, None, :, None, None] + residual.kernel()
    expected = torch.rsqrt(kernel.square().sum(dim=(2, 3, 4)) + EPS)
    found = demodulate(inputs["weight"], inputs["styles"], residual)
    assert float(((found - expected) / expected).abs().max()) < 1e-12


def test_choice_of_the_form():
    styles, big = torch.zeros(1, 512), torch.zeros(512, 512, 3, 3)
    small = torch.zeros(16, 16, 3, 3)
    assert choose_form(torch.zeros(1, 512, 8, 8), big, styles, None) == "implicit"
    assert choose_form(torch.zeros(1, 16, 64, 64), small, styles[:, :16], None) == "folded"
    # O I k^2 = 2304 against 2 H W (I + O) = 64 H W: equal at 6x6.
    assert choose_form(torch.zeros(1, 16, 6, 6), small, styles[:, :16], None) == "implicit"
    assert choose_form(torch.zeros(1, 16, 6, 7), small, styles[:, :16], None) == "folded"


def test_what_learns_takes_the_implicit_form():
    x, styles = torch.zeros(1, 16, 64, 64), torch.zeros(1, 16)
    frozen, learning = torch.zeros(16, 16, 3, 3), torch.zeros(16, 16, 3, 3).requires_grad_()
    residual = LowRank(u=torch.zeros(1, 16, 2), v=torch.zeros(1, 2, 16, 3, 3))
    assert choose_form(x, learning, styles, None) == "implicit"
    assert choose_form(x, frozen, styles.requires_grad_(), None) == "folded"
    assert choose_form(x, frozen, styles, residual) == "implicit"
    with torch.no_grad():
        assert choose_form(x, learning, styles, residual) == "folded"


@pytest.mark.parametrize("form", ["implicit", "folded"])
def test_half_precision_does_not_overflow(form):
    inputs = make_inputs(0, 3)
    expected = run(inputs, "grouped", False, True)
    # Both scales cancel in the demodulation; in float16 either would overflow.
    large = {
        "x": inputs["x"].half(),
        "styles": inputs["styles"].float() * 3e4,
        "weight": inputs["weight"].float() * 3e4,
    }
    y = run(large, form, False, True)
    assert y.dtype == torch.float16
    assert float((y.double() - expected).abs().max()) < 1e-2


@pytest.mark.parametrize("form", ["grouped", "implicit", "folded"])
def test_activations_in_bfloat16_master_weights_in_float32(form):
    inputs = {name: t.float() for name, t in make_inputs(2, 3).items()}
    expected = run(inputs, "grouped", False, True)
    inputs["x"] = inputs["x"].bfloat16()
    y = run(inputs, form, False, True)
    assert y.dtype == torch.bfloat16
    assert float((y.float() - expected).norm() / expected.norm()) < 2e-2


def shared_run(inputs, form, up, should_demodulate=True, kept=None):
    """One pair of factors for all samples, by the view."""
    shared = LowRank(u=inputs["u"][:1], v=inputs["v"][:1]).expand(N)
    assert shared.is_shared
    x, weight, styles = inputs["x"], inputs["weight"], inputs["styles"]
    return modulated_conv2d(
        x,
        weight,
        styles,
        gain=1.3,
        scale=0.7,
        should_demodulate=should_demodulate,
        up=up,
        residual=shared,
        form=form,
        kept=kept,
    )


@pytest.mark.parametrize(("up", "k"), [(False, 1), (False, 3), (True, 3)])
@pytest.mark.parametrize("should_demodulate", [False, True])
@pytest.mark.parametrize("form", ["implicit", "folded", "auto"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("rank", [1, 3])
def test_a_shared_residual_agrees_with_the_grouped_twin(
    form, up, k, should_demodulate, layout, rank
):
    """Anew, and with what is kept of a frozen kernel, also when it is used again."""
    inputs = make_inputs(rank, k)
    inputs["x"] = inputs["x"].contiguous(memory_format=layout)
    twin = shared_run(inputs, "grouped", up, should_demodulate)
    assert float(twin.abs().mean()) > 0.1
    frozen = FrozenKernel(inputs["weight"][None], up)
    for kept in (None, frozen, frozen):
        y = shared_run(inputs, form, up, should_demodulate, kept)
        assert float((y - twin).abs().max()) < 1e-10


@pytest.mark.parametrize("up", [False, True])
@pytest.mark.parametrize("form", ["implicit", "folded", "auto"])
def test_gradients_of_a_shared_residual(form, up):
    inputs = {name: t.requires_grad_() for name, t in make_inputs(3, 3).items()}
    y = shared_run(inputs, form, up)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).double()
    found = torch.autograd.grad(y, list(inputs.values()), cotangent)
    expected = torch.autograd.grad(
        shared_run(inputs, "grouped", up), list(inputs.values()), cotangent
    )
    for name, a, b in zip(inputs, found, expected, strict=True):
        assert float(b.abs().max()) > 1e-3, name
        assert float((a - b).abs().max()) < 1e-9, name


def test_a_shared_residual_folds_earlier():
    x, styles = torch.zeros(2, 16, 8, 8), torch.zeros(2, 16)
    weight = torch.zeros(16, 16, 3, 3)
    one = LowRank(u=torch.zeros(1, 16, 2), v=torch.zeros(1, 2, 16, 3, 3))
    # 2 O I k^2 = 4608 against H W (I + O) = 32 H W: equal at 12x12.
    for size, form in ((12, "implicit"), (13, "folded")):
        x = torch.zeros(2, 16, size, size)
        assert choose_form(x, weight, styles, one.expand(2)) == form
        assert choose_form(x, weight, styles, LowRank.cat([one, one])) == "implicit"
    assert choose_form(x, weight.requires_grad_(), styles, one.expand(2)) == "implicit"
