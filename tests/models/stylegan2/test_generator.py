"""The generator against a slow twin from the equations, its doors, and what it refuses."""

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F

from models.stylegan2.generator import Generator, GeneratorArchitecture, weights_hash
from models.stylegan2.resample import filter_2d, upfirdn2d
from models.stylegan2.residual import LowRank


def slow_synthesis(g, w_plus, maps, features=None, residual=None):
    """StyleGAN2 as the paper writes it: sample by sample, kernels built, filters by definition."""
    clamp = g.architecture.conv_clamp or math.inf
    kernel4 = filter_2d(4.0, torch.float64)
    rows = []
    for n in range(len(w_plus)):
        x, image = g.input.input, None
        for index in range(g.num_convs):
            layer = g.conv(index)
            style = _affine(layer.conv.modulation, w_plus[n, index])
            kernel = layer.conv.weight[0] * style[None, :, None, None]
            if residual and index in residual:
                kernel = kernel + residual[index].kernel()[n]
            kernel = kernel / math.sqrt(kernel[0].numel())
            kernel = kernel / (kernel.square().sum(dim=(1, 2, 3), keepdim=True) + 1e-8).sqrt()
            if index % 2:
                x = F.conv_transpose2d(x, kernel.transpose(0, 1), stride=2)
                x = upfirdn2d(x, kernel4, padding=(1, 1))
            else:
                x = F.conv2d(x, kernel, padding=1)
            if maps[index] is not None:
                noise = maps[index][n % len(maps[index])]
                x = x + noise[None] * layer.noise.weight
            x = F.leaky_relu(x + layer.activate.bias[None, :, None, None], 0.2) * math.sqrt(2)
            x = x.clamp(-clamp, clamp)
            if index % 2 == 0:
                rgb = g.to_rgb1 if index == 0 else g.to_rgbs[index // 2 - 1]
                style = _affine(rgb.conv.modulation, w_plus[n, index + 1])
                kernel = rgb.conv.weight[0] * style[None, :, None, None]
                y = F.conv2d(x, kernel / math.sqrt(len(style))) + rgb.bias
                y = y.clamp(-clamp, clamp)
                if image is not None:
                    y = y + upfirdn2d(image, kernel4, up=2, padding=(2, 1))
                image = y
            if features and index + 1 in features:
                x = features[index + 1][n : n + 1]
        rows.append(image)
    return torch.cat(rows)


def _affine(layer, w):
    return w @ layer.weight.T / math.sqrt(len(w)) + layer.bias


@pytest.fixture
def exact(tiny_generator):
    """The tiny generator in float64, with biases and noise that matter."""
    g = copy.deepcopy(tiny_generator).double()
    stream = torch.Generator().manual_seed(1)
    for name, p in g.named_parameters():
        if name.endswith("bias"):
            p.add_(torch.randn(p.shape, generator=stream) * 0.3)
    return g


@pytest.fixture
def w_plus():
    return torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(2)).double()


def _draw_residual(g, n, rank, layers, seed=3):
    stream = torch.Generator().manual_seed(seed)
    found = {}
    for index in layers:
        _, o, i, k, _ = g.conv(index).conv.weight.shape
        found[index] = LowRank(
            u=torch.randn(n, o, rank, generator=stream).double(),
            v=torch.randn(n, rank, i, k, k, generator=stream).double(),
        )
    return found


def _close(a, b, limit=1e-10):
    assert a.shape == b.shape
    assert float((a - b).abs().max()) < limit


FORMS = ["auto", "grouped", "implicit", "folded"]


@pytest.mark.parametrize("form", FORMS)
def test_slow_twin(exact, w_plus, form):
    exact.form = form
    maps = [getattr(exact.noises, f"noise_{i}") for i in range(7)]
    image = exact.synthesis(w_plus)
    assert image.shape == (3, 3, 32, 32)
    _close(image, slow_synthesis(exact, w_plus, maps))
    _close(exact.synthesis(w_plus, "none"), slow_synthesis(exact, w_plus, [None] * 7))
    own = [torch.randn(3, 1, *m.shape[2:], dtype=torch.float64) for m in maps]
    _close(exact.synthesis(w_plus, own), slow_synthesis(exact, w_plus, own))


@pytest.mark.parametrize("form", FORMS)
def test_residual_door(exact, w_plus, form):
    exact.form = form
    residual = _draw_residual(exact, 3, 2, range(7))
    image = exact.synthesis(w_plus, "none", residual=residual)
    expected = slow_synthesis(exact, w_plus, [None] * 7, residual=residual)
    _close(image, expected)
    assert float((image - exact.synthesis(w_plus, "none")).abs().max()) > 0.1
    some = {4: residual[4]}
    expected = slow_synthesis(exact, w_plus, [None] * 7, residual=some)
    _close(exact.synthesis(w_plus, "none", residual=some), expected)


