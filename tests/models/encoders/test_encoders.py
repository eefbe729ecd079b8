"""IR-SE trunk, e4e and pSp encoders, latent discriminator: shapes, key names, official layouts."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from models.encoders.checkpoint import build_encoder
from models.encoders.e4e import Encoder4Editing
from models.encoders.irse import IrSe, StridedProjection
from models.encoders.latent_discriminator import CodePool, LatentDiscriminator
from models.encoders.psp import EncoderArchitecture, GradualStyleEncoder

TINY = {"w_dim": 16, "width": 4, "units": (1, 1, 1, 1), "head_width": 8}


def tiny(num_ws: int = 10, **settings: Any) -> EncoderArchitecture:
    return EncoderArchitecture(num_ws=num_ws, **{**TINY, "input_size": 64, **settings})


@pytest.fixture(scope="module")
def manifest(shared: Path) -> dict[str, Any]:
    with gzip.open(shared / "golden" / "encoders" / "manifest.json.gz") as file:
        return json.load(file)


def layout(module: torch.nn.Module) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in module.state_dict().items()}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("e4e_Encoder4Editing_1024", "e4e"),
        ("e4e_GradualStyleEncoder_1024", "psp"),
        ("psp_GradualStyleEncoder_18", "psp"),
    ],
)
def test_default_architecture_has_the_official_names_and_shapes(
    manifest: dict[str, Any], name: str, kind: Any
) -> None:
    with torch.device("meta"):
        encoder = build_encoder(EncoderArchitecture(num_ws=18, kind=kind))
    expected = {key: shape for key, (shape, _) in manifest["recipe"][name]["keys"].items()}
    assert layout(encoder) == expected


@pytest.mark.parametrize("resolution", [256, 512, 1024])
@pytest.mark.parametrize("kind", ["e4e", "psp"])
def test_rows_follow_the_generator(manifest: dict[str, Any], resolution: int, kind: Any) -> None:
    state = manifest["layouts"][f"{kind}_{resolution}"]["state_dict"]
    expected = {k.removeprefix("encoder."): s for k, s in state.items() if k.startswith("encoder.")}
    with torch.device("meta"):
        num_ws = 2 * resolution.bit_length() - 4
        assert layout(build_encoder(EncoderArchitecture(num_ws=num_ws, kind=kind))) == expected


def test_trunk_and_latent_discriminator_have_the_official_names(manifest: dict[str, Any]) -> None:
    with torch.device("meta"):
        trunk, discriminator = layout(IrSe()), layout(LatentDiscriminator(512))
    arcface = manifest["recipe"]["arcface_ir_se50_112"]["keys"]
    assert trunk == {k: s for k, (s, _) in arcface.items() if not k.startswith("output_layer")}
    official = manifest["recipe"]["e4e_latent_discriminator"]["keys"]
    assert discriminator == {key: shape for key, (shape, _) in official.items()}


@pytest.mark.parametrize("stem_stride", [1, 2])
def test_stages_halve_the_size_and_double_the_channels(stem_stride: int) -> None:
    trunk = IrSe(4, (1, 2, 1, 1), stem_stride=stem_stride).eval()
    stages = trunk.stages(torch.zeros(2, 3, 64, 64))
    assert [tuple(x.shape[1:]) for x in stages] == [
        (4, 32, 32),
        (8, 16, 16),
        (16, 8, 8),
        (32, 4, 4),
    ]


@pytest.mark.parametrize(("num_ws", "split"), [(8, (3, 4, 1)), (10, (3, 4, 3)), (18, (3, 4, 11))])
def test_heads_split_by_row(num_ws: int, split: tuple[int, int, int]) -> None:
    with torch.device("meta"):
        encoder = GradualStyleEncoder(tiny(num_ws, kind="psp", input_size=256))
    convs = [sum(isinstance(m, torch.nn.Conv2d) for m in head.convs) for head in encoder.styles]
    assert tuple(convs.count(n) for n in (4, 5, 6)) == split


def test_e4e_adds_open_offsets_to_w() -> None:
    torch.manual_seed(0)
    encoder = Encoder4Editing(tiny()).eval()
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        full = encoder(images)
        w, deltas = encoder.split(images)
        assert full.shape == (3, 10, 16)
        assert deltas.shape == (3, 9, 16)
        torch.testing.assert_close(full[:, 0], w)
        torch.testing.assert_close(full[:, 1:], w[:, None] + deltas)
        assert deltas.norm(dim=2).min() > 1e-3
        encoder.stage = 4
        partial = encoder(images)
        torch.testing.assert_close(partial[:, :5], full[:, :5])
        torch.testing.assert_close(partial[:, 5:], full[:, :1].expand(-1, 5, -1))
        encoder.stage = 0
        torch.testing.assert_close(encoder(images), full[:, :1].expand(-1, 10, -1))


def test_psp_and_e4e_share_weights_but_not_meaning() -> None:
    torch.manual_seed(0)
    e4e, psp = Encoder4Editing(tiny()).eval(), GradualStyleEncoder(tiny(kind="psp")).eval()
    psp.load_state_dict(e4e.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        rows = psp(images)
        torch.testing.assert_close(e4e(images)[:, 1:], rows[:, :1] + rows[:, 1:])


def test_pictures_are_resized_as_pillow_does() -> None:
    encoder = GradualStyleEncoder(tiny(kind="psp"))
    for size in (96, 160, 32):
        plane = np.random.default_rng(size).standard_normal((size, size)).astype(np.float32)
        want = np.asarray(Image.fromarray(plane).resize((64, 64), Image.Resampling.BILINEAR))
        got = encoder.resized(torch.from_numpy(plane).expand(1, 3, -1, -1))
        np.testing.assert_allclose(got[0, 1].numpy(), want, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"input_size": 48}, "power of two >= 32, found 48"),
        ({"units": (1, 2, 3)}, "four counts >= 1"),
        ({"kind": "restyle"}, "found 'restyle'"),
        ({"stem_stride": 3}, "expected 1 or 2, found 3"),
        ({"width": 0}, "width: expected >= 1, found 0"),
    ],
)
def test_wrong_sizes_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**settings)


def test_pool_swaps_about_half_and_resumes_exactly() -> None:
    torch.manual_seed(0)
    pool = CodePool(50)
    first = torch.arange(50.0)[:, None].repeat(1, 4)
    assert torch.equal(pool.query(first), first)  # an empty pool only fills
    swapped = 0
    for step in range(50):
        fresh = 1000 + torch.arange(16.0)[:, None].repeat(1, 4) + 16 * step
        out = pool.query(fresh)
        changed = (out != fresh).any(1)
        swapped += int(changed.sum())
        assert (out[changed] < fresh.min()).all()  # what comes instead is older
    assert 300 < swapped < 500  # of 800
    again = CodePool(50)
    again.load_state_dict(pool.state_dict())
    query = torch.randn(16, 4)
    torch.manual_seed(1)
    expected = pool.query(query)
    torch.manual_seed(1)
    assert torch.equal(again.query(query), expected)
    assert torch.equal(CodePool(0).query(query), query)


@pytest.mark.parametrize("stride", [1, 2])
def test_the_projection_has_the_strided_convolution_s_gradients(stride: int) -> None:
    """4 channels: fewer than a register, where oneDNN's strided 1x1 kernel writes out of bounds."""
    projection = StridedProjection(4, 8, 1, stride, bias=False)
    x = torch.randn(6, 4, 8, 8).contiguous(memory_format=torch.channels_last).requires_grad_()
    found = torch.autograd.grad(projection(x).square().sum(), (x, projection.weight))
    y, weight = x.detach().double().requires_grad_(), projection.weight.detach().double()
    weight.requires_grad_()
    picked = y[:, :, ::stride, ::stride]
    want = torch.einsum("oi,nihw->nohw", weight[:, :, 0, 0], picked)
    for a, b in zip(found, torch.autograd.grad(want.square().sum(), (y, weight)), strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-4, rtol=1e-4)
