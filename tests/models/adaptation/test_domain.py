"""Domains: their files, finding them, and what adding them to inversions renders."""

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.adaptation.domain import (
    Domain,
    add_domains,
    find_domain,
    known_domains,
    load_domain,
    save_domain,
)
from models.adaptation.token_sets import TokenSets
from models.checkpoints.bundled import asset_path
from models.checkpoints.load import load_generator
from models.errors import AssetError, ConfigError
from models.inversion.base import Inversion
from models.losses.trunk import load_trunk
from models.stylegan2.generator import Generator, weights_hash
from models.stylegan2.residual import LowRank
from models.stylegan2.weight_delta import WeightDelta
from tasks.benchmark.adaptation import Eye, make_source, render, score_pictures


def make_domain(
    generator: Generator, seed: int = 0, rank: int = 2, layers=(), factorization="shared"
) -> Domain:
    stream = torch.Generator().manual_seed(seed)
    tokens = TokenSets.fresh(generator, layers, factorization, rank, [stream], 0.3)
    tokens = tokens.map(lambda t: t + 0.1 * torch.randn(t.shape, generator=stream))
    return Domain.of_tokens(f"style{seed}", weights_hash(generator), tokens, {"seed": seed})


def make_weights(generator: Generator, seed: int = 0) -> Domain:
    rng = torch.Generator().manual_seed(seed)
    own = dict(generator.named_parameters())
    names = ("conv1.conv.weight", "convs.1.conv.weight", "to_rgbs.0.bias")
    weights = {
        k: WeightDelta.quantised(0.3 * torch.randn(1, *own[k].shape, generator=rng)) for k in names
    }
    return Domain(name=f"tuned{seed}", generator_hash=weights_hash(generator), weights=weights)


def codes(generator: Generator, n: int = 3) -> Inversion:
    z = torch.randn(n, generator.z_dim, generator=torch.Generator().manual_seed(5))
    return Inversion(w_plus=generator.mapping(z))


def materialised(
    generator: Generator, inversion: Inversion, mixes: list[list[tuple[Domain, float]]]
) -> torch.Tensor:
    """The slow twin in float64: every row's kernels are built and added, one row at a time.

    A full-rank factorisation carries the sum: u = identity, v = the kernel.
    """
    twin, form = generator.double(), generator.form
    twin.form = "grouped"
    pictures = []
    for row, mix in enumerate(mixes):
        kernels: dict[int, torch.Tensor] = {}
        own = {k: r[row : row + 1] for k, r in (inversion.residual or {}).items()}
        for residual, g in [(own, 1.0), *((d.residual or {}, g) for d, g in mix)]:
            for layer, part in residual.items():
                kernel = g * part.to(dtype=torch.float64).kernel()
                kernels[layer] = kernels[layer] + kernel if layer in kernels else kernel
        whole = {
            layer: LowRank(u=torch.eye(kernel.shape[1], dtype=torch.float64)[None], v=kernel)
            for layer, kernel in kernels.items()
        }
        w_plus = inversion.w_plus[row : row + 1].double()
        pictures.append(twin.synthesis(w_plus, "const", None, whole))
    twin.form = form
    return torch.cat(pictures)


def in_double(inversion: Inversion) -> Inversion:
    residual = inversion.residual and {
        k: r.to(dtype=torch.float64) for k, r in inversion.residual.items()
    }
    return replace(inversion, w_plus=inversion.w_plus.double(), residual=residual)


def image_residual(generator: Generator, n: int = 3) -> dict[int, LowRank]:
    rng = torch.Generator().manual_seed(9)
    o, i = generator.conv(2).conv.weight.shape[1:3]
    return {
        2: LowRank(
            u=0.3 * torch.randn(n, o, 3, generator=rng),
            v=0.3 * torch.randn(n, 3, i, 3, 3, generator=rng),
        )
    }


# ---------------------------------------------------------------------- adding


