"""A trained CLIP as a folder in transformers' format, with a card."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save

from models.losses.clip import CARD, Clip
from models.losses.torchvision_shim import ensure_torchvision
from tasks.training.assets.captions import FUNCTION_WORDS, vocabulary
from tasks.training.blocks import card_settings, rounded_scores
from tasks.training.trainer import TrainingConfig

MEAN = (0.5, 0.5, 0.5)
STD = (0.5, 0.5, 0.5)
"""Of red, green, blue in 0..1."""
SPECIAL = ("<start>", "<end>", "<pad>", "<unknown>")
LONGEST = 32
"""Tokens that the text tower reads."""


def build_tokenizer(words: Sequence[str]) -> Any:
    """A tokenizer of whole lower-case words; punctuation parts words, others are `<unknown>`."""
    ensure_torchvision()
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    start, end, pad, unknown = SPECIAL
    numbers = {word: index for index, word in enumerate((*SPECIAL, *words))}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token=unknown))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\p{L}\p{N}]+"), "removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, 0), (end, 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=LONGEST,
        bos_token=start,
        eos_token=end,
        pad_token=pad,
        unk_token=unknown,
    )


def save_clip(
    clip: Clip, folder: Path, config: TrainingConfig, shown: int, scores: Mapping[str, float]
) -> Path:
    """Write config.json, model.safetensors (half precision), tokenizer, preprocessor_config.json
    and the card clip.json; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    model: Any = clip.model
    state = {name: t.detach().cpu().half().contiguous() for name, t in model.state_dict().items()}
    # save_pretrained's file would be readable by the owner alone.
    weights = save(state, metadata={"format": "pt"})
    (folder / "model.safetensors").write_bytes(weights)
    settings = model.config.to_diff_dict() | {"architectures": ["CLIPModel"], "dtype": "float16"}
    _write(folder / "config.json", settings)
    clip.tokenizer.save_pretrained(folder)
    # The name that transformers 4 and 5 both read; 5 writes one of its own.
    told = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    _write(folder / "tokenizer_config.json", told | {"tokenizer_class": "PreTrainedTokenizerFast"})
    _write(folder / "preprocessor_config.json", _preprocessor(clip))
    card = {
        "kind": "clip",
        "hash": clip.hash,
        "sha256": hashlib.sha256(weights).hexdigest(),
        "parameters": sum(tensor.numel() for tensor in model.parameters()),
        "known_words": [word for word in vocabulary() if word not in FUNCTION_WORDS],
        "terms": getattr(config, "terms", ""),
        "provenance": {
            "method": "CLIP (arXiv 2103.00020) on captions composed from labels, "
            "tasks.training.assets.clip",
            "images_shown": shown,
            "settings": card_settings(config, ()),
        },
        "scores": rounded_scores(scores),
    }
    _write(folder / CARD, card)
    return folder


def _preprocessor(clip: Clip) -> dict[str, Any]:
    side = clip.size
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [round(float(value), 6) for value in clip.mean.flatten()],
        "image_std": [round(float(value), 6) for value in clip.std.flatten()],
    }


def _write(path: Path, record: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
