"""CLIP: against transformers' own pipeline, gradients, what is refused, and the shipped network."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.checkpoints.bundled import ASSETS
from models.errors import AssetError, ConfigError
from models.losses.clip import Clip, load_clip, resized
from models.losses.torchvision_shim import ensure_torchvision
from tests.conftest import make_picture

ensure_torchvision()

SIDE = 16
MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP in the files of OpenAI's: byte-pair vocabulary, its own mean and deviation."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    path = tmp_path_factory.mktemp("clip")
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: index for index, word in enumerate(words)}
    CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=24).save_pretrained(path)
    CLIPImageProcessor(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=MEAN,
        image_std=STD,
    ).save_pretrained(path)
    both = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    both |= {"num_attention_heads": 2}
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": 0}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(
            text_config={**both, **ends, "vocab_size": len(words), "max_position_embeddings": 24},
            vision_config={**both, "image_size": SIDE, "patch_size": 4},
            projection_dim=8,
        )
    )
    for name, value in model.named_parameters():
        if "layer_norm" not in name and "logit_scale" not in name:
            torch.nn.init.normal_(value, std=0.3)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def clip(folder: Path) -> Clip:
    return load_clip(str(folder))


def theirs(folder: Path) -> tuple[Any, Any, Any]:
    """The model, tokenizer and image processor as transformers alone reads them."""
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPModel

    model = CLIPModel.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder), CLIPImageProcessor.from_pretrained(folder)


def embedded(found: Any) -> Tensor:
    """What transformers calls features, as unit rows."""
    return F.normalize(getattr(found, "pooler_output", found), dim=1)


@pytest.mark.parametrize(("size", "tolerance"), [(SIDE, 1e-5), (48, 0.02)])
def test_images_equal_transformers_own_pipeline(
    folder: Path, clip: Clip, size: int, tolerance: float
) -> None:
    """Where pictures are resized, theirs are rounded to 8 bits on the way."""
    pictures = [make_picture(seed, size) for seed in range(3)]
    model, _, processor = theirs(folder)
    with torch.no_grad():
        want = embedded(model.get_image_features(**processor(pictures, return_tensors="pt")))
    pixels = torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2)
    found = clip.images(pixels.float() / 127.5 - 1)
    torch.testing.assert_close(found, want, atol=tolerance, rtol=0)
    assert float((want[0] - want[1]).abs().max()) > 5 * tolerance


def test_texts_equal_transformers_own_pipeline(folder: Path, clip: Clip) -> None:
    """One prompt at a time: padding beside longer ones changes nothing."""
    prompts = ["a face", "an oil painting of it", "x"]
    model, tokenizer, _ = theirs(folder)
    with torch.no_grad():
        want = [
            embedded(model.get_text_features(**tokenizer(p, return_tensors="pt"))) for p in prompts
        ]
    found = clip.texts(prompts)
    torch.testing.assert_close(found, torch.cat(want), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(3))
    assert float((found[0] - found[1]).abs().max()) > 0.01


def test_gradients_equal_differences(clip: Clip) -> None:
    images = F.interpolate(torch.rand(2, 3, 5, 5), size=(24, 24), mode="bilinear") * 2 - 1
    way = torch.randn_like(images)
    target = torch.randn(8)
    images.requires_grad_(True)
    (clip.images(images) @ target).sum().backward()
    assert images.grad is not None
    with torch.no_grad():
        ends = [(clip.images(images + step * way) @ target).sum() for step in (1e-3, -1e-3)]
    want = float(ends[0] - ends[1]) / 2e-3
    assert float((images.grad * way).sum()) == pytest.approx(want, rel=0.02)
    assert not any(p.requires_grad for p in clip.parameters())


def test_a_row_does_not_depend_on_its_batch(clip: Clip) -> None:
    images = torch.rand(3, 3, 20, 20) * 2 - 1
    together = clip.images(images)
    alone = torch.cat([clip.images(image[None]) for image in images])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)


def test_wide_pictures_are_cut_at_the_centre() -> None:
    images = torch.zeros(1, 3, 8, 16)
    images[..., 4:12] = 1
    assert torch.equal(resized(images, 8), torch.ones(1, 3, 8, 8))
    assert resized(images, 4).shape == (1, 3, 4, 4)
    square = torch.rand(1, 3, 8, 8)
    assert torch.equal(resized(square, 8), square)


def test_the_hash_follows_weights_and_preprocessing(
    folder: Path, clip: Clip, tmp_path: Path
) -> None:
    assert load_clip(str(folder)).hash == clip.hash
    other = changed(folder, tmp_path / "mean", "preprocessor_config.json", image_mean=[0.5] * 3)
    assert load_clip(str(other)).hash != clip.hash
    again = shutil.copytree(folder, tmp_path / "weights")
    state = load_file(again / "model.safetensors")
    state["visual_projection.weight"][0, 0] += 1
    save_file(state, again / "model.safetensors", metadata={"format": "pt"})
    assert load_clip(str(again)).hash != clip.hash


# ---------------------------------------------------------------------- what is refused


def changed(folder: Path, to: Path, file: str, **values: Any) -> Path:
    """A copy of the folder with some values of one JSON file replaced."""
    shutil.copytree(folder, to)
    record = json.loads((to / file).read_text())
    (to / file).write_text(json.dumps(record | values))
    return to


def test_missing_folders_and_strange_files(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(AssetError, match=r"/no/such/folder: no such folder; give a folder"):
        load_clip("/no/such/folder")
    with pytest.raises(AssetError, match=r"ViT-B-32\.pt: no such folder"):
        load_clip("ViT-B-32.pt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(AssetError, match="expected a folder in transformers' format"):
        load_clip(str(tmp_path / "empty"))
    other = changed(folder, tmp_path / "other", "config.json", model_type="siglip")
    with pytest.raises(AssetError, match="is of a 'siglip'; expected 'clip'"):
        load_clip(str(other))
    large = {"height": 32, "width": 32}
    other = changed(folder, tmp_path / "large", "preprocessor_config.json", crop_size=large)
    with pytest.raises(AssetError, match=r"makes 32 px, its vision tower sees 16"):
        load_clip(str(other))


def test_a_file_with_one_tower_only(folder: Path, tmp_path: Path) -> None:
    again = shutil.copytree(folder, tmp_path / "half")
    state = load_file(again / "model.safetensors")
    state = {k: v for k, v in state.items() if not k.startswith("text_model.encoder")}
    save_file(state, again / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(AssetError, match=r"32 weights are missing \(text_model\.encoder"):
        load_clip(str(again))


def test_a_hub_id_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever the machine's network: offline mode forbids it, and the cache is empty."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(AssetError, match=r"neither in the local cache nor .*`hf download"):
        load_clip("nobody/there-is-no-such-clip")


def test_prompts_that_cannot_be_read(clip: Clip) -> None:
    with pytest.raises(ConfigError, match="expected at least one prompt"):
        clip.texts([])
    with pytest.raises(ConfigError, match=r"has 26 tokens, the network reads 24; shorten it"):
        clip.texts(["abcdefghijkl mnopqrstuvwx"])


# ---------------------------------------------------------------------- the bundled one


@pytest.fixture(scope="module")
def bundled() -> Clip:
    return load_clip()


def test_the_bundled_one_is_small_and_in_transformers_format(bundled: Clip) -> None:
    """What transformers alone makes of the folder is what `load_clip` makes of it."""
    folder = ASSETS / "clip"
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 6e6
    assert {v.dtype for v in load_file(folder / "model.safetensors").values()} == {torch.float16}
    card = json.loads((folder / "clip.json").read_text())
    assert (bundled.name, bundled.hash) == ("refinery", card["hash"])
    model, tokenizer, processor = theirs(folder)
    prompts = ["a photo of a smiling woman", "An impasto painting of a middle-aged man"]
    picture = make_picture(0, 64)
    with torch.no_grad():
        tokens = tokenizer(prompts, padding=True, return_tensors="pt")
        texts = embedded(model.get_text_features(**tokens))
        images = embedded(model.get_image_features(**processor([picture], return_tensors="pt")))
    torch.testing.assert_close(bundled.texts(prompts), texts, atol=1e-5, rtol=0)
    pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None]
    torch.testing.assert_close(bundled.images(pixels / 127.5 - 1), images, atol=1e-5, rtol=0)


def test_prompts_without_a_known_word_are_refused(
    bundled: Clip, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with pytest.raises(ConfigError, match=r"no word of prompt 'the castle of a hill' .*impasto"):
        bundled.texts(["a photo", "the castle of a hill"])
    known, with_unknown = bundled.texts(["an Impasto painting!", "an impasto gondola painting"])
    assert float(known @ with_unknown) > 0.8
    assert "ignores what it does not know: ['gondola']" in caplog.text


def test_the_bundled_one_tells_held_out_portraits_from_photographs(
    bundled: Clip, shared: Path
) -> None:
    """Which way the pictures go, the prompts go, and no other style's prompts go more so."""
    import io

    import pyarrow.parquet as pq
    from PIL import Image

    rows = pq.read_table(shared / "data/portraits/portraits64.parquet").to_pylist()
    rows = [r for r in rows if int(hashlib.sha256(r["id"].encode()).hexdigest(), 16) % 5 == 0]
    faces = pq.read_table(shared / "data/faces/val64-000.parquet", columns=["image"])
    groups: dict[str, list[bytes]] = {}
    for row in rows:
        groups.setdefault(row["style"], []).append(row["image"])
    groups["photo"] = [row["image"]["bytes"] for row in faces.to_pylist()[:80]]
    means = {}
    for name, files in groups.items():
        pixels = np.stack([np.asarray(Image.open(io.BytesIO(f)).convert("RGB")) for f in files])
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
        means[name] = bundled.images(images).mean(0)
    texts = {
        "photo": "a photo of a face",
        "impasto": "an impasto painting of a face",
        "fantasy": "a fantasy painting of a face",
        "illustration": "an illustration of a face",
    }
    words = dict(zip(texts, bundled.texts(list(texts.values())), strict=True))
    for style in ("impasto", "fantasy", "illustration"):
        way = means[style] - means["photo"]
        cosines = {
            other: float(F.cosine_similarity(way, words[other] - words["photo"], dim=0))
            for other in ("impasto", "fantasy", "illustration")
        }
        assert max(cosines, key=cosines.__getitem__) == style, (style, cosines)
        assert cosines[style] > 0.6, (style, cosines)