def test_rows_carry_different_domains_at_different_strengths_and_ranks(
    tiny_generator: Generator,
) -> None:
    a, b = make_domain(tiny_generator, 0, 1), make_domain(tiny_generator, 1, 3, layers=(1, 2))
    c = make_domain(tiny_generator, 2, 1, (4,), "per_tap")
    mixes = [[(a, 1.0)], [], [(a, 0.5), (b, -0.7), (c, 1.3)]]
    start = replace(codes(tiny_generator), residual=image_residual(tiny_generator))
    expected = materialised(tiny_generator, start, mixes)
    found = add_domains(in_double(start), mixes).render(tiny_generator)
    assert float((found - expected).abs().max()) < 1e-9
    plain = in_double(start).render(tiny_generator)
    assert float((found[1] - plain[1]).abs().max()) < 1e-12
    assert float((found[0] - plain[0]).abs().mean()) > 0.01
    assert float((found[2] - plain[2]).abs().mean()) > 0.01


@pytest.mark.parametrize("with_own", [False, True])
def test_one_mix_for_all_rows(tiny_generator: Generator, with_own: bool) -> None:
    a, b = make_domain(tiny_generator, 0, 4), make_domain(tiny_generator, 1, 2, layers=(0, 3))
    start = codes(tiny_generator)
    if with_own:
        start = replace(start, residual=image_residual(tiny_generator))
    mix = [(a, 0.8), (b, 0.4)]
    expected = materialised(tiny_generator, start, [mix] * 3)
    once = add_domains(in_double(start), [mix])
    assert once.residual is not None
    assert once.residual[0].is_shared
    assert float((once.render(tiny_generator) - expected).abs().max()) < 1e-9
    each = add_domains(in_double(start), [list(mix) for _ in range(3)])
    assert torch.equal(each.render(tiny_generator), once.render(tiny_generator))
    # It behaves as N rows do: slices, joins, names.
    part = torch.cat([once[:1].render(tiny_generator), once[1:].render(tiny_generator)])
    assert float((part - expected).abs().max()) < 1e-9
    joined = Inversion.cat([once[:2], once[2:]])
    assert float((joined.render(tiny_generator) - expected).abs().max()) < 1e-9
    assert len(once.tensors()["residual_0_u"]) == 3


def test_strength_0_is_the_plain_picture_bit_for_bit(tiny_generator: Generator) -> None:
    a, weights = make_domain(tiny_generator), make_weights(tiny_generator)
    for start in (
        codes(tiny_generator),
        replace(codes(tiny_generator), residual=image_residual(tiny_generator)),
    ):
        plain = start.render(tiny_generator)
        for mixes in ([[(a, 0.0)]], [[]], [[(a, 0.0)], [(weights, 0.0)], []]):
            assert torch.equal(add_domains(start, mixes).render(tiny_generator), plain)
        beside = add_domains(start, [[(a, 0.0)], [(a, 1.0)], [(a, 0.0)]]).render(tiny_generator)
        assert not torch.allclose(beside[1], plain[1], atol=0.01)
        if start.residual is None:  # what padding adds is exactly nothing
            assert torch.equal(beside[::2], plain[::2])
        else:  # but it moves the order of the sums of the image's own factors
            assert torch.allclose(beside[::2], plain[::2], atol=1e-5)


def test_morphing_is_a_sum(tiny_generator: Generator) -> None:
    a, b = make_domain(tiny_generator, 0), make_domain(tiny_generator, 1)
    found = add_domains(codes(tiny_generator), [[(a, 0.25), (b, 0.75)]]).residual
    assert found is not None
    assert a.residual is not None
    assert b.residual is not None
    for layer in a.residual:
        expected = 0.25 * a.residual[layer].kernel() + 0.75 * b.residual[layer].kernel()
        assert torch.allclose(found[layer].kernel(), expected.expand(3, -1, -1, -1, -1), atol=1e-6)


def test_a_number_of_mixes_that_fits_no_row(tiny_generator: Generator) -> None:
    a = make_domain(tiny_generator)
    with pytest.raises(ValueError, match="one for each of 3 rows: 2"):
        add_domains(codes(tiny_generator), [[(a, 1.0)], []])


