"""Training the attribute scorer: targets, drawing, scores, exact resume, learning."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy.stats import mannwhitneyu, pearsonr

from models.attributes import AttributeScorer, load_attributes
from models.checkpoints.bundled import asset_path
from models.errors import AssetError, ConfigError
from models.losses.trunk import load_trunk
from tasks.training.assets.attributes import (
    AttributesObjective,
    FitAttributesConfig,
    age_distribution,
    area_under_curve,
    attribute_scores,
    correlation,
    fit,
)
from tasks.training.assets.labels import load_labelled
from tests.conftest import as_png
from tests.tasks.training.conftest import first_losses

# ---------------------------------------------------------------------- parts


def test_age_distributions() -> None:
    centres = torch.arange(10, 101, 5).float()
    found = age_distribution(torch.tensor([30.0, 47.0, 100.0]), centres, 4.0)
    torch.testing.assert_close(found.sum(1), torch.ones(3))
    torch.testing.assert_close(found[:2] @ centres, torch.tensor([30.0, 47.0]), atol=0.02, rtol=0)
    assert found.argmax(1).tolist() == [4, 7, 18]
    distance = (centres - 47) / 4
    want = torch.exp(-0.5 * distance.square())
    torch.testing.assert_close(found[1], want / want.sum())


def test_area_and_correlations_equal_their_twins() -> None:
    rng = torch.Generator().manual_seed(0)
    a = torch.randn(40, generator=rng).round(decimals=1)
    b = (a + torch.randn(40, generator=rng)).round(decimals=1)
    is_positive = b > 0.3
    above = mannwhitneyu(a[is_positive].numpy(), a[~is_positive].numpy()).statistic
    want = float(above) / float(is_positive.sum() * (~is_positive).sum())
    assert area_under_curve(a, is_positive) == pytest.approx(want, abs=1e-9)
    want = float(pearsonr(a.numpy(), b.numpy()).statistic)
    assert correlation(a, b) == pytest.approx(want, abs=1e-6)


# ---------------------------------------------------------------------- runs


def picture(is_light: bool, is_striped: bool, seed: int) -> bytes:
    """Light or dark, striped or plain, and some grain."""
    rng = np.random.default_rng(seed)
    pixels = np.full((32, 32, 3), 185.0 if is_light else 70.0) + rng.normal(0, 8, (32, 32, 3))
    if is_striped:
        pixels[::4] += 60
        pixels[1::4] += 60
    return as_png(pixels)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Stripes say the gender, lightness the smile; ages are noise."""
    folder = tmp_path_factory.mktemp("faces")
    for name, first in (("train", 0), ("val", 100)):
        rows = [(index, index % 2 == 1, index // 2 % 2 == 1) for index in range(first, first + 32)]
        columns = {
            "image": [picture(light, striped, index) for index, striped, light in rows],
            "age": [25 + 40 * (index % 3 == 0) for index, _, _ in rows],
            "gender": [int(striped) for _, striped, _ in rows],
            "smile_prob": [0.9 if light else 0.2 for _, _, light in rows],
        }
        pq.write_table(pa.table(columns), folder / f"{name}.parquet")
    return str(folder / "train.parquet"), str(folder / "val.parquet")


def config(files: tuple[str, str], out: Path, **settings: Any) -> FitAttributesConfig:
    values: dict[str, Any] = {"data": (files[0],), "validation": (files[1],), "out": str(out)}
    values |= {"images": 48, "batch": 8, "resolution": 32, "hidden": 8}
    values |= {"log_images": 16, "checkpoint_images": 16}
    return FitAttributesConfig(**{**values, **settings})


def test_an_interrupted_run_ends_with_the_same_bytes(
    files: tuple[str, str], tmp_path: Path
) -> None:
    path = fit(config(files, tmp_path / "straight"))
    late = config(files, tmp_path / "again", time_limit_s=0.0)
    assert fit(late) == tmp_path / "again/checkpoint.pt"
    found = [fit(late) for _ in range(6)][-1]
    assert found.read_bytes() == path.read_bytes()


def test_it_learns_what_the_labels_say(files: tuple[str, str], tmp_path: Path) -> None:
    path = fit(config(files, tmp_path, images=1200, batch=12, hidden=32, terms="tests only"))
    card = json.loads(path.with_suffix(".json").read_text())
    assert card["scores"]["gender_accuracy"] > 0.9
    assert card["scores"]["smile_auc"] > 0.9
    scorer = load_attributes(str(path))
    assert card["hash"] == scorer.hash
    assert card["terms"] == "tests only"
    assert card["provenance"]["images_shown"] == 1200
    assert card["provenance"]["settings"]["start_from"] == "bundled"
    assert str(tmp_path) not in json.dumps(card)
    held_out = load_labelled([files[1]], 32)
    again = attribute_scores(scorer.network, held_out, "cpu")
    assert again["smile_auc"] == pytest.approx(card["scores"]["smile_auc"], abs=1e-4)
    # The pseudo-label's values are learned, not its threshold.
    chances = scorer(held_out.pictures.float() / 127.5 - 1)["smile"]
    is_smiling = held_out.labels["smile"] > 0.5
    assert 0.6 < float(chances[is_smiling].mean()) < 0.97
    assert 0.08 < float(chances[~is_smiling].mean()) < 0.4


def test_it_starts_from_the_trunk(files: tuple[str, str], tmp_path: Path) -> None:
    objective = AttributesObjective(config(files, tmp_path))
    trunk, _ = load_trunk(asset_path("trunk", "trunk.safetensors"))
    for name, value in trunk.state_dict().items():
        assert torch.equal(objective.network.trunk.state_dict()[name], value), name
    torch.manual_seed(0)
    fresh = AttributesObjective(config(files, tmp_path, start_from=None))
    assert AttributeScorer(fresh.network).hash != AttributeScorer(objective.network).hash
    with pytest.raises(AssetError, match="is missing"):
        AttributesObjective(config(files, tmp_path, start_from=str(tmp_path / "no.safetensors")))


def test_pictures_without_labels_are_refused(
    files: tuple[str, str], tmp_path: Path, face_bytes: list[bytes]
) -> None:
    bare = str(tmp_path / "bare.parquet")
    pq.write_table(pa.table({"image": face_bytes[:2], "age": [20, 30]}), bare)
    with pytest.raises(AssetError, match="pictures without gender, smile; expected the columns"):
        AttributesObjective(config((bare, files[1]), tmp_path))
    with pytest.raises(ConfigError, match=r"dropout must be in 0\.\.1, got 2"):
        config(files, tmp_path, dropout=2)
    with pytest.raises(ConfigError, match="age_spread must be > 0, got 0"):
        config(files, tmp_path, age_spread=0)


def test_the_shipped_scorer_on_held_out_faces(shared: Path) -> None:
    """The numbers of its card, on the same pictures."""
    path = asset_path("faces64", "attributes.safetensors")
    faces = load_labelled([str(shared / "data/faces/val64-000.parquet")], 64)
    scores = attribute_scores(load_attributes().network, faces, "cpu")
    card = json.loads(path.with_suffix(".json").read_text())
    for name, value in scores.items():
        assert value == pytest.approx(card["scores"][name], abs=2e-3), name
    assert scores["age_mae"] < 0.75 * scores["age_mae_of_the_mean"]
    assert scores["gender_accuracy"] > 0.85
    assert scores["smile_auc"] > 0.9


def test_half_precision_is_close_to_full(files: tuple[str, str], tmp_path: Path) -> None:
    def make(precision: str) -> AttributesObjective:
        return AttributesObjective(config(files, tmp_path, precision=precision))

    full, half = first_losses(make, "age")
    assert half == pytest.approx(full, rel=0.03)
    assert half != full
