"""The filter's GPU kernel against the convolution that it stands for."""

import pytest
import torch
import torch.nn.functional as F

from models.stylegan2.resample import HAS_TRITON, blur, filter_2d

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and HAS_TRITON), reason="needs a CUDA device and Triton"
    ),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("padding", "stride", "gain"), [(1, 1, 4.0), (2, 1, 1.0), (1, 2, 1.0)])
def test_the_kernel_is_the_convolution(
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    padding: int,
    stride: int,
    gain: float,
) -> None:
    x = torch.randn(3, 5, 17, 22, device="cuda", dtype=dtype).contiguous(
        memory_format=memory_format
    )
    kernel = filter_2d(gain, torch.float32, x.device)[None, None].expand(5, 1, 4, 4)
    wanted = F.conv2d(x.double(), kernel.double(), padding=padding, stride=stride, groups=5)
    found = blur(x, padding, gain, stride)
    assert found.stride() == wanted.contiguous(memory_format=memory_format).stride()
    error = (found.double() - wanted).norm() / wanted.norm()
    assert error < (1e-6 if dtype == torch.float32 else 4e-3)


def test_its_gradient_is_that_of_the_convolution() -> None:
    x = torch.randn(2, 3, 12, 12, device="cuda", dtype=torch.float32, requires_grad=True)
    gy = torch.randn(2, 3, 6, 6, device="cuda")
    (found,) = torch.autograd.grad(blur(x, 1, 1.0, 2), x, gy)
    kernel = filter_2d(1.0, torch.float32, x.device)[None, None].expand(3, 1, 4, 4)
    (wanted,) = torch.autograd.grad(F.conv2d(x, kernel, padding=1, stride=2, groups=3), x, gy)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
