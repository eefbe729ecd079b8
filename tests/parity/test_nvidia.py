"""NVlabs/stylegan2-ada-pytorch: the pickle is read as data, and gives NVIDIA's outputs."""

import copy

import pytest
import torch

from models.checkpoints.load import load_discriminator, load_generator
from models.stylegan2.generator import Generator


@pytest.fixture(scope="module")
def generator(nv_ada_64) -> Generator:
    return load_generator(nv_ada_64.folder / "network.pkl")


def test_pickle_equals_its_rosinality_form(generator, nv_ada_64):
    other = load_generator(nv_ada_64.folder / "as_rosinality.pt")
    assert generator.architecture == other.architecture
    ours, theirs = generator.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
    d, e = (load_discriminator(nv_ada_64.folder / n) for n in ("network.pkl", "as_rosinality.pt"))
    assert d.state_dict().keys() == e.state_dict().keys()
    for name, value in d.state_dict().items():
        assert torch.equal(value, e.state_dict()[name]), name


def test_mapping_and_truncation(generator, nv_ada_64, assert_codes):
    z = nv_ada_64["in.z"]
    assert_codes(generator.mapping(z)[:, 0], nv_ada_64["out.w"])
    assert_codes(generator.mapping(z[:2], truncation_psi=0.7), nv_ada_64["out.ws_psi0.7"])
    cut = generator.mapping(z[:2], truncation_psi=0.5, truncation_cutoff=4)
    assert_codes(cut, nv_ada_64["out.ws_psi0.5_cut4"])
    assert torch.equal(cut[:, 4:], generator.mapping(z[:2])[:, 4:])


def test_affines(generator, nv_ada_64, assert_codes):
    order = ["b4.conv1", "b4.torgb"]
    for res in (8, 16, 32, 64):
        order += [f"b{res}.conv0", f"b{res}.conv1", f"b{res}.torgb"]
    known = nv_ada_64.names("out.affine.")
    assert sorted(order) == sorted(name.removeprefix("out.affine.") for name in known)
    for name, style in zip(order, generator.styles(nv_ada_64["in.ws"]), strict=True):
        assert_codes(style, nv_ada_64[f"out.affine.{name}"])


def test_pictures(net, nv_ada_64, assert_images):
    z, ws = nv_ada_64["in.z"], nv_ada_64["in.ws"]
    assert_images(net.synthesis(net.mapping(z)), nv_ada_64["out.img_z_const"])
    pulled = net.mapping(z[:1], truncation_psi=0.7)
    assert_images(net.synthesis(pulled), nv_ada_64["out.img_z_psi0.7_const"])
    assert_images(net.synthesis(ws, "const"), nv_ada_64["out.img_ws_const"])
    assert_images(net.synthesis(ws, "const"), nv_ada_64["out.img_ws_const_unfused"])
    assert_images(net.synthesis(ws, "none"), nv_ada_64["out.img_ws_none"])


def test_gradient_of_the_codes(net, nv_ada_64, assert_gradient):
    ws = nv_ada_64["in.ws"].requires_grad_()
    (net.synthesis(ws, "const") * nv_ada_64["in.cotangent"]).sum().backward()
    assert_gradient(ws.grad, nv_ada_64["out.grad_ws"])


def test_float64_agrees_to_rounding(net, nv_ada_64, assert_exact):
    exact = copy.deepcopy(net).double()
    ws = nv_ada_64["in.ws"].double().requires_grad_()
    image = exact.synthesis(ws, "const")
    assert_exact(nv_ada_64, image, ws, "img_ws_const", "grad_ws")


@pytest.mark.parametrize("name", ["network.pkl", "as_rosinality.pt"])
def test_discriminator(nv_ada_64, assert_logits, name):
    d = load_discriminator(nv_ada_64.folder / name)
    image = nv_ada_64["out.img_z_const"]
    for n in (2, 4):
        assert_logits(d(image[:n]), nv_ada_64[f"out.d_logits{n}"])
    assert_logits(d(torch.cat([image, image.flip(3)])), nv_ada_64["out.d_logits8"])
