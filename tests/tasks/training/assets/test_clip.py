"""Training a CLIP: the loss, the drawing, exact resume, what is written, what is scored."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F

from models.encoders.contrastive import info_nce
from models.errors import AssetError, ConfigError
from models.losses.clip import load_clip
from tasks.training.assets.captions import Subject, vocabulary
from tasks.training.assets.clip import (
    ClipObjective,
    FitClipConfig,
    balanced_rows,
    caption_nce,
    fit,
    refiltered,
    same,
)
from tasks.training.assets.clip_files import build_tokenizer
from tasks.training.assets.clip_scores import (
    age_group,
    balanced_accuracy,
    clip_scores,
    medium_directions,
    medium_prompts,
)
from tasks.training.assets.labels import MEDIA, LabelledPictures, is_held_out
from tests.conftest import as_png, make_picture
from tests.tasks.training.conftest import first_losses

# ---------------------------------------------------------------------- the loss


def unit_rows(rows: int, seed: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, 6, generator=rng), dim=1)


def test_without_equal_captions_the_loss_is_info_nce() -> None:
    pictures, captions = unit_rows(5, 0), unit_rows(5, 1)
    found = caption_nce(pictures, captions, 7.0, torch.eye(5).bool())
    torch.testing.assert_close(found, info_nce(pictures, captions, 7.0))


def test_equal_captions_share_the_answer() -> None:
    """Slow twin: the cross-entropies by loops."""
    pictures, captions = unit_rows(4, 0), unit_rows(4, 1)
    groups = [0, 1, 0, 0]
    is_same = torch.tensor([[a == b for b in groups] for a in groups])
    found = caption_nce(pictures, captions, 5.0, is_same)
    for row in range(4):
        total = 0.0
        for queries, keys in ((pictures, captions), (captions, pictures)):
            cosines = [5.0 * float(queries[row] @ keys[other]) for other in range(4)]
            norm = torch.tensor(cosines).logsumexp(0)
            own = [cosines[other] for other in range(4) if groups[other] == groups[row]]
            total += sum(float(norm) - value for value in own) / len(own) / 2
        assert float(found[row]) == pytest.approx(total, abs=1e-5)


def test_captions_are_the_same_by_words_or_by_meaning() -> None:
    subjects = [
        Subject(medium="impasto"),
        Subject(medium="fantasy"),
        Subject(medium="impasto"),
        Subject(age=24),
        Subject(age=29),
    ]
    captions = ["a painting", "a painting", "an impasto painting", "a young face", "a face"]
    want = torch.eye(5).bool()
    for a, b in ((0, 1), (0, 2), (3, 4)):
        want[a, b] = want[b, a] = True
    assert torch.equal(same(subjects, captions), want)


def test_portraits_are_drawn_evenly() -> None:
    medium = torch.tensor([0] * 500 + [1] * 3 + [2] * 40 + [3] * 7)
    torch.manual_seed(0)
    even = torch.ones(len(medium))
    found = medium[balanced_rows(medium, even, 6000, 0.3)].bincount() / 6000
    torch.testing.assert_close(found, torch.tensor([0.7, 0.1, 0.1, 0.1]), atol=0.02, rtol=0)
    only = balanced_rows(torch.tensor([2, 2]), torch.ones(2), 50, 0.3)
    assert only.unique().tolist() == [0, 1]
    chances = torch.tensor([0.5, 0.0, 0.1])
    assert set(balanced_rows(torch.zeros(3).long(), chances, 50, 1.0).tolist()) == {0, 2}


# ---------------------------------------------------------------------- runs


def encoded(seed: int, stripes: str = "") -> bytes:
    """A smooth picture, with stripes one way or the other."""
    import numpy as np

    pixels = np.asarray(make_picture(seed, 32)).astype(float) * 0.4 + 70
    wave = 60 * np.sign(np.sin(np.arange(32) * np.pi / 2 + 0.1))
    if stripes:
        pixels += (wave[:, None] if stripes == "across" else wave[None])[..., None]
    return as_png(pixels)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Faces with labels, and portraits whose style is a texture."""
    folder = tmp_path_factory.mktemp("data")
    faces = {
        "id": [f"face-{index}" for index in range(24)],
        "image": [encoded(index) for index in range(24)],
        "age": [20 + 3 * index for index in range(24)],
        "gender": [index % 2 for index in range(24)],
        "smile_prob": [(index % 5) / 4 for index in range(24)],
    }
    pq.write_table(pa.table(faces), folder / "faces.parquet")
    names = [f"{kind}_{index:03d}" for kind in ("impasto", "fantasy") for index in range(24)]
    ways = {"impasto": "across", "fantasy": "along"}
    portraits = {
        "id": names,
        "image": [encoded(100 + i, ways[name[:-4]]) for i, name in enumerate(names)],
        "style": [name[:-4] for name in names],
    }
    pq.write_table(pa.table(portraits), folder / "portraits.parquet")
    return str(folder / "faces.parquet"), str(folder / "portraits.parquet")


