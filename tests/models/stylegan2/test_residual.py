"""Low-rank residuals as values: shapes, slices, sums."""

import pytest
import torch

from models.stylegan2.residual import LowRank


def make(n=2, o=5, r=3, i=4, k=3, seed=0) -> LowRank:
    g = torch.Generator().manual_seed(seed)
    return LowRank(u=torch.randn(n, o, r, generator=g), v=torch.randn(n, r, i, k, k, generator=g))


def test_kernel_is_the_product():
    part = make()
    expected = torch.einsum("nor,nrikl->noikl", part.u, part.v)
    assert part.kernel().shape == (2, 5, 4, 3, 3)
    assert torch.allclose(part.kernel(), expected, atol=1e-6)
    assert int(torch.linalg.matrix_rank(part.kernel()[0].reshape(5, -1))) == 3


def test_slices_and_cat_are_inverse():
    part = make(n=3)
    joined = LowRank.cat([part[0:1], part[1:3]])
    assert torch.equal(joined.u, part.u)
    assert torch.equal(joined.v, part.v)


def test_total_adds_kernels():
    a, b = make(r=1), make(r=4, seed=1)
    total = LowRank.total([a, b])
    assert total.u.shape == (2, 5, 5)
    assert torch.allclose(total.kernel(), a.kernel() + b.kernel(), atol=1e-5)


def test_to():
    assert make().to(dtype=torch.float64).u.dtype == torch.float64
    assert make().to("cpu").v.device.type == "cpu"


@pytest.mark.parametrize(
    ("u", "v"),
    [((2, 5, 3), (2, 2, 4, 3, 3)), ((2, 5), (2, 3, 4, 3, 3)), ((2, 5, 3), (2, 3, 4, 3))],
)
def test_wrong_shapes(u, v):
    with pytest.raises(ValueError, match=r"low-rank residual: expected u \[N O r\].*found"):
        LowRank(u=torch.zeros(u), v=torch.zeros(v))


def test_expand_shares_one_pair_of_factors():
    one = make(n=1)
    shared = one.expand(4)
    assert (one.is_shared, make(n=4).is_shared, shared.is_shared) == (False, False, True)
    assert torch.equal(shared.kernel(), one.kernel().expand(4, -1, -1, -1, -1))
    assert shared[1:3].is_shared
    assert len(shared[1:3].u) == 2
    assert one.expand(1).is_shared
    double = shared.to(dtype=torch.float64)
    assert double.is_shared
    assert torch.equal(double.v, one.v.double().expand(4, -1, -1, -1, -1))
    assert not LowRank.cat([shared, one]).is_shared