def test_domains_of_weights(tiny_generator: Generator) -> None:
    a, b, c = make_weights(tiny_generator), make_weights(tiny_generator, 1), make_domain(
        tiny_generator
    )  # fmt: skip
    start = codes(tiny_generator)
    plain = start.render(tiny_generator)
    found = add_domains(start, [[(a, 0.5)], [], [(b, 1.0), (c, 1.0)]]).render(tiny_generator)
    own = dict(tiny_generator.named_parameters())
    assert a.weights is not None
    moved = {k: own[k] + 0.5 * d.value()[0] for k, d in a.weights.items()}
    expected = torch.func.functional_call(tiny_generator, moved, (start.w_plus[:1],))
    assert torch.allclose(found[:1], expected, atol=1e-6)
    assert torch.allclose(found[1], plain[1], atol=1e-6)
    assert float((found[2] - plain[2]).abs().mean()) > 0.01
    both = add_domains(start, [[(a, 0.5), (b, 0.25)]]).weights
    assert both is not None
    assert b.weights is not None
    for name, delta in both.items():
        exact = 0.5 * a.weights[name].value() + 0.25 * b.weights[name].value()
        assert float((delta.value()[0] - exact[0]).abs().max()) <= float(delta.step.max()) * 0.51
    with pytest.raises(ConfigError, match=r"tuned0 replace the generator's weights"):
        add_domains(replace(start, weights=both), [[(a, 1.0)]])


# ---------------------------------------------------------------------- files


