"""rosinality/stylegan2-pytorch: the same weights and inputs give its outputs, in every form."""

import copy

import pytest
import torch

from models.checkpoints.load import load_discriminator, load_generator
from models.stylegan2.generator import Generator


@pytest.fixture(scope="module")
def generator(rosinality_64) -> Generator:
    return load_generator(rosinality_64.folder / "checkpoint.pt")


def test_latent_avg_is_the_file_s_own(generator, rosinality_64):
    assert torch.equal(generator.latent_avg, rosinality_64["in.latent_avg"])
    assert generator.provenance["latent_avg"] == "stored"


def test_mapping(generator, rosinality_64, assert_codes):
    z = rosinality_64["in.z"]
    for row in range(generator.num_ws):
        assert_codes(generator.mapping(z)[:, row], rosinality_64["out.w"])
    pulled = generator.mapping(z, truncation_psi=0.7)
    assert_codes(pulled[:, 0], rosinality_64["out.w_psi0.7"])
    assert torch.equal(pulled[:, 0], pulled[:, -1])


def test_mapping_in_float64(generator, rosinality_64):
    exact = copy.deepcopy(generator).double()
    w = exact.mapping(rosinality_64["in.z"].double())[:, 0]
    assert float((w - rosinality_64["out64.w"]).abs().max()) < 1e-12


def test_styles(generator, rosinality_64, assert_codes):
    styles = generator.styles(rosinality_64["in.wplus"])
    names = [name for name, _, _ in generator.layers()]
    known = rosinality_64.names("out.style.")
    assert sorted(names) == sorted(name.removeprefix("out.style.") for name in known)
    for name, style in zip(names, styles, strict=True):
        assert_codes(style, rosinality_64[f"out.style.{name}"])


def test_pictures_with_stored_noise(net, rosinality_64, assert_images):
    z, z2 = rosinality_64["in.z"], rosinality_64["in.z2"]
    assert_images(net.synthesis(net.mapping(z)), rosinality_64["out.img_z_bufnoise"])
    expected = rosinality_64["out.img_z_psi0.7_bufnoise"]
    assert_images(net.synthesis(net.mapping(z[:2], truncation_psi=0.7)), expected)
    mixed = torch.cat([net.mapping(z[:2])[:, :4], net.mapping(z2[:2])[:, 4:]], dim=1)
    assert_images(net.synthesis(mixed), rosinality_64["out.img_mix_inject4_bufnoise"])


def test_pictures_with_given_noise(net, rosinality_64, assert_images):
    w_plus, maps = rosinality_64["in.wplus"], rosinality_64.noise()
    assert_images(net.synthesis(w_plus, maps), rosinality_64["out.img_wplus_sharednoise"])
    batch = [torch.cat([n, n.flip(-1)]) for n in maps]
    assert_images(net.synthesis(w_plus, batch), rosinality_64["out.img_wplus_batchnoise"])
    expected = rosinality_64["out.img_wplus_zeronoise"]
    assert_images(net.synthesis(w_plus, [torch.zeros_like(n) for n in maps]), expected)
    assert_images(net.synthesis(w_plus, "none"), expected)


def test_picture_that_is_not_square(net, rosinality_64, assert_images):
    net = copy.deepcopy(net)
    net.input.input = torch.nn.Parameter(rosinality_64["in.const_nonsquare"], requires_grad=False)
    maps = [torch.cat([n, n[..., : n.shape[-1] // 2].flip(-1)], -1) for n in rosinality_64.noise()]
    image = net.synthesis(rosinality_64["in.wplus"], maps)
    assert image.shape == (2, 3, 64, 96)
    assert_images(image, rosinality_64["out.img_nonsquare"])


@pytest.mark.parametrize("is_frozen", [True, False], ids=["frozen", "learning"])
def test_gradients(net, rosinality_64, assert_gradient, is_frozen):
    net.requires_grad_(not is_frozen)
    w_plus = rosinality_64["in.wplus"].requires_grad_()
    maps = [n.requires_grad_() for n in rosinality_64.noise()]
    (net.synthesis(w_plus, maps) * rosinality_64["in.cotangent"]).sum().backward()
    assert_gradient(w_plus.grad, rosinality_64["out.grad_wplus"])
    for index, noise in enumerate(maps):
        assert_gradient(noise.grad, rosinality_64[f"out.grad_noise_{index}"])
    if is_frozen:
        assert net.convs[1].conv.weight.grad is None
        return
    for index in (1, 2):
        expected = rosinality_64[f"out.grad_weight_convs.{index}"]
        assert_gradient(net.convs[index].conv.weight.grad, expected)
    expected = rosinality_64["out.grad_modulation_weight_convs.1"]
    assert_gradient(net.convs[1].conv.modulation.weight.grad, expected)
    assert_gradient(net.input.input.grad, rosinality_64["out.grad_const"])
    net.zero_grad(set_to_none=True)


def test_float64_agrees_to_rounding(net, rosinality_64, assert_exact):
    exact = copy.deepcopy(net).double()
    w_plus = rosinality_64["in.wplus"].double().requires_grad_()
    image = exact.synthesis(w_plus, [n.double() for n in rosinality_64.noise()])
    # Not to 1e-15: rosinality scales W before it adds the epsilon of the demodulation.
    assert_exact(rosinality_64, image, w_plus, "img_wplus_sharednoise", "grad_wplus")


@pytest.mark.parametrize("name", ["checkpoint.pt", "train_checkpoint.pt"])
def test_discriminator(rosinality_64, assert_logits, name):
    d = load_discriminator(rosinality_64.folder / name)
    image = rosinality_64["out.img_z_bufnoise"]
    for n in (1, 2, 4):
        assert_logits(d(image[:n]), rosinality_64[f"out.d_logits{n}"])
    assert_logits(d(torch.cat([image, image.flip(3)])), rosinality_64["out.d_logits8"])
    exact = d.double()(image.double())
    assert float((exact - rosinality_64["out64.d_logits4"]).abs().max()) < 1e-4


def test_training_file_holds_the_same_networks(generator, rosinality_64, caplog):
    trained = load_generator(rosinality_64.folder / "train_checkpoint.pt")
    ours, theirs = generator.state_dict(), trained.state_dict()
    for name in ours.keys() - {"latent_avg"}:
        assert torch.equal(ours[name], theirs[name]), name
    assert trained.provenance["latent_avg"] == "estimated from 10000 samples, seed 0"
    assert "no latent_avg" in caplog.text
    # Two estimates of one mean: they differ by the sampling error only.
    z = torch.randn(4000, 64, generator=torch.Generator().manual_seed(5))
    w = trained.mapping(z)[:, 0]
    error = (trained.latent_avg - w.mean(0)).abs() / (w.std(0) / 4000**0.5)
    assert float(error.max()) < 6
