"""The benchmark's rows, what it keeps between runs, and its files; the jobs themselves are stood in
for by random tokens."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from models.adaptation.domain import Domain, save_domain
from models.adaptation.token_sets import TokenSets
from models.checkpoints.native import save_generator
from models.errors import ConfigError
from models.stylegan2.generator import weights_hash
from tasks.adapt.config import AdaptConfig
from tasks.adapt.job import AdaptProgress
from tasks.benchmark import domains as module
from tasks.benchmark.adaptation import make_source
from tasks.benchmark.domains import benchmark_adaptation, rows_of
from tests.conftest import make_picture, make_tiny_generator


def test_rows() -> None:
    rows = rows_of(["fantasy", "impasto"])
    assert [row.name for row in rows] == [
        "fantasy, 10 pictures",
        "fantasy, text",
        "fantasy, 1 picture",
        "impasto, 10 pictures",
        "impasto, text",
        "impasto, 1 picture",
        "impasto, 10 pictures, style offsets",
        "impasto, 10 pictures, rank 1",
        "impasto, 10 pictures, rank 16",
        "impasto, 10 pictures, all weights",
    ]
    assert [row.references for row in rows] == [10, 0, 1, 10, 0, 1, 10, 10, 10, 10]
    assert rows_of(["clay"])[-1].style == "clay"
    assert rows_of(["clay"])[1].domain["target_text"] == "clay of a face"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    save_generator(make_tiny_generator(), tmp_path / "tiny.safetensors", {"terms": "test"})
    rows = []
    for seed in range(40):
        data = io.BytesIO()
        make_picture(seed, 32).save(data, "PNG")
        rows.append({"id": f"p{seed:02}", "image": data.getvalue(), "style": "ink"})
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "portraits.parquet")
    return tmp_path


def test_a_run_and_the_run_after_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[AdaptConfig] = []

    def fake_adapt(
        config: AdaptConfig, on_progress: Callable[[AdaptProgress], None] | None = None
    ) -> list[Path]:
        jobs.append(config)
        generator = make_tiny_generator()
        folders = []
        for domain in config.domain:
            if domain.references:
                assert (Path(domain.references).name, domain.style) == ("portraits.parquet", "ink")
                assert domain.reference_limit == (1 if domain.guidance == "image" else 10)
            card: dict[str, Any] = {"domain": {"style": domain.style}, "guidance": domain.guidance}
            card |= {"seconds": 1.5, "status": "finished", "steps": config.steps}
            card |= {"best_step": 2, "settings": {"rank": config.rank}, "form": config.form}
            stream = torch.Generator().manual_seed(config.rank)
            tokens = TokenSets.fresh(generator, (), "shared", config.rank, [stream], 0.2)
            made = Domain.of_tokens(domain.name, weights_hash(generator), tokens, card)
            folders.append(save_domain(made, Path(config.out) / domain.name))
        for step in range(config.steps if on_progress else 0):
            on_progress(  # type: ignore[misc]
                AdaptProgress(step=step, steps=config.steps, scores={}, notes={})
            )
        return folders

    monkeypatch.setattr(module, "adapt", fake_adapt)
    monkeypatch.setattr(module, "make_source", lambda g, eyes: make_source(g, eyes, 12))
    monkeypatch.setattr(module, "BATCHES", (2, 3))
    settings: dict[str, Any] = {
        "portraits": str(place / "portraits.parquet"),
        "generator_name": str(place / "tiny.safetensors"),
        "steps": 3,
    }
    page = benchmark_adaptation(str(place / "out"), **settings)
    names = sorted(p.name for p in page.parent.iterdir())
    assert names == ["adaptation.json", "adaptation.md", "adaptation.png", "domains", "timing.json"]
    result = json.loads((page.parent / "adaptation.json").read_text())
    assert list(result["rows"]) == [row.name for row in rows_of(["ink"])]
    assert result["rows"]["ink, 10 pictures, rank 16"]["rank"] == 16
    assert result["training_portraits"]["ink"]["frechet_trunk"] < 1
    assert [t["codes"] for t in result["timing"]["steps"]] == [[6, 6], [8, 2]]
    assert set(result["timing"]["rendering"]) == {"2", "3"}
    with Image.open(page.parent / "adaptation.png") as grid:
        assert grid.size == (10 * 32, 4 * 32)
    assert "ink, 10 pictures, all weights" in page.read_text()
    count = len(jobs)
    assert count == 7 + 4  # rows and timings
    scores = page.parent / "domains" / "ink-10-pictures" / "scores.json"
    kept = json.loads(scores.read_text())
    scores.write_text(json.dumps({**kept, "content_trunk": 0.123}))
    benchmark_adaptation(str(place / "out"), **settings)
    assert len(jobs) == count + 7  # a finished job returns at once; no timing again
    result = json.loads((page.parent / "adaptation.json").read_text())
    assert result["rows"]["ink, 10 pictures"]["content_trunk"] == 0.123


def test_no_steps_score_the_bundled_domains_alone(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = make_tiny_generator()
    tokens = TokenSets.fresh(
        generator, (), "shared", 1, [torch.Generator().manual_seed(0)], q_std=0.2
    )
    card = {"domain": {"style": "ink"}, "guidance": "images", "form": "tokens"}
    card |= {"seconds": 2.0, "status": "finished", "steps": 7}
    made = Domain.of_tokens("drawn", weights_hash(generator), tokens, card)
    folder = save_domain(made, place / "bundled" / "drawn")
    monkeypatch.setattr(module, "known_domains", lambda *_: {"drawn": folder})
    monkeypatch.setattr(module, "make_source", lambda g, eyes: make_source(g, eyes, 12))
    page = benchmark_adaptation(
        str(place / "out"),
        portraits=str(place / "portraits.parquet"),
        generator_name=str(place / "tiny.safetensors"),
        steps=0,
    )
    result = json.loads((page.parent / "adaptation.json").read_text())
    assert result["rows"] == {}
    assert set(result["shipped"]) == {"drawn"}
    assert 0 <= result["shipped"]["drawn"]["colour_share"] <= 1
    assert result["shipped"]["drawn"]["frechet_trunk"] > 0
    assert "drawn, bundled: colour share | at most 0.35" in page.read_text()
    with Image.open(page.parent / "adaptation.png") as grid:
        assert grid.size == (10 * 32, 2 * 32)


def test_an_unknown_style(place: Path) -> None:
    with pytest.raises(ConfigError, match=r"styles: \['oil'\] are not in .*it has \['ink'\]"):
        benchmark_adaptation(
            str(place / "out"),
            portraits=str(place / "portraits.parquet"),
            generator_name=str(place / "tiny.safetensors"),
            styles=["oil"],
        )