def config(files: tuple[str, str], out: Path, **settings: Any) -> FitClipConfig:
    values: dict[str, Any] = {"data": files, "out": str(out), "images": 96, "batch": 16}
    values |= {"resolution": 32, "width": 16, "layers": 1, "text_layers": 1, "heads": 2}
    values |= {"embedding": 8, "log_images": 32, "checkpoint_images": 32}
    return FitClipConfig(**{**values, **settings})


def test_an_interrupted_run_ends_with_the_same_bytes(
    files: tuple[str, str], tmp_path: Path
) -> None:
    folder = fit(config(files, tmp_path / "straight", images=48))
    assert folder == tmp_path / "straight/clip"
    late = config(files, tmp_path / "again", images=48, time_limit_s=0.0)
    assert fit(late) == tmp_path / "again/checkpoint.pt"
    found = [fit(late) for _ in range(3)][-1]
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (found / name).read_bytes() == (folder / name).read_bytes(), name


def test_the_folder_is_a_clip_and_its_card_describes_it(
    files: tuple[str, str], tmp_path: Path
) -> None:
    folder = fit(config(files, tmp_path, validation=(files[0],), terms="tests only"))
    clip = load_clip(str(folder))
    card = json.loads((folder / "clip.json").read_text())
    assert card["hash"] == clip.hash
    weights = (folder / "model.safetensors").read_bytes()
    assert card["sha256"] == hashlib.sha256(weights).hexdigest()
    assert card["parameters"] == sum(p.numel() for p in clip.model.parameters())
    assert len(weights) < 2.2 * card["parameters"] + 20_000
    assert card["provenance"]["images_shown"] == 96
    assert card["provenance"]["settings"]["data"] == ["faces.parquet", "portraits.parquet"]
    assert str(tmp_path) not in json.dumps(card)
    assert card["terms"] == "tests only"
    assert "impasto" in card["known_words"]
    assert "of" not in card["known_words"]
    with pytest.raises(ConfigError, match="no word of prompt 'of an ostrich'"):
        clip.texts(["of an ostrich"])
    row = (tmp_path / "log.jsonl").read_text().splitlines()[-1]
    scores = {k.removeprefix("validation_"): v for k, v in json.loads(row).items()}
    # Settled before the last scores: the file says what they are of.
    assert scores == pytest.approx({**card["scores"], "images": 96}, rel=1e-3, abs=1e-5)


def test_held_out_portraits_are_never_trained_on(files: tuple[str, str], tmp_path: Path) -> None:
    objective = ClipObjective(config(files, tmp_path))
    names = pq.read_table(files[1])["id"].to_pylist()
    held_out = sum(map(is_held_out, names))
    assert held_out > 3
    assert len(objective.pictures) == 24 + 48 - held_out
    assert len(objective.held_out[0]) == held_out
    kept = {picture.numpy().tobytes() for picture in objective.pictures.pictures}
    assert not any(p.numpy().tobytes() in kept for p in objective.held_out[0].pictures)