@pytest.mark.parametrize("factorization", ["shared", "per_tap", "conv_lora"])
def test_round_trip(tiny_generator: Generator, tmp_path: Path, factorization: str) -> None:
    domain = make_domain(tiny_generator, factorization=factorization)
    folder = save_domain(domain, tmp_path / "style0")
    assert sorted(p.name for p in folder.iterdir()) == ["card.json", "tokens.safetensors"]
    back = load_domain(folder)
    assert (back.name, back.generator_hash) == (domain.name, domain.generator_hash)
    assert back.card["seed"] == 0
    assert back.residual is not None
    assert domain.residual is not None
    for layer, part in domain.residual.items():
        assert torch.equal(back.residual[layer].u, part.u)
        assert torch.equal(back.residual[layer].v, part.v)
    again = save_domain(back, tmp_path / "again")
    for name in ("card.json", "tokens.safetensors"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_a_bare_residual_is_stored_as_shared_tokens(
    tiny_generator: Generator, tmp_path: Path
) -> None:
    residual = {k: r[:1] for k, r in image_residual(tiny_generator).items()}
    domain = Domain(name="a", generator_hash="ab" * 32, residual=residual)
    back = load_domain(save_domain(domain, tmp_path / "a"))
    assert back.residual is not None
    assert torch.equal(back.residual[2].u, residual[2].u.half().float())
    assert torch.equal(back.residual[2].v, residual[2].v.half().float())


def test_round_trip_of_weights(tiny_generator: Generator, tmp_path: Path) -> None:
    domain = make_weights(tiny_generator)
    back = load_domain(save_domain(domain, tmp_path / "w"))
    assert back.residual is None
    assert back.weights is not None
    assert domain.weights is not None
    for name, delta in domain.weights.items():
        assert torch.equal(back.weights[name].value(), delta.value())


@pytest.mark.parametrize("fault", ["no card", "no tokens", "not JSON", "format", "sha256", "nan"])
def test_a_damaged_folder_is_an_asset_error(
    tiny_generator: Generator, tmp_path: Path, fault: str
) -> None:
    domain = make_domain(tiny_generator)
    if fault == "nan":
        assert domain.tokens is not None
        domain = replace(domain, tokens=domain.tokens.map(lambda t: t * math.nan))
    folder = save_domain(domain, tmp_path / "style")
    card = json.loads((folder / "card.json").read_text())
    if fault == "no card":
        (folder / "card.json").unlink()
    elif fault == "no tokens":
        (folder / "tokens.safetensors").unlink()
    elif fault == "not JSON":
        (folder / "card.json").write_text("[")
    elif fault == "format":
        (folder / "card.json").write_text(json.dumps({**card, "format": "other"}))
    elif fault == "sha256":
        data = bytearray((folder / "tokens.safetensors").read_bytes())
        data[-1] ^= 1
        (folder / "tokens.safetensors").write_bytes(data)
    with pytest.raises(AssetError, match=r"style: cannot read .*refinery adapt"):
        load_domain(folder)


def test_find_by_name_and_by_folder(tiny_generator: Generator, tmp_path: Path) -> None:
    folders = (tmp_path / "mine", tmp_path / "ours")
    save_domain(make_domain(tiny_generator, 0), folders[0] / "sepia")
    save_domain(make_domain(tiny_generator, 1), folders[1] / "sepia")
    save_domain(make_domain(tiny_generator, 2), folders[1] / "ink")
    assert known_domains(tiny_generator, folders) == {
        "sepia": folders[0] / "sepia",
        "ink": folders[1] / "ink",
    }
    assert find_domain("sepia", tiny_generator, folders).name == "style0"
    assert find_domain("ink", tiny_generator, folders).name == "style2"
    assert find_domain(str(folders[1] / "sepia"), tiny_generator, folders).name == "style1"
    with pytest.raises(ConfigError, match=r"'sepa': not known; did you mean 'sepia'.*ink, sepia"):
        find_domain("sepa", tiny_generator, folders)
    with pytest.raises(ConfigError, match=r"'': not known"):
        find_domain("", tiny_generator, folders)


def test_another_generator_is_refused(tiny_generator: Generator, tmp_path: Path) -> None:
    domain = replace(make_domain(tiny_generator), generator_hash="ab" * 32)
    save_domain(domain, tmp_path / "sepia")
    with pytest.raises(AssetError, match=r"made for generator abababababab\.\.\., this one"):
        find_domain("sepia", tiny_generator, (tmp_path,))


@pytest.mark.parametrize("parts", [{}, {"residual": {}, "weights": {}}])
def test_a_domain_is_one_thing(parts: Mapping) -> None:
    with pytest.raises(ValueError, match="either a residual or weights"):
        Domain(name="a", generator_hash="", **parts)


SHIPPED = ("impasto", "fantasy", "illustration", "cartoon", "pencil")


def test_faces64_ships_styles() -> None:
    generator = load_generator("faces64")
    known = known_domains(generator, ())
    assert set(known) == set(SHIPPED)
    eye = Eye(load_trunk(asset_path("trunk", "trunk.safetensors"))[0])
    source = make_source(generator, [eye], 32)
    pictures = {}
    for name in SHIPPED:
        domain = find_domain(name, generator, ())
        assert (known[name] / "tokens.safetensors").stat().st_size <= 300_000
        assert (known[name] / "preview.png").is_file()
        assert "research use only" in domain.card["terms"]
        pictures[name] = render(generator, source.w_plus, domain)
        scores = score_pictures(pictures[name], source, None, [eye])
        assert scores["content_trunk"] >= 0.8
        assert scores["diversity_trunk"] >= 0.7
        assert float((pictures[name] - source.images).square().mean()) > 0.02
        if name not in ("impasto", "pencil"):  # paper is white: a colour map of its own
            assert scores["colour_share"] <= 0.37  # 0.35 on more codes, see the benchmark
    for a, b in itertools.combinations(SHIPPED, 2):
        assert float((pictures[a] - pictures[b]).abs().mean()) > 0.03
    # Lines on paper: nearly grey, and far brighter than the photographs.
    pencil = pictures["pencil"]
    assert float((pencil.amax(1) - pencil.amin(1)).mean()) < 0.25
    assert float(pencil.mean()) > float(source.images.mean()) + 0.3


def test_one_mix_keeps_its_tensors_from_batch_to_batch(tiny_generator: Generator) -> None:
    """What layers compute of them is then kept too; the pictures are those of a new mix."""
    a, b = make_domain(tiny_generator), make_domain(tiny_generator, seed=1)
    with torch.inference_mode():
        first = add_domains(codes(tiny_generator, 3), [[(a, 0.5), (b, 1.0)]])
    second = add_domains(codes(tiny_generator, 2), [[(a, 0.5), (b, 1.0)]])
    other = add_domains(codes(tiny_generator, 2), [[(a, 0.5), (b, 0.9)]])
    assert first.residual is not None
    assert second.residual is not None
    assert other.residual is not None
    for layer, part in first.residual.items():
        assert part.u.data_ptr() == second.residual[layer].u.data_ptr()
        assert part.u.data_ptr() != other.residual[layer].u.data_ptr()
        assert not part.u.is_inference()
    again = [replace(domain) for domain in (a, b)]
    mixed = add_domains(codes(tiny_generator, 2), [[(again[0], 0.5), (again[1], 1.0)]])
    assert torch.equal(second.render(tiny_generator), mixed.render(tiny_generator))
