"""LSAP's style space against the reference outputs of its own program, and the metric's laws."""

from pathlib import Path

import numpy as np
import pytest
import torch

from models.checkpoints.load import load_generator
from models.losses.style_space import StyleSpace, style_layers
from models.stylegan2.generator import Generator


@pytest.fixture(scope="module")
def golden(shared: Path) -> dict[str, torch.Tensor]:
    arrays = np.load(shared / "golden" / "sncd" / "io.npz")
    return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


@pytest.fixture(scope="module")
def generator(shared: Path) -> Generator:
    return load_generator(str(shared / "golden" / "rosinality_64" / "checkpoint.pt"))


def space(generator: Generator, golden: dict[str, torch.Tensor], prefix: str) -> StyleSpace:
    """Anchors of the reference, put where `Generator.layers` has their layers."""
    anchors = [torch.zeros(layer.weight.shape[2]) for _, layer, _ in generator.layers()]
    for number, position in enumerate(style_layers(generator)):
        anchors[position] = golden[f"{prefix}_{number}"][0]
    return StyleSpace(generator, anchors)


def test_loss_and_similarity_are_the_reference_s(
    generator: Generator, golden: dict[str, torch.Tensor]
) -> None:
    found, latent = space(generator, golden, "out.anchor"), golden["in.latent"]
    similarity = found.similarity(latent)
    torch.testing.assert_close(similarity, golden["out.similarity"], atol=1e-6, rtol=0)
    torch.testing.assert_close(-similarity.mean(0), golden["out.per_dim"], atol=1e-6, rtol=0)
    torch.testing.assert_close(found.loss(latent).mean(), golden["out.loss"], atol=2e-6, rtol=0)
    torch.testing.assert_close(
        found.loss(latent, 4).mean(), golden["out.loss_progressive_stage3"], atol=1e-6, rtol=0
    )


def test_the_gradient_is_the_reference_s(
    generator: Generator, golden: dict[str, torch.Tensor]
) -> None:
    latent = golden["in.latent"].clone().requires_grad_()
    space(generator, golden, "out.anchor").loss(latent).mean().backward()
    torch.testing.assert_close(latent.grad, golden["out.grad_latent"], atol=1e-7, rtol=0)


def test_fixed_anchors(generator: Generator, golden: dict[str, torch.Tensor]) -> None:
    found = space(generator, golden, "in.fixed_anchor")
    similarity = found.similarity(golden["in.latent"])
    torch.testing.assert_close(similarity, golden["out.fixed_anchor_similarity"], atol=1e-6, rtol=0)


def test_anchors_from_the_reference_s_samples(
    generator: Generator, golden: dict[str, torch.Tensor]
) -> None:
    with torch.no_grad():
        w_plus = generator.mapping(golden["in.z_samples"])
        blank = [torch.zeros(layer.weight.shape[2]) for _, layer, _ in generator.layers()]
        styles = StyleSpace(generator, blank).normalised(w_plus)
    for number, style in enumerate(styles):
        want = golden[f"out.anchor_{number}"][0]
        torch.testing.assert_close(style.mean(0), want, atol=1e-6, rtol=0)


def test_one_layer_for_each_row(tiny_generator: Generator) -> None:
    names = [tiny_generator.layers()[i][0] for i in style_layers(tiny_generator)]
    assert len(names) == tiny_generator.num_ws
    assert names[0] == "conv1"
    assert [n for n in names if "rgb" in n] == [f"to_rgbs.{len(tiny_generator.to_rgbs) - 1}"]


def test_nscd_ignores_the_scale_of_a_style(
    generator: Generator, golden: dict[str, torch.Tensor]
) -> None:
    found, latent = space(generator, golden, "out.anchor"), golden["in.latent"]
    before = found.nscd(latent)
    for affine in found.affines:
        affine.weight.data.mul_(3.0)
        affine.bias.data.mul_(3.0)
    try:
        torch.testing.assert_close(found.nscd(latent), before, atol=1e-6, rtol=0)
    finally:
        for affine in found.affines:
            affine.weight.data.div_(3.0)
            affine.bias.data.div_(3.0)


def test_nscd_is_zero_at_the_anchors_and_two_opposite(tiny_generator: Generator) -> None:
    w_plus = torch.randn(1, tiny_generator.num_ws, tiny_generator.w_dim)
    styles = [style[0].detach() for style in tiny_generator.styles(w_plus)]
    # A multiple of the style: neither its own length nor the anchor's counts.
    same = StyleSpace(tiny_generator, [0.3 * style for style in styles])
    torch.testing.assert_close(same.nscd(w_plus), torch.zeros(1), atol=1e-6, rtol=0)
    opposite = StyleSpace(tiny_generator, [-style for style in styles])
    torch.testing.assert_close(opposite.nscd(w_plus), torch.full((1,), 2.0), atol=1e-6, rtol=0)


def test_mapped_codes_are_nearer_than_codes_of_the_same_spread_from_nowhere(
    generator: Generator, golden: dict[str, torch.Tensor]
) -> None:
    found = space(generator, golden, "out.anchor")
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        mapped = generator.mapping(torch.randn(64, generator.z_dim, generator=draw))
        spread = mapped[:, 0].std()
        rows = torch.randn(64, generator.num_ws, generator.w_dim, generator=draw) * spread
        assert found.nscd(mapped).mean() < 0.8 * found.nscd(rows).mean()
