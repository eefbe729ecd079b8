"""The fast resampling forms against the textbook definition."""

import pytest
import torch

from models.stylegan2.resample import _kept_filter, blur, filter_2d, upfirdn2d, upsample2x


@pytest.fixture
def x():
    return torch.randn(2, 3, 9, 12, generator=torch.Generator().manual_seed(0)).double()


def test_filter():
    assert filter_2d().tolist()[0] == [1 / 64, 3 / 64, 3 / 64, 1 / 64]
    assert float(filter_2d(4.0).sum()) == 4.0
    assert filter_2d(dtype=torch.float64).dtype == torch.float64


def test_upfirdn2d_by_hand():
    x = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    kernel = torch.tensor([[1.0, 10.0], [100.0, 1000.0]])
    # Zero insertion, one zero before, and a convolution with the flipped kernel.
    y = upfirdn2d(x, kernel, up=2, padding=(1, 0))[0, 0]
    # An input pixel spreads the kernel to the right and down.
    expected = torch.zeros(5, 5)
    for row in range(2):
        for column in range(2):
            expected[2 * row : 2 * row + 2, 2 * column : 2 * column + 2] += (
                x[0, 0, row, column] * kernel
            )
    assert torch.equal(y, expected[:4, :4])
    assert torch.equal(upfirdn2d(x, kernel, up=2, down=2, padding=(1, 0))[0, 0], y[::2, ::2])


@pytest.mark.parametrize("padding", [0, 1, 2])
@pytest.mark.parametrize("gain", [1.0, 4.0])
def test_blur(x, padding, gain):
    kernel = filter_2d(gain, torch.float64)
    expected = upfirdn2d(x, kernel, padding=(padding, padding))
    assert torch.allclose(blur(x, padding, gain), expected, atol=1e-13)
    strided = upfirdn2d(x, kernel, down=2, padding=(padding, padding))
    assert torch.allclose(blur(x, padding, gain, stride=2), strided, atol=1e-13)


def test_upsample(x):
    # rosinality's Upsample: pad = ((4 - 2 + 1) // 2 + 1, (4 - 2) // 2).
    expected = upfirdn2d(x, filter_2d(4.0, torch.float64), up=2, padding=(2, 1))
    assert upsample2x(x).shape == (2, 3, 18, 24)
    assert torch.allclose(upsample2x(x), expected, atol=1e-13)


def test_gains_keep_a_flat_picture():
    flat = torch.ones(1, 2, 16, 16)
    assert torch.allclose(upsample2x(flat)[:, :, 2:-2, 2:-2], torch.ones(()))
    assert torch.allclose(blur(flat, 1)[:, :, 2:-2, 2:-2], torch.ones(()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtype_and_memory_format_are_kept(dtype):
    x = torch.randn(2, 4, 8, 8).to(dtype).to(memory_format=torch.channels_last)
    for y in (blur(x, 1), upsample2x(x)):
        assert y.dtype == dtype
        assert y.is_contiguous(memory_format=torch.channels_last)


def test_gradients_are_those_of_the_definition(x):
    x = x.requires_grad_()
    kernel = filter_2d(4.0, torch.float64)
    for fast, slow in (
        (blur(x, 1, 4.0), upfirdn2d(x, kernel, padding=(1, 1))),
        (upsample2x(x), upfirdn2d(x, kernel, up=2, padding=(2, 1))),
    ):
        cotangent = torch.randn_like(fast)
        (a,) = torch.autograd.grad(fast, x, cotangent)
        (b,) = torch.autograd.grad(slow, x, cotangent)
        assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize(
    ("padding", "stride", "size"), [(1, 1, 9), (2, 1, 8), (1, 2, 8), (1, 2, 9)]
)
def test_blur_is_its_own_adjoint(padding: int, stride: int, size: int) -> None:
    """The hand-written backward pass, once and twice, against numerical derivatives."""
    x = torch.randn(2, 3, size, size, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: blur(t, padding, 4.0, stride), x)
    assert torch.autograd.gradgradcheck(lambda t: blur(t, padding, 4.0, stride), x)


def test_a_filter_that_inference_mode_made_first_serves_autograd() -> None:
    _kept_filter.cache_clear()
    x = torch.rand(1, 2, 8, 8, dtype=torch.float64)
    with torch.inference_mode():
        upsample2x(x)
        blur(x, padding=1, gain=3.0)
    x.requires_grad_()
    (upsample2x(x).sum() + blur(x, padding=1, gain=3.0).sum()).backward()
    assert x.grad is not None
    # Away from the edges a pixel gives what the filters' gains are, 4 and 3.
    assert torch.allclose(x.grad[:, :, 3:5, 3:5], torch.full((2, 2), 7.0, dtype=torch.float64))