def _draw_shift(g, n, layers, seed=7):
    stream = torch.Generator().manual_seed(seed)
    sizes = [layer.weight.shape[2] for _, layer, _ in g.layers()]
    return {i: torch.randn(n, sizes[i], generator=stream).double() for i in layers}


@pytest.mark.parametrize("form", FORMS)
def test_style_shift_is_a_change_of_the_affines_bias(exact, w_plus, form):
    """Every layer's shift equals that of a generator whose affine has another bias."""
    exact.form = form
    shift = _draw_shift(exact, 1, range(11))
    other = copy.deepcopy(exact)
    for index, (_, layer, _) in enumerate(other.layers()):
        layer.modulation.bias += shift[index][0]
    want = slow_synthesis(other, w_plus, [None] * 7)
    _close(exact.synthesis(w_plus, "none", style_shift=shift), want)
    assert float((want - exact.synthesis(w_plus, "none")).abs().max()) > 0.1
    _close(exact.activations(w_plus, 5, "none", shift), other.activations(w_plus, 5, "none"))


def test_each_row_has_its_own_style_shift(exact, w_plus):
    shift = _draw_shift(exact, 3, [0, 4, 10])
    whole = exact.synthesis(w_plus, style_shift=shift)
    for n in range(3):
        own = {i: s[n : n + 1] for i, s in shift.items()}
        _close(exact.synthesis(w_plus[n : n + 1], style_shift=own), whole[n : n + 1], 1e-12)
    same = {i: s[:1].expand(3, -1) for i, s in shift.items()}
    one = {i: s[:1] for i, s in shift.items()}
    assert torch.equal(
        exact.synthesis(w_plus, style_shift=same), exact.synthesis(w_plus, style_shift=one)
    )


@pytest.mark.parametrize("form", FORMS)
def test_zero_style_shift_is_the_unshifted_picture(tiny_generator, w_plus, form):
    tiny_generator.form = form
    zero = {i: 0.0 * s.float() for i, s in _draw_shift(tiny_generator, 3, range(11)).items()}
    found = tiny_generator.synthesis(w_plus.float(), style_shift=zero)
    assert torch.equal(found, tiny_generator.synthesis(w_plus.float()))


