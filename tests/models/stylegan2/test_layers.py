"""Equalised-learning-rate layers against their formulas."""

import math

import pytest
import torch
import torch.nn.functional as F

from models.stylegan2.layers import (
    Bias,
    EqualConv2d,
    EqualLinear,
    PixelNorm,
    leaky_relu,
    scaled_lrelu,
)


def test_activations():
    x = torch.tensor([-5.0, 0.0, 5.0])
    assert leaky_relu(x).tolist() == [-1.0, 0.0, 5.0]
    assert torch.allclose(scaled_lrelu(x), torch.tensor([-1.0, 0.0, 5.0]) * 2**0.5)


def test_pixel_norm():
    x = torch.randn(5, 7, dtype=torch.float64) * 3
    y = PixelNorm()(x)
    assert torch.allclose(y.square().mean(1), torch.ones(5, dtype=torch.float64), atol=1e-7)
    assert torch.allclose(F.cosine_similarity(x, y), torch.ones(5, dtype=torch.float64))
    assert torch.equal(PixelNorm()(torch.zeros(1, 3)), torch.zeros(1, 3))


@pytest.mark.parametrize("is_activated", [False, True])
@pytest.mark.parametrize("lr_mul", [1.0, 0.01])
def test_equal_linear(lr_mul, is_activated):
    layer = EqualLinear(6, 4, bias_init=1.0, lr_mul=lr_mul, is_activated=is_activated).double()
    x = torch.randn(3, 6, dtype=torch.float64)
    expected = x @ layer.weight.T * (lr_mul / math.sqrt(6)) + 1.0
    if is_activated:
        expected = F.leaky_relu(expected, 0.2) * math.sqrt(2)
    assert torch.allclose(layer(x), expected, atol=1e-6)
    assert sorted(layer.state_dict()) == ["bias", "weight"]


@torch.no_grad()
def test_equalised_scale_keeps_the_variance():
    torch.manual_seed(0)
    x = torch.randn(4000, 256)
    assert abs(float(EqualLinear(256, 64, lr_mul=0.01)(x).std()) - 1) < 0.05
    image = torch.randn(8, 32, 16, 16)
    y = EqualConv2d(32, 16, 3)(image)
    assert y.shape == (8, 16, 14, 14)
    assert abs(float(y.std()) - 1) < 0.1


def test_equal_conv2d():
    layer = EqualConv2d(3, 5, 3, stride=2, padding=1)
    x = torch.randn(2, 3, 8, 8)
    expected = F.conv2d(x, layer.weight / math.sqrt(27), stride=2, padding=1)
    assert torch.allclose(layer(x), expected, atol=1e-6)
    assert torch.allclose(layer(x, gain=2.5), expected * 2.5, atol=1e-5)


def test_bias_is_a_parameter_of_rosinality_s_name():
    assert Bias(4).state_dict()["bias"].tolist() == [0.0] * 4
