"""What the adaptation benchmark measures: on pictures whose answer is known."""

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from models.adaptation.domain import Domain
from models.adaptation.token_sets import TokenSets
from models.errors import ConfigError
from models.losses.identity import Identity
from models.losses.trunk import PerceptualTrunk
from models.stylegan2.generator import Generator, weights_hash
from tasks.adapt.portraits import read_portraits
from tasks.benchmark.adaptation import (
    Eye,
    colour_map_share,
    compare_pairs,
    frechet_ratios,
    make_source,
    mean_identity,
    render,
    rendering_ratio,
    score_pictures,
)
from tasks.benchmark.adaptation_page import curve_table, domain_table, goal_table, markdown
from tasks.training.assets.labels import is_held_out
from tests.conftest import make_picture


@pytest.fixture(scope="module")
def eye() -> Eye:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Eye(PerceptualTrunk().eval().requires_grad_(False))


def stored(tmp_path: Path, count: int = 30) -> Path:
    rows = []
    for seed in range(count):
        data = io.BytesIO()
        make_picture(seed, 48).save(data, "PNG")
        style = "ink" if seed % 2 else "oil"
        rows.append({"id": f"p{seed:02}", "image": data.getvalue(), "style": style})
    path = tmp_path / "portraits.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_the_split_is_by_the_hash_of_the_identifier(tmp_path: Path) -> None:
    assert [i for i in range(20) if is_held_out(f"impasto_{i:03}")] == [4, 9, 16, 19]
    found = read_portraits(str(stored(tmp_path)), 32)
    assert set(found) == {"ink", "oil"}
    for style in found.values():
        assert style.held_out.shape[1:] == (3, 32, 32)
        assert not any(is_held_out(identifier) for identifier in style.training)
        assert list(style.training) == sorted(style.training)
    held_out = sum(len(s.held_out) for s in found.values())
    assert held_out + sum(len(s.training) for s in found.values()) == 30
    assert held_out == sum(is_held_out(f"p{i:02}") for i in range(30))


def test_portraits_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a Parquet file with columns id, image, style"):
        read_portraits(str(tmp_path / "none.parquet"), 32)
    with pytest.raises(ConfigError, match="fewer than 2 held out"):
        read_portraits(str(stored(tmp_path, 2)), 32)


def test_pairs_by_hand() -> None:
    before = torch.tensor([[1.0, 0.8, 0.6], [0.8, 1.0, 0.2], [0.6, 0.2, 1.0]])
    after = 1 - 0.5 * (1 - before)  # all distances halved
    correlation, diversity = compare_pairs(before, after)
    assert correlation == pytest.approx(1.0, abs=1e-6)
    assert diversity == pytest.approx(0.5)
    turned = before.clone()
    turned[0, 1], turned[0, 2], turned[1, 2] = 0.2, 0.6, 0.8
    assert compare_pairs(before, turned)[0] < 0


def test_similarities_are_distances(eye: Eye) -> None:
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = eye.similarities(images)
    taps = eye.taps(images)
    expected = sum(float((t[0] - t[1]).square().sum(0).mean()) for t in taps) / len(taps)
    assert float(1 - found[0, 1]) == pytest.approx(expected / 2, rel=1e-3)
    assert torch.allclose(found.diagonal(), torch.ones(3), atol=1e-3)


def test_scores_of_the_source_itself_and_of_the_portraits(
    tiny_generator: Generator, eye: Eye
) -> None:
    source = make_source(tiny_generator, [eye], 12)
    held_out = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(1)) - 1
    darker = 0.5 * source.images - 0.2
    regrade = score_pictures(darker, source, held_out, [eye])
    assert regrade["colour_share"] == pytest.approx(1.0, abs=1e-4)
    same = score_pictures(source.images + 1e-5, source, held_out, [eye])
    assert same == pytest.approx(
        {"frechet_trunk": 1.0, "content_trunk": 1.0, "diversity_trunk": 1.0, "colour_share": 1.0},
        abs=1e-4,
    )
    assert "frechet_trunk" not in score_pictures(source.images, source, None, [eye])
    ceiling = frechet_ratios(held_out, source, held_out, [eye])
    assert ceiling == pytest.approx({"frechet_trunk": 0.0}, abs=1e-6)
    one = source.images[:1].expand(12, -1, -1, -1)
    with_noise = one + 0.01 * torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    assert score_pictures(with_noise, source, held_out, [eye])["diversity_trunk"] < 0.2


def test_a_regrade_is_told_from_lines() -> None:
    rng = torch.Generator().manual_seed(0)
    before = torch.rand(4, 3, 32, 32, generator=rng) * 1.6 - 0.8
    r, g, b = before.unbind(1)
    regrade = torch.stack([0.2 + r * g, 0.5 * b - 0.3 * r.square(), 0.1 - g], 1)
    assert colour_map_share(before, regrade) == pytest.approx(1.0, abs=1e-6)
    lines = before.clone()
    lines[:, :, ::4] -= 0.5
    share = colour_map_share(before, lines)
    # A quarter of the rows 0.5 darker: the best constant explains 1/4 of the squares.
    assert share == pytest.approx(0.25, abs=0.01)
    # Both: what is a regrade of (before + lines) is the regrade's part alone.
    assert share < colour_map_share(before, regrade + lines - before) < 1