def test_it_learns_the_media(files: tuple[str, str], tmp_path: Path) -> None:
    """Textures tell three kinds apart; chance would be a third, a coin for two of them 0.67."""
    settings = {"images": 4800, "batch": 32, "width": 32, "patch": 8, "portraits": 0.6}
    settings |= {"learning_rate": 3e-3, "checkpoint_images": 10_000, "log_images": 10_000}
    settings |= {"filtered": 0.0, "zoomed": 0.0}
    folder = fit(config(files, tmp_path, validation=(files[0],), **settings))
    scores = json.loads((folder / "clip.json").read_text())["scores"]
    assert scores["zero_shot_medium"] > 0.8
    assert scores["direction_impasto"] > max(0.4, scores["other_direction_impasto"])
    clip = load_clip(str(folder))
    painting, photo = clip.texts(["an impasto painting", "a photo"])
    assert float(painting @ photo) < 0.9


def test_a_share_of_the_photographs_is_drawn(files: tuple[str, str], tmp_path: Path) -> None:
    pictures = ClipObjective(config(files, tmp_path)).pictures
    torch.manual_seed(0)
    many = pictures.at(torch.zeros(400, dtype=torch.long))
    found = refiltered(many, 0.5)
    is_drawn = found.medium != 0
    assert 160 < int(is_drawn.sum()) < 240
    assert set(found.medium.tolist()) == {0, *range(4, len(MEDIA))}
    changed = (found.pictures != many.pictures).flatten(1).any(1)
    assert torch.equal(changed, is_drawn)
    assert torch.equal(refiltered(many, 0.0).pictures, many.pictures)
    painted = pictures.at((pictures.medium > 0).nonzero()[:, 0])
    assert torch.equal(refiltered(painted, 1.0).medium, painted.medium)


def test_it_may_begin_with_a_trained_one(files: tuple[str, str], tmp_path: Path) -> None:
    first = fit(config(files, tmp_path / "first", images=48))
    again = ClipObjective(config(files, tmp_path / "again", start=str(first)))
    trained = load_clip(str(first))
    for text in ("an impasto painting", "a smiling woman"):
        torch.testing.assert_close(again.clip().texts([text]), trained.texts([text]))
    with pytest.raises(AssetError, match=r"start: clip has .* choose the same sizes"):
        ClipObjective(config(files, tmp_path / "wide", start=str(first), width=32))


