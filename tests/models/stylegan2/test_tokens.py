"""Token sets: their product as a kernel, its rank, and what the generator makes of it."""

import pytest
import torch

from models.errors import ConfigError
from models.stylegan2.generator import Generator
from models.stylegan2.modulated_conv import modulated_conv2d
from models.stylegan2.tokens import (
    FACTORIZATIONS,
    Factorization,
    TokenLayout,
    kernel_channels,
    relative_energy,
    token_layouts,
)

EACH = pytest.mark.parametrize("factorization", FACTORIZATIONS)


def layout(factorization: Factorization, rank: int = 2, out: int = 7, inside: int = 5):
    return TokenLayout(factorization=factorization, rank=rank, out_channels=out, in_channels=inside)


def tokens(sizes: TokenLayout, n: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    p = torch.randn(n, sizes.count, sizes.p_width, generator=g, dtype=torch.float64)
    q = torch.randn(n, sizes.count, sizes.q_width, generator=g, dtype=torch.float64)
    return p, q


def materialised(sizes: TokenLayout, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """dW [N O I k k] as the table of the spec writes it, without a `LowRank`."""
    n, r, o, i, k = len(p), sizes.rank, sizes.out_channels, sizes.in_channels, sizes.kernel
    if sizes.factorization == "per_tap":
        p, q = p.reshape(n, k, k, r, o), q.reshape(n, k, k, r, i)
        return torch.einsum("nabto,nabti->noiab", p, q)
    if sizes.factorization == "shared":
        return torch.einsum("nto,ntiab->noiab", p, q.reshape(n, r, i, k, k))
    matrix = p.transpose(1, 2) @ q  # [(O k) (I k)]
    return matrix.reshape(n, o, k, i, k).permute(0, 1, 3, 2, 4)


@EACH
def test_the_low_rank_is_the_product_of_the_sets(factorization: Factorization) -> None:
    sizes = layout(factorization)
    p, q = tokens(sizes)
    found = sizes.low_rank(p, q).kernel()
    torch.testing.assert_close(found, materialised(sizes, p, q), atol=1e-12, rtol=0)
    gain = torch.arange(7, dtype=torch.float64)
    scaled = sizes.low_rank(p, q, gain).kernel()
    torch.testing.assert_close(scaled, found * gain[:, None, None, None], atol=1e-12, rtol=0)
    assert not sizes.low_rank(p, q, 0.0).kernel().any()


@EACH
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_rank_is_bounded_by_the_setting(factorization: Factorization, rank: int) -> None:
    sizes = layout(factorization, rank, out=16, inside=12)
    kernel = sizes.low_rank(*tokens(sizes)).kernel()[0]
    whole = int(torch.linalg.matrix_rank(kernel.reshape(16, -1)))
    per_token = {"per_tap": sizes.kernel**2, "shared": 1, "conv_lora": sizes.kernel}
    assert whole <= min(rank * per_token[factorization], 16)
    # Generic tokens reach the bound: the setting means what it says.
    if factorization == "per_tap":
        by_tap = kernel.permute(2, 3, 0, 1)
        assert torch.linalg.matrix_rank(by_tap).unique().tolist() == [rank]
    elif factorization == "conv_lora":
        matrix = kernel.permute(0, 2, 1, 3).reshape(16 * 3, 12 * 3)
        assert int(torch.linalg.matrix_rank(matrix)) == rank
    else:
        assert whole == rank


@EACH
@pytest.mark.parametrize("up", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_factored_is_materialised_in_the_convolution(
    factorization: Factorization, up: bool, memory_format: torch.memory_format
) -> None:
    """The factored form never builds the kernel; with demodulation it is the same to 1e-9."""
    sizes = layout(factorization, rank=1)
    g = torch.Generator().manual_seed(3)
    x = torch.randn(2, 5, 6, 4, generator=g, dtype=torch.float64).to(memory_format=memory_format)
    weight = torch.randn(7, 5, 3, 3, generator=g, dtype=torch.float64)
    styles = torch.randn(2, 5, generator=g, dtype=torch.float64)
    p, q = tokens(sizes)
    kernel = weight * styles[:, None, :, None, None] + materialised(sizes, p, q)
    kernel = kernel * 0.3
    kernel = kernel * (kernel.square().sum((2, 3, 4), keepdim=True) + 1e-8).rsqrt()
    want = []
    for row in range(2):
        if up:
            turned = kernel[row].transpose(0, 1)
            want.append(torch.nn.functional.conv_transpose2d(x[row : row + 1], turned, stride=2))
        else:
            want.append(torch.nn.functional.conv2d(x[row : row + 1], kernel[row], padding=1))
    for form in ("implicit", "folded", "grouped"):
        found = modulated_conv2d(
            x, weight, styles, scale=0.3, up=up, residual=sizes.low_rank(p, q), form=form
        )
        torch.testing.assert_close(found, torch.cat(want), atol=1e-9, rtol=0)


@EACH
def test_zero_tokens_render_the_unrefined_picture(
    factorization: Factorization, tiny_generator: Generator
) -> None:
    generator = tiny_generator
    layouts = token_layouts(kernel_channels(generator), (), factorization, 2)
    assert list(layouts) == list(range(generator.num_convs))
    w_plus = generator.mapping(torch.randn(2, 16, generator=torch.Generator().manual_seed(1)))
    residual = {}
    for layer, sizes in layouts.items():
        p, q = tokens(sizes)
        residual[layer] = sizes.low_rank(p.float(), torch.zeros_like(q).float())
    assert torch.equal(
        generator.synthesis(w_plus, "const", None, residual), generator.synthesis(w_plus)
    )


@EACH
def test_relative_energy_is_that_of_the_kernels(
    factorization: Factorization, tiny_generator: Generator
) -> None:
    generator = tiny_generator.double()
    layouts = token_layouts(kernel_channels(generator), (1, 4), factorization, 2)
    w_plus = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(1)).double()
    residual = {layer: sizes.low_rank(*tokens(sizes)) for layer, sizes in layouts.items()}
    want = []
    for layer, low_rank in residual.items():
        conv = generator.conv(layer).conv
        plain = conv.weight * conv.modulation(w_plus[:, layer])[:, None, :, None, None]
        dw = low_rank.kernel()
        want.append(dw.square().mean((1, 2, 3, 4)) / plain.square().mean((1, 2, 3, 4)))
    found = relative_energy(generator, w_plus, residual)
    torch.testing.assert_close(found, torch.stack(want).mean(0), atol=1e-9, rtol=1e-9)


def test_what_describes_no_residual_is_refused() -> None:
    channels = [(8, 8)] * 4
    with pytest.raises(ConfigError, match="expected one of per_tap, shared, conv_lora, found 'x'"):
        token_layouts(channels, (), "x", 1)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="rank must be >= 1, got 0"):
        token_layouts(channels, (), "shared", 0)
    with pytest.raises(ConfigError, match=r"3x3 layers in 0\.\.3, found 4"):
        token_layouts(channels, (1, 4), "shared", 1)
    sizes = layout("shared")
    p, q = tokens(sizes)
    with pytest.raises(ValueError, match=r"expected P and Q \[2, 2, 7\] and \[2, 2, 45\], found"):
        sizes.low_rank(p[:, :1], q)
