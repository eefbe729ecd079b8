"""CLCAE's network: attention with one key is a linear map, official layout, sizes, first values."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from models.encoders.clcae import (
    Attention,
    ClcaeArchitecture,
    ClcaeEncoder,
    CrossBlock,
    FoldedAttention,
    OneKeyAttention,
    load_clcae,
)
from models.encoders.contrastive import (
    ContrastiveArchitecture,
    ContrastiveTowers,
    TokenLayer,
    info_nce,
)
from models.encoders.psp import EncoderArchitecture, GradualStyleEncoder
from models.errors import AssetError

SMALL: dict[str, Any] = {
    "num_ws": 8,
    "w_dim": 16,
    "input_size": 32,
    "width": 4,
    "units": (1, 1, 1, 1),
    "head_width": 8,
    "hidden": 8,
    "feature_hidden": 8,
    "feature_width": 8,
    "feature_channels": 6,
    "attention": "folded",
    "form": "residual",
}


def small(**settings: Any) -> ClcaeEncoder:
    torch.manual_seed(0)
    return ClcaeEncoder(ClcaeArchitecture(**{**SMALL, **settings})).eval()


def randomised(module: nn.Module) -> nn.Module:
    """In float64, every parameter random: nothing starts at zero."""
    torch.manual_seed(1)
    for parameter in module.double().parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


# ---------------------------------------------------------------------- one key


def test_attention_to_one_key_is_the_linear_map_of_its_value() -> None:
    """torch's own multi-head attention with the same parameters, in float64."""
    ours = randomised(OneKeyAttention(32))
    reference = nn.MultiheadAttention(32, 4, batch_first=True).double()
    reference.load_state_dict(ours.state_dict())
    query, key = torch.randn(3, 5, 32).double(), torch.randn(3, 1, 32).double()
    want = reference(query, key, key)[0]
    torch.testing.assert_close(ours(query, key).expand(3, 5, 32), want, atol=1e-9, rtol=0)


def test_folding_multiplies_the_two_matrices_out() -> None:
    one = randomised(OneKeyAttention(32))
    folded = FoldedAttention(32, 32).double()
    with torch.no_grad():
        value = one.in_proj_weight[-32:], one.in_proj_bias[-32:]
        folded.out_proj.weight.copy_(one.out_proj.weight @ value[0])
        folded.out_proj.bias.copy_(one.out_proj(value[1]))
    query, key = torch.randn(3, 5, 32).double(), torch.randn(3, 1, 32).double()
    torch.testing.assert_close(folded(query, key), one(query, key), atol=1e-9, rtol=0)


def test_attention_to_several_keys_is_real() -> None:
    """What is attended to depends on the query, and equals the softmax written out."""
    attention = randomised(Attention(8, 12, 2))
    query, keys = torch.randn(2, 3, 8).double(), torch.randn(2, 5, 12).double()
    found = attention(query, keys)
    assert float((found[:, 0] - found[:, 1]).abs().detach().min()) > 1e-6
    q_bias, k_bias, v_bias = attention.in_proj_bias.chunk(3)
    q = (query @ attention.q_proj_weight.T + q_bias).unflatten(2, (2, 4))
    k = (keys @ attention.k_proj_weight.T + k_bias).unflatten(2, (2, 4))
    v = (keys @ attention.v_proj_weight.T + v_bias).unflatten(2, (2, 4))
    weights = (torch.einsum("nthe,nkhe->nhtk", q, k) / 2).softmax(3)
    heads = torch.einsum("nhtk,nkhe->nthe", weights, v).flatten(2)
    torch.testing.assert_close(found, attention.out_proj(heads), atol=1e-9, rtol=0)


def test_block_of_the_released_form_in_float64() -> None:
    """LN(x + FFN(x)) of x = LN(query + attention), with norm2 and norm3; norm1 never acts."""
    arch = ClcaeArchitecture(num_ws=8, w_dim=32, width=4, hidden=16)
    block = randomised(CrossBlock(arch, 32, 16))
    attention = nn.MultiheadAttention(32, 4, batch_first=True).double()
    attention.load_state_dict(block.multihead_attn.state_dict())
    query, key = torch.randn(3, 5, 32).double(), torch.randn(3, 1, 32).double()
    x = block.norm2(query + attention(query, key, key)[0])
    want = block.norm3(x + block.linear2(block.linear1(x).clamp(min=0)))
    found = block(query, key)
    torch.testing.assert_close(found, want, atol=1e-9, rtol=0)
    nn.init.normal_(block.norm1.weight)
    assert torch.equal(block(query, key), found)