def test_settings_that_make_no_sense(files: tuple[str, str], tmp_path: Path) -> None:
    for settings, message in (
        ({"batch": 1}, "batch must be >= 2, got 1"),
        ({"width": 18, "heads": 4}, "multiple of heads"),
        ({"resolution": 30, "patch": 8}, "multiple of patch"),
        ({"portraits": 1.5}, r"portraits must be in 0\.\.1"),
        ({"layers": 0}, "layers must be >= 1, got 0"),
        ({"heads": 0}, "heads must be >= 1, got 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            config(files, tmp_path, **settings)


def test_another_architecture_does_not_resume(files: tuple[str, str], tmp_path: Path) -> None:
    first = config(files, tmp_path, time_limit_s=0.0)
    fit(first)
    with pytest.raises(AssetError, match="these settings differ: architecture"):
        fit(dataclasses.replace(first, layers=2))


def test_the_tokenizer_reads_words() -> None:
    tokenizer = build_tokenizer(vocabulary())
    found = tokenizer.tokenize("A Middle-aged woman, zebra (PHOTO)")
    assert found == ["a", "middle", "aged", "woman", "<unknown>", "photo"]
    ids = tokenizer("a photo")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id
    assert len(tokenizer) == len(vocabulary()) + 4


# ---------------------------------------------------------------------- the scores


class Oracle:
    """Embeds a picture by its first pixel and a text by the medium word in it."""

    mean = torch.zeros(1)

    def images(self, images: torch.Tensor) -> torch.Tensor:
        medium = ((images[:, 0, 0, 0] + 1) * 127.5).round().long()
        return torch.eye(len(MEDIA))[medium]

    def texts(self, prompts: list[str]) -> torch.Tensor:
        rows = [[float(name in prompt) for name in MEDIA] for prompt in prompts]
        return F.normalize(torch.tensor(rows) + 1e-6, dim=1)


def labelled(medium: list[int], shown: list[int]) -> LabelledPictures:
    pictures = torch.zeros(len(medium), 3, 4, 4, dtype=torch.uint8)
    pictures[:, 0, 0, 0] = torch.tensor(shown, dtype=torch.uint8)
    unknown = torch.full((len(medium),), torch.nan)
    return LabelledPictures(
        pictures=pictures,
        medium=torch.tensor(medium),
        labels={name: unknown for name in ("age", "gender", "smile")},
        is_held_out=torch.zeros(len(medium)).bool(),
    )


def test_scores_of_an_oracle_and_of_one_that_errs() -> None:
    medium = [0, 0, 1, 2, 3, 3, 3, 3]
    perfect = clip_scores(Oracle(), [labelled(medium, medium)])  # type: ignore[arg-type]
    assert perfect["captions"] == 4
    assert perfect["top1"] == perfect["top5"] == perfect["zero_shot_medium"] == 1
    for name in MEDIA[1:4]:
        assert perfect[f"direction_{name}"] == pytest.approx(1, abs=1e-4)
        assert perfect[f"other_direction_{name}"] == pytest.approx(0.5, abs=1e-4)
    assert "zero_shot_gender" not in perfect
    errs = clip_scores(Oracle(), [labelled(medium, [0, 1, 1, 2, 3, 3, 2, 2])])  # type: ignore[arg-type]
    assert errs["top1"] == pytest.approx(5 / 8)
    assert errs["zero_shot_medium"] == pytest.approx((0.5 + 1 + 1 + 0.5) / 4)


def test_directions_by_hand() -> None:
    images = F.normalize(torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 1]]), dim=1)
    medium = torch.tensor([0, 0, 1, 2])
    prompts = torch.eye(4)[:, :3]
    found = medium_directions(images, medium, prompts)
    assert found["direction_impasto"] == pytest.approx(1.0)
    way = torch.tensor([-1, 0.5**0.5, 0.5**0.5])
    want = float(F.cosine_similarity(way, torch.tensor([-1.0, 0, 1]), dim=0))
    assert found["direction_fantasy"] == pytest.approx(want)
    assert "direction_illustration" not in found
    assert medium_directions(images[2:], medium[2:], prompts) == {}


def test_groups_and_balanced_accuracy() -> None:
    ages = torch.tensor([18.0, 32, 33, 38, 56, 57, 60, 90, torch.nan])
    assert torch.equal(
        age_group(ages).nan_to_num(-1), torch.tensor([0.0, 0, -1, 1, 1, -1, 2, 2, -1])
    )
    logits = torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1]])
    assert balanced_accuracy(logits, torch.tensor([0, 0, 1, 1])) == pytest.approx(0.75)
    assert balanced_accuracy(logits, torch.tensor([0, 0, 0, 1])) == pytest.approx(1.0)
    assert medium_prompts("impasto")[:2] == ["an impasto painting", "a face, an impasto painting"]


def test_half_precision_is_close_to_full(files: tuple[str, str], tmp_path: Path) -> None:
    def make(precision: str) -> ClipObjective:
        return ClipObjective(config(files, tmp_path, precision=precision))

    full, half = first_losses(make, "contrast")
    assert half == pytest.approx(full, rel=0.03)
    assert half != full