def test_identity_is_a_mean_over_persons() -> None:
    class Sums(torch.nn.Module):
        def forward(self, faces: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.normalize(faces.mean((2, 3)), dim=1)

    before = torch.zeros(40, 3, 8, 8)
    before[:, 0] = 1.0
    after = before.clone()
    after[:10] = torch.tensor([0.0, 1.0, 0.0])[:, None, None]
    network = Identity(Sums(), lambda images: images)
    assert mean_identity(before, after, network) == pytest.approx(0.75)


def test_rendering(tiny_generator: Generator, eye: Eye) -> None:
    source = make_source(tiny_generator, [eye], 5)
    tokens = TokenSets.fresh(
        tiny_generator, (), "shared", 2, [torch.Generator().manual_seed(0)], q_std=0.3
    )
    domain = Domain.of_tokens("a", weights_hash(tiny_generator), tokens, {})
    assert torch.equal(render(tiny_generator, source.w_plus, None), source.images)
    adapted = render(tiny_generator, source.w_plus, domain)
    assert float((adapted - source.images).abs().mean()) > 0.01
    assert float(adapted.abs().max()) <= 1
    assert rendering_ratio(tiny_generator, domain, 2, repeats=3) > 0


def result() -> dict:
    row = {
        "frechet_trunk": 0.5,
        "content_trunk": 0.7,
        "diversity_trunk": 0.9,
        "seconds": 61.2,
        "bytes": 69_336,
        "status": "finished",
        "form": "tokens",
        "rank": 4,
    }
    return {
        "title": "Domain adaptation",
        "command": "refinery benchmark adaptation x",
        "machine": {"chip": "c"},
        "generator": "g",
        "data": "p.parquet",
        "held_out": {"impasto": 22},
        "codes": 64,
        "steps": 100,
        "eyes": ["trunk"],
        "rows": {
            "impasto, 10 pictures": row,
            "impasto, text": {**row, "status": "diverged", "frechet_trunk": 0.8},
            "impasto, 10 pictures, all weights": {**row, "form": "weights", "bytes": 900_000},
        },
        "shipped": {
            "ink": {**row, "colour_share": 0.25, "identity": 0.55, "frechet_squeezenet": 0.6}
        },
        "training_portraits": {"impasto": {"frechet_trunk": 0.03}},
        "timing": {
            "steps": [{"codes": [6, 6], "seconds": [0.2, 0.5]}],
            "rendering": {"16": 0.93},
        },
    }


def test_the_page() -> None:
    table = domain_table(result()["rows"], result()["training_portraits"])
    assert table[0].startswith("| domain | Frechet, trunk ↓ | content, trunk ↑ | diversity, trunk")
    assert table[2] == "| impasto, 10 pictures | 0.50 | 0.70 | 0.90 | 61 | 69 |"
    assert table[3].startswith("| impasto, text (diverged) | 0.80 |")
    assert table[5] == "| impasto: training portraits | 0.03 |  |  |  |  |"
    goals = "\n".join(goal_table(result()))
    assert "frechet, trunk | at most 0.6 | 0.50 | met |" in goals
    assert "content, trunk | at least 0.8 | 0.70 | **not met** |" in goals
    assert "largest tokens | at most 300 kB | 69 kB | met |" in goals
    assert "4 domains of 6 codes over one of 6 | at most 1.6 | 2.50 | **not met** |" in goals
    assert "plain, batch 16 | at least 0.9 | 0.93 | met |" in goals
    assert "ink, bundled: colour share | at most 0.35 | 0.25 | met |" in goals
    assert "ink, bundled: frechet squeezenet | at most 0.6 | 0.60 | met |" in goals
    assert "ink, bundled: identity | at least 0.6 | 0.55 | **not met** |" in goals
    curve = curve_table(result())
    assert [line.split(" |")[0] for line in curve[2:]] == [
        "| impasto, 10 pictures",
        "| impasto, 10 pictures, all weights",
    ]
    edited = {**result(), "edits": {"rows": {"age": {"monotone": 0.875}}}}
    assert (
        "| edit age: pictures with a monotone response over -3..3 | at least 90 % | 87.5 % |"
        in (goal_table(edited)[-1])
    )
    page = markdown(result())
    assert "`refinery benchmark adaptation x`" in page
    assert "(impasto 22)" in page
    assert "## Edits" not in page
    alone = markdown({**result(), "rows": {}, "timing": {}})
    assert "## Bundled domains" in alone
    assert "ink, bundled: identity" in alone
    assert "## Size against quality" not in alone