# ---------------------------------------------------------------------- the whole network


def pictures(size: int = 32) -> torch.Tensor:
    return torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(2)) * 2 - 1


def test_rows_start_as_e4es() -> None:
    """Residual form: w+_0 = b, w+_i = b + delta_i."""
    encoder, average = small(is_centred=False), torch.zeros(3, 32, 32)
    base, rows, _ = encoder(pictures(), average)
    maps = encoder.pyramid(pictures(), 8)
    torch.testing.assert_close(rows[:, 0], base)
    for index, head in enumerate(encoder.styles_others):
        torch.testing.assert_close(rows[:, index + 1], base + head(maps[index + 1]))


def test_rows_of_the_norm_form_start_in_w() -> None:
    base, rows, _ = small(form="norm")(pictures(), torch.zeros(3, 32, 32))
    torch.testing.assert_close(rows, base[:, None].expand(-1, 8, -1))


def test_the_average_picture_is_taken_off() -> None:
    encoder, average = small(), torch.full((3, 32, 32), 0.25)
    plain = small(is_centred=False)
    results = zip(encoder(pictures(), average), plain(pictures() - 0.25, average), strict=True)
    for found, want in results:
        torch.testing.assert_close(found, want)


def test_a_shift_enters_before_the_blocks() -> None:
    """b moves by it, and f with it."""
    encoder = small(attention="all")
    randomised(encoder).float()
    average, shift = torch.zeros(3, 32, 32), torch.randn(2, 16)
    plain = encoder(pictures(), average)
    moved = encoder(pictures(), average, shift)
    torch.testing.assert_close(moved[0], plain[0] + shift)
    for before, after in zip(plain, moved, strict=True):
        assert float((after - before).abs().detach().max()) > 1e-3


@pytest.mark.parametrize("size", [32, 64, 128, 256])
def test_the_map_has_the_generators_size(size: int) -> None:
    found = small(input_size=size)(pictures(size), torch.zeros(3, size, size))[2]
    assert found.shape == (2, 6, 16, 16)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention": "two"}, 'expected "one", "folded" or "all"'),
        ({"form": "sum"}, 'expected "norm" or "residual"'),
        ({"attention": "one"}, "w_dim = 8 x width, found 16 and 32"),
        ({"num_ws": 4}, "expected more than 5"),
        ({"input_size": 512}, "expected at most 256, found 512"),
    ],
)
def test_sizes_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClcaeArchitecture(**{**SMALL, **settings})


# ---------------------------------------------------------------------- official files


@pytest.fixture(scope="module")
def manifest(shared: Path) -> dict[str, Any]:
    with gzip.open(shared / "golden" / "encoders" / "manifest.json.gz") as file:
        return json.load(file)


