"""The discriminator; its agreement with other programs is in tests/parity and test_nvidia."""

import pytest
import torch

from models.stylegan2.discriminator import Discriminator, minibatch_stddev


@pytest.fixture
def d():
    torch.manual_seed(0)
    return Discriminator(16, {4: 8, 8: 6, 16: 4}).double().eval()


def test_minibatch_stddev_by_hand():
    x = torch.randn(8, 3, 4, 4, dtype=torch.float64)
    y = minibatch_stddev(x, 4)
    assert y.shape == (8, 1, 4, 4)
    for n in range(8):
        # Two groups of four: the images with an even index, and those with an odd one.
        group = x[n % 2 :: 2]
        std = (group.var(0, unbiased=False) + 1e-8).sqrt().mean()
        assert torch.allclose(y[n], std.expand(1, 4, 4), atol=1e-13)


def test_minibatch_stddev_of_small_batches():
    x = torch.randn(1, 3, 4, 4)
    assert torch.allclose(minibatch_stddev(x, 4), torch.tensor(1e-4))
    x = torch.randn(3, 3, 4, 4)
    expected = (x.var(0, unbiased=False) + 1e-8).sqrt().mean()
    assert torch.allclose(minibatch_stddev(x, 4), expected)
    with pytest.raises(ValueError, match=r"at most 4 or a multiple of it, found 6"):
        minibatch_stddev(torch.zeros(6, 3, 4, 4), 4)


def test_logits_depend_on_the_own_group_only(d):
    image = torch.randn(8, 3, 16, 16, dtype=torch.float64)
    logits = d(image)
    assert logits.shape == (8, 1)
    assert torch.allclose(d(image[::2]), logits[::2], atol=1e-12)
    assert not torch.allclose(d(image[:4]), logits[:4], atol=1e-6)


def test_features(d):
    taps = d.features(torch.randn(2, 3, 16, 16, dtype=torch.float64))
    assert [list(t.shape[1:]) for t in taps] == [[4, 16, 16], [6, 8, 8], [8, 4, 4], [8, 4, 4]]


def test_twice_differentiable(d):
    """R1 needs the gradient of a gradient, with respect to the weights."""
    image = torch.randn(2, 3, 16, 16, dtype=torch.float64, requires_grad=True)
    weight = d.convs[1].conv1["0"].weight

    def penalty() -> torch.Tensor:
        (gradient,) = torch.autograd.grad(d(image).sum(), image, create_graph=True)
        return gradient.square().sum()

    (found,) = torch.autograd.grad(penalty(), weight)
    direction, step = torch.randn_like(weight), 1e-6
    original = weight.detach().clone()
    values = []
    for sign in (1, -1):
        weight.data = original + sign * step * direction
        values.append(penalty().detach())
    numeric = (values[0] - values[1]) / (2 * step)
    assert torch.allclose((found * direction).sum(), numeric, rtol=1e-4)


def test_condition():
    torch.manual_seed(0)
    d = Discriminator(8, {4: 6, 8: 4}, c_dim=3, mapping_layers=2).eval()
    image = torch.randn(1, 3, 8, 8).expand(3, -1, -1, -1)
    logits = d(image, torch.eye(3))
    assert logits.shape == (3, 1)
    assert len(logits.unique()) == 3
    with pytest.raises(ValueError, match=r"conditional: it needs c of shape \[N 3\]"):
        d(image)


def test_clamp():
    torch.manual_seed(0)
    d = Discriminator(8, {4: 6, 8: 4}, conv_clamp=0.25).eval()
    with torch.no_grad():
        d.final_conv["1"].bias.fill_(1.0)
        d.convs[1].skip["1"].weight.mul_(20.0)
        taps = d.features(torch.randn(2, 3, 8, 8))
    assert float(taps[0].abs().max()) == 0.25
    assert float(taps[-1].abs().max()) == 0.25
    assert float(taps[1].abs().max()) > 0.25  # the sum with the linear skip is not clamped


def test_compute_dtype(d):
    image = torch.randn(4, 3, 16, 16)
    d = d.float()
    exact = d(image).detach()
    d.compute_dtype, d.memory_format = torch.bfloat16, torch.channels_last
    rough = d(image).detach()
    assert rough.dtype == torch.float32
    assert 0 < float((rough - exact).norm() / exact.norm()) < 0.1