def test_a_chunked_batch_takes_its_rows_of_the_style_shift(
    tiny_generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    w_plus = torch.randn(5, 8, 16, generator=torch.Generator().manual_seed(8))
    shift = {i: s.float() for i, s in _draw_shift(tiny_generator, 5, [2, 9, 10]).items()}
    whole = tiny_generator.synthesis(w_plus, style_shift=shift)
    monkeypatch.setattr("models.stylegan2.generator.CHUNK_BYTES", 2 * 32 * 32 * 8 * 4)
    torch.testing.assert_close(tiny_generator.synthesis(w_plus, style_shift=shift), whole)


def test_gradients_of_a_style_shift(exact, w_plus):
    shift = {i: s.requires_grad_() for i, s in _draw_shift(exact, 3, [0, 10]).items()}
    image = exact.synthesis(w_plus, style_shift=shift)
    step = 1e-6
    for index, values in shift.items():
        (slope,) = torch.autograd.grad(image.square().sum(), values, retain_graph=True)
        moved = {**shift, index: values.detach() + step * (torch.arange(values.shape[1]) == 3)}
        there = exact.synthesis(w_plus, style_shift=moved)
        change = (there.square().sum() - image.square().sum()).detach()
        assert float(change / step) == pytest.approx(float(slope[:, 3].sum()), rel=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_zero_residual_is_the_unrefined_picture(tiny_generator, w_plus, form):
    tiny_generator.form = form
    w_plus = w_plus.float()
    zero = {
        i: LowRank(u=torch.zeros_like(r.u.float()), v=r.v.float())
        for i, r in _draw_residual(tiny_generator, 3, 4, range(7)).items()
    }
    plain = tiny_generator.synthesis(w_plus)
    assert torch.equal(tiny_generator.synthesis(w_plus, residual=zero), plain)


@pytest.mark.parametrize("layer", [1, 2, 5, 6])
def test_features_door(exact, w_plus, layer):
    """The next layer reads the replacement, the ToRGB of the same resolution what it replaced."""
    own = exact.activations(w_plus, layer, "none")
    _close(exact.synthesis(w_plus, "none", {layer: own}), exact.synthesis(w_plus, "none"), 1e-14)
    other = own + torch.randn(own.shape, generator=torch.Generator().manual_seed(4)).double()
    image = exact.synthesis(w_plus, "none", {layer: other})
    _close(image, slow_synthesis(exact, w_plus, [None] * 7, features={layer: other}))
    assert float((image - exact.synthesis(w_plus, "none")).abs().max()) > 1e-2


@pytest.mark.parametrize("layer", [0, 1, 2, 5, 7])
def test_synthesis_goes_on_from_what_was_begun(exact, w_plus, layer):
    residual = _draw_residual(exact, 3, 2, range(7))
    features = {2: 1.5 * exact.activations(w_plus, 2)}
    whole = exact.synthesis(w_plus, "const", features, residual)
    begun = exact.begin(w_plus, layer, "const", features, residual)
    _close(exact.synthesis(w_plus, "const", features, residual, begun=begun), whole, 1e-12)
    rows = torch.tensor([2, 0])
    part = {k: LowRank(u=r.u[rows], v=r.v[rows]) for k, r in residual.items()}
    own = {2: features[2][rows]}
    found = exact.synthesis(w_plus[rows], "const", own, part, begun=begun[rows])
    _close(found, whole[rows], 1e-12)


def test_last_layer_has_no_reader(exact, w_plus):
    """L - 1 is allowed and changes nothing: only its own ToRGB would read it."""
    zeros = torch.zeros(3, 8, 32, 32, dtype=torch.float64)
    assert torch.equal(exact.synthesis(w_plus, features={7: zeros}), exact.synthesis(w_plus))


def test_random_noise(tiny_generator, w_plus):
    w_plus = w_plus.float()
    torch.manual_seed(5)
    first = tiny_generator.synthesis(w_plus, "random")
    second = tiny_generator.synthesis(w_plus, "random")
    torch.manual_seed(5)
    assert torch.equal(tiny_generator.synthesis(w_plus, "random"), first)
    assert float((first - second).abs().max()) > 1e-3


def test_clamp(w_plus):
    torch.manual_seed(0)
    arch = GeneratorArchitecture(
        resolution=32,
        widths={4: 8, 8: 8, 16: 8, 32: 4},
        z_dim=16,
        w_dim=16,
        mapping_layers=1,
        conv_clamp=0.7,
    )
    g = Generator(arch).double().requires_grad_(False)
    image = g.synthesis(w_plus, "none")
    _close(image, slow_synthesis(g, w_plus, [None] * 7))
    object.__setattr__(arch, "conv_clamp", None)
    assert float((image - g.synthesis(w_plus, "none")).abs().max()) > 0.1


@pytest.mark.parametrize("form", FORMS)
def test_rows_do_not_depend_on_their_batch(exact, w_plus, form):
    exact.form = form
    residual = _draw_residual(exact, 3, 2, [2, 6])
    whole = exact.synthesis(w_plus, residual=residual)
    for n in range(3):
        own = {i: r[n : n + 1] for i, r in residual.items()}
        _close(exact.synthesis(w_plus[n : n + 1], residual=own), whole[n : n + 1], 1e-12)


@pytest.mark.parametrize("form", ["auto", "implicit", "folded"])
def test_gradients_of_codes_noise_and_residual(exact, w_plus, form):
    residual = _draw_residual(exact, 3, 2, [0, 3])
    maps = [torch.randn(3, 1, *_size(i), dtype=torch.float64) for i in range(7)]
    leaves = [w_plus, *maps, *(t for r in residual.values() for t in (r.u, r.v))]
    for leaf in leaves:
        leaf.requires_grad_()

    def gradients(how):
        exact.form = how
        image = exact.synthesis(w_plus, maps, residual=residual)
        return torch.autograd.grad(image.square().sum(), leaves)

    for a, b in zip(gradients(form), gradients("grouped"), strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-9


def _size(index):
    return (Generator.conv_resolution(index),) * 2


def test_mapping_and_truncation(exact):
    z = torch.randn(4, 16, dtype=torch.float64)
    x = z / (z.square().mean(1, keepdim=True) + 1e-8).sqrt()
    for layer in exact.style[1:]:
        x = x @ layer.weight.T * (0.01 / 4) + layer.bias * 0.01
        x = F.leaky_relu(x, 0.2) * math.sqrt(2)
    w_plus = exact.mapping(z)
    assert w_plus.shape == (4, 8, 16)
    _close(w_plus, x[:, None].expand(-1, 8, -1))
    avg = exact.latent_avg
    _close(exact.mapping(z, truncation_psi=0.0), avg.expand(4, 8, -1))
    half = exact.mapping(z, truncation_psi=0.5, truncation_cutoff=3)
    _close(half[:, :3], (avg + 0.5 * (x - avg))[:, None].expand(-1, 3, -1))
    assert torch.equal(half[:, 3:], w_plus[:, 3:])


def test_layers_and_styles(exact, w_plus):
    names = [(name, row) for name, _, row in exact.layers()]
    assert names == [
        ("conv1", 0),
        ("to_rgb1", 1),
        ("convs.0", 1),
        ("convs.1", 2),
        ("to_rgbs.0", 3),
        ("convs.2", 3),
        ("convs.3", 4),
        ("to_rgbs.1", 5),
        ("convs.4", 5),
        ("convs.5", 6),
        ("to_rgbs.2", 7),
    ]
    styles = exact.styles(w_plus)
    for (_, layer, row), style in zip(exact.layers(), styles, strict=True):
        _close(style, torch.stack([_affine(layer.modulation, w) for w in w_plus[:, row]]))
    assert [exact.conv_resolution(i) for i in range(7)] == [4, 8, 8, 16, 16, 32, 32]


@pytest.mark.parametrize("is_channels_last", [False, True])
def test_compute_dtype(tiny_generator, w_plus, is_channels_last):
    w_plus = w_plus.float()
    exact = tiny_generator.synthesis(w_plus)
    tiny_generator.compute_dtype = torch.bfloat16
    if is_channels_last:
        tiny_generator.memory_format = torch.channels_last
    rough = tiny_generator.synthesis(w_plus)
    assert rough.dtype == torch.float32
    assert 0 < float((rough - exact).norm() / exact.norm()) < 3e-2


def test_channels_last_changes_no_value(exact, w_plus):
    plain = exact.synthesis(w_plus)
    exact.memory_format = torch.channels_last
    _close(exact.synthesis(w_plus), plain, 1e-12)


def test_activations(exact, w_plus):
    assert exact.activations(w_plus, 5).shape == (3, 8, 16, 16)
    assert len(exact.conv(4)._forward_hooks) == 0
    for layer in (0, 8):
        with pytest.raises(ValueError, match=rf"expected a layer in 1..7, found {layer}"):
            exact.activations(w_plus, layer)


def test_what_synthesis_refuses(exact, w_plus):
    with pytest.raises(ValueError, match=r"w_plus: expected \[N 8 16\] for this 32 px generator"):
        exact.synthesis(w_plus[:, :7])
    with pytest.raises(ValueError, match=r"w_plus: .* found \[3, 16\]"):
        exact.synthesis(w_plus[:, 0])
    with pytest.raises(ValueError, match=r"features: expected layers in 1..7, found 0"):
        exact.synthesis(w_plus, features={0: w_plus})
    with pytest.raises(ValueError, match=r'noise: expected "const", "none", "random" or tensors'):
        exact.synthesis(w_plus, "white")
    with pytest.raises(ValueError, match=r"noise: expected 7 maps, found 2"):
        exact.synthesis(w_plus, [torch.zeros(1)] * 2)
    residual = _draw_residual(exact, 3, 2, [0, 6])
    with pytest.raises(ValueError, match=r"residual: expected layers in 0..6, found 7"):
        exact.synthesis(w_plus, residual={7: residual[0]})
    with pytest.raises(ValueError, match=r"residual of layer 6: .*made for another generator"):
        exact.synthesis(w_plus, residual={6: residual[0]})
    with pytest.raises(ValueError, match=r"residual of layer 0"):
        exact.synthesis(w_plus[:2], residual={0: residual[0]})
    with pytest.raises(ValueError, match=r"style_shift: expected layers in 0..10, found 11"):
        exact.synthesis(w_plus, style_shift={11: torch.zeros(1, 8)})
    for wrong in (torch.zeros(2, 8), torch.zeros(3, 16)):
        with pytest.raises(
            ValueError, match=r"layer 10 \(to_rgbs.2\): expected \[3 8\] or \[1 8\]"
        ):
            exact.synthesis(w_plus, style_shift={10: wrong})


def test_architecture():
    arch = GeneratorArchitecture(resolution=16, widths={4: 8, 8: 8, 16: 4})
    assert arch.num_ws == 6
    assert arch.to_dict()["widths"] == {"4": 8, "8": 8, "16": 4}
    sizes = {2**i: 1 for i in range(2, 11)}
    assert GeneratorArchitecture(resolution=1024, widths=sizes).num_ws == 18
    for resolution, widths in ((16, {4: 8, 16: 4}), (24, {4: 8, 8: 8, 16: 4}), (4, {4: 8})):
        with pytest.raises(ValueError, match=r"expected one width for each of"):
            GeneratorArchitecture(resolution=resolution, widths=widths)


def test_weights_hash(tiny_generator):
    first = weights_hash(tiny_generator)
    assert len(first) == 64
    assert weights_hash(copy.deepcopy(tiny_generator)) == first
    tiny_generator.compute_dtype = torch.bfloat16
    assert weights_hash(tiny_generator) == first
    for name in ("convs.2.conv.weight", "latent_avg", "noises.noise_3", "style.1.bias"):
        changed = copy.deepcopy(tiny_generator)
        changed.state_dict()[name].view(-1)[0] += 1e-3
        assert weights_hash(changed) != first, name


def test_activations_of_a_chunked_batch_hold_every_sample(
    tiny_generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large layers run a few samples at a time: the activations must still be the batch's."""
    w_plus = torch.randn(5, tiny_generator.num_ws, tiny_generator.w_dim)
    whole = tiny_generator.activations(w_plus, tiny_generator.num_convs)
    image = tiny_generator.synthesis(w_plus)
    monkeypatch.setattr("models.stylegan2.generator.CHUNK_BYTES", 2 * 32 * 32 * 8 * 4)
    found = tiny_generator.activations(w_plus, tiny_generator.num_convs)
    assert len(found) == 5
    torch.testing.assert_close(found, whole)
    torch.testing.assert_close(tiny_generator.synthesis(w_plus), image)


def test_what_is_computed_of_a_frozen_kernel_is_kept_until_it_changes(tiny_generator, w_plus):
    """Once for each kernel, with the bits that they have anew; a kernel that changed is noticed."""
    net = copy.deepcopy(tiny_generator).requires_grad_(False)
    codes, layer = w_plus.float(), net.conv(2).conv
    residual = {k: r[0:1].expand(3) for k, r in _draw_residual(net, 1, 4, [0, 2, 3]).items()}
    residual = {k: r.to(dtype=torch.float32) for k, r in residual.items()}

    def render(network):
        with torch.inference_mode():
            return [network.synthesis(codes), network.synthesis(codes, residual=residual)]

    def assert_as_new():
        for kept, anew in zip(render(net), render(copy.deepcopy(net)), strict=True):
            assert torch.equal(kept, anew)

    plain, refined = render(net)
    made, shared = layer._kept, layer._kept._shared
    assert torch.equal(render(net)[1], refined)
    assert layer._kept is made
    assert layer._kept._shared is shared
    with torch.no_grad():
        layer.weight.mul_(torch.linspace(0.5, 2, layer.weight.shape[2])[:, None, None])
    assert not torch.equal(render(net)[0], plain)
    assert layer._kept is not made
    assert_as_new()
    residual[2].u[0].mul_(3.0)  # in place: the same tensor
    assert not torch.equal(render(net)[1], refined)
    assert_as_new()
    net.load_state_dict(tiny_generator.state_dict(), assign=True)
    net.requires_grad_(False)
    assert torch.equal(render(net)[0], plain)


def test_what_is_kept_is_of_the_layers_own_kernel_alone(tiny_generator, w_plus):
    """Not of kernels that learn or are called in; and a graph can be built on those that are."""
    net = copy.deepcopy(tiny_generator).requires_grad_(False)
    codes = w_plus.float()
    with torch.inference_mode():
        plain = net.synthesis(codes)
    other = {"convs.1.conv.weight": net.conv(2).conv.weight * torch.linspace(0.5, 2, 3)}
    called = torch.func.functional_call(net, other, (codes,))
    assert not torch.allclose(called, plain, atol=1e-3)
    assert torch.equal(net.synthesis(codes), plain)
    moving = codes.clone().requires_grad_()
    net.synthesis(moving).square().sum().backward()
    fresh = copy.deepcopy(tiny_generator).requires_grad_(False)
    again = codes.clone().requires_grad_()
    fresh.synthesis(again).square().sum().backward()
    assert torch.equal(moving.grad, again.grad)
    net.requires_grad_(True)
    net.conv(2).conv._kept = None
    net.synthesis(codes).sum().backward()
    assert net.conv(2).conv._kept is None


def test_synthesis_compiles_to_one_graph(tiny_generator, w_plus):
    net = copy.deepcopy(tiny_generator).requires_grad_(False)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's opinion of caches
        found = torch._dynamo.explain(net.synthesis)(w_plus.float())
    assert found.graph_count == 1, found.break_reasons