def official_state(manifest: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Tensors of the official names and shapes that take no memory."""
    shapes = manifest["layouts"]["clcae_1024"]["state_dict"]
    return {
        name: torch.tensor(0 if name.endswith("tracked") else 0.5 + index / 1000).expand(shape)
        for index, (name, shape) in enumerate(shapes.items())
    }


def test_official_checkpoint_loads_strictly(manifest: dict[str, Any], tmp_path: Path) -> None:
    state = official_state(manifest)
    torch.save({"state_dict": state}, tmp_path / "clcae.pt")
    encoder, sha256, card = load_clcae(tmp_path / "clcae.pt", 18, 512)
    found = encoder.state_dict()
    recipe = manifest["recipe"]["clcae_GradualStyleEncoder_1024"]["keys"]
    assert {k: list(v.shape) for k, v in found.items()} == {k: s for k, (s, _) in recipe.items()}
    for name in ("cross_attention.17.norm3.bias", "styles_others.16.convs.10.weight"):
        assert torch.equal(found[name], state[f"encoder.{name}"])
    assert (len(sha256), card) == (64, {})


def test_a_wrong_official_checkpoint_says_what_differs(
    manifest: dict[str, Any], tmp_path: Path
) -> None:
    state = official_state(manifest)
    del state["encoder.feature_cross_attention.norm1.bias"]
    state["encoder.styles.1.linear.weight"] = torch.zeros(())
    path = tmp_path / "other.pt"
    torch.save({"state_dict": state}, path)
    expected = (
        r"other\.pt: not an official CLCAE for a generator with 18 rows of 512: 1 missing "
        r"\(feature_cross_attention\.norm1\.bias \[512\]\); 1 unexpected \(styles\.1\.linear"
    )
    with pytest.raises(AssetError, match=expected):
        load_clcae(path, 18, 512)
    with pytest.raises(AssetError, match=r"its codes have 512 values"):
        load_clcae(path, 18, 128)


def test_official_image_tower_has_the_layout_of_an_encoder_with_one_row(
    manifest: dict[str, Any],
) -> None:
    recipe = manifest["recipe"]["clcae_image_encoder"]["keys"]
    with torch.device("meta"):
        tower = GradualStyleEncoder(EncoderArchitecture(num_ws=1, kind="psp"))
    found = {k: list(v.shape) for k, v in tower.state_dict().items()}
    assert found == {k: shape for k, (shape, _) in recipe.items()}


# ---------------------------------------------------------------------- the towers


def test_a_transformer_layer_on_one_token_in_float64() -> None:
    """torch's layer with random queries and keys gives the same: they never act."""
    reference = randomised(nn.TransformerEncoderLayer(16, 4, 24, 0.0, batch_first=True)).train()
    layer = TokenLayer(16, 24).double()
    attention = reference.self_attn
    with torch.no_grad():
        layer.attention.weight.copy_(attention.out_proj.weight @ attention.in_proj_weight[-16:])
        layer.attention.bias.copy_(attention.out_proj(attention.in_proj_bias[-16:]))
    for name in ("linear1", "linear2", "norm1", "norm2"):
        getattr(layer, name).load_state_dict(getattr(reference, name).state_dict())
    x = torch.randn(5, 16).double()
    torch.testing.assert_close(layer(x), reference(x[:, None])[:, 0], atol=1e-9, rtol=0)


def test_embeddings_have_norm_one_and_the_temperature_starts_as_published() -> None:
    towers = ContrastiveTowers(
        ContrastiveArchitecture(
            w_dim=16, input_size=32, width=4, units=(1, 1, 1, 1), head_width=8, hidden=8
        )
    )
    images = towers.embed_pictures(pictures(), torch.zeros(3, 32, 32))
    codes = towers.embed_codes(torch.randn(2, 16))
    for found in (images, codes):
        torch.testing.assert_close(found.norm(dim=1), torch.ones(2))
    assert float(towers.scale.detach()) == pytest.approx(1 / 0.07)


def test_info_nce_of_orthogonal_pairs() -> None:
    """n orthogonal pairs at scale s: log(1 + (n - 1) exp(-s)), and one more term a negative."""
    pairs, s = torch.eye(5)[:3], 2.0
    want = torch.full((3,), torch.log1p(2 * torch.exp(torch.tensor(-s))))
    torch.testing.assert_close(info_nce(pairs, pairs, s), want)
    more = torch.eye(5)[3:]
    want = torch.full((3,), torch.log1p(4 * torch.exp(torch.tensor(-s))))
    torch.testing.assert_close(info_nce(pairs, pairs, s, more, more), want)


def test_info_nce_weighs_its_two_sides() -> None:
    images = nn.functional.normalize(torch.randn(4, 6), dim=1)
    codes = nn.functional.normalize(torch.randn(4, 6), dim=1)
    logits = 3.0 * images @ codes.T
    of_pictures, of_codes = -logits.log_softmax(1).diag(), -logits.log_softmax(0).diag()
    for balance in (0.0, 0.5, 1.0):
        want = balance * of_pictures + (1 - balance) * of_codes
        torch.testing.assert_close(info_nce(images, codes, 3.0, balance=balance), want)
