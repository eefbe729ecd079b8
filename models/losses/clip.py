"""CLIP: pictures and sentences in one space (arXiv 2103.00020), in transformers' file format.

What guides a domain by text or by pictures and finds style directions from words. The bundled one
is small, knows faces and portraits at 64 px and some sixty words; any CLIP of OpenAI's or LAION's
kind is one setting away, as a folder or an id on the Hugging Face hub.

Legend: N pictures, M prompts, D embedding, T patches, W width of the vision tower, H W image,
S the network's side in px.
"""

import hashlib
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from models.checkpoints.bundled import ASSETS
from models.errors import AssetError, ConfigError
from models.losses.torchvision_shim import ensure_torchvision
from models.stylegan2.generator import weights_hash

logger = logging.getLogger(__name__)

BUNDLED = "refinery"
CARD = "clip.json"
"""Beside a CLIP of our own training: its card, with the words that mean something to it."""
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class Clip(nn.Module):
    """Both towers of a CLIP, frozen, in float32.

    Attributes:
        name: where it came from: "refinery", a folder's name or a hub id.
        hash: sha256 over weights, preprocessing and vocabulary.
        size: side of the square that the vision tower sees, px.
        known_words: those that carry meaning, for a network with a vocabulary of whole words; None
            for one that reads any text.
    """

    model: Any
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        model: nn.Module,
        tokenizer: Any,
        preprocessing: "Preprocessing",
        known_words: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.model = model.float().eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.size, mean, std = preprocessing
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)
        self.known_words = None if known_words is None else frozenset(known_words)
        self.hash = _hash(self.model, tokenizer, preprocessing)

    def images(self, images: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N D"]:
        """Unit embeddings of pictures in [-1, 1] of any size; differentiable.

        As the published preprocessing: the shorter side to S by an antialiased cubic, the centre
        cut out, normalised. Values beyond [-1, 1] are not clamped: their gradient would vanish.
        """
        found = self.model.vision_model(pixel_values=self._pixels(images))
        return F.normalize(self.model.visual_projection(found.pooler_output), dim=1)

    def tokens(self, images: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N T W"]:
        """What the vision tower makes of each patch of a picture at a quarter of its depth, where
        DiFa (arXiv 2207.08736) finds texture; differentiable."""
        tower = self.model.vision_model
        depth = max(1, len(tower.encoder.layers) // 4)
        found = tower(pixel_values=self._pixels(images), output_hidden_states=True)
        return found.hidden_states[depth][:, 1:].float()

    def _pixels(self, images: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N 3 S S"]:
        pixels = (resized(images.float(), self.size) + 1) / 2
        return (pixels - self.mean) / self.std

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Float[Tensor, "M D"]:
        """Unit embeddings of prompts.

        Raises:
            ConfigError: no prompt; one that is longer than the network reads; or one without any
                word that a network with a vocabulary of its own knows.
        """
        if not prompts:
            raise ConfigError(f"CLIP {self.name}: expected at least one prompt, found none")
        unknown = {word for prompt in prompts for word in self._check(prompt)}
        if unknown:
            logger.info("CLIP %s ignores what it does not know: %s", self.name, sorted(unknown))
        tokens = self.tokenizer(list(prompts), padding=True, return_tensors="pt")
        tokens = {key: tokens[key].to(self.mean.device) for key in ("input_ids", "attention_mask")}
        found = self.model.text_model(**tokens)
        return F.normalize(self.model.text_projection(found.pooler_output), dim=1)

    def _check(self, prompt: str) -> set[str]:
        """Refuse a prompt that cannot be read; its words outside a vocabulary of whole words."""
        longest = self.model.config.text_config.max_position_embeddings
        count = len(self.tokenizer(prompt)["input_ids"])
        if count > longest:
            raise ConfigError(
                f"CLIP {self.name}: prompt {prompt!r} has {count} tokens, the network reads "
                f"{longest}; shorten it"
            )
        if self.known_words is None:
            return set()
        if not self._words(prompt) & self.known_words:
            raise ConfigError(
                f"CLIP {self.name}: no word of prompt {prompt!r} means anything to it; it knows "
                f"{', '.join(sorted(self.known_words))}. Use these, or a CLIP that reads any text "
                "(a folder or a hub id such as openai/clip-vit-base-patch32)"
            )
        return self.ignored(prompt)

    def ignored(self, text: str) -> set[str]:
        """Words of a text that mean nothing to a network with a vocabulary of whole words."""
        if self.known_words is None:
            return set()
        return self._words(text) - set(self.tokenizer.get_vocab())

    def _words(self, text: str) -> set[str]:
        reader = self.tokenizer.backend_tokenizer
        parts = reader.pre_tokenizer.pre_tokenize_str(reader.normalizer.normalize_str(text))
        return {word for word, _ in parts}


Preprocessing = tuple[int, list[float], list[float]]
"""Side in px, mean and standard deviation of red, green, blue in 0..1."""


def resized(images: Float[Tensor, "N 3 H W"], size: int) -> Float[Tensor, "N 3 S S"]:
    """The shorter side to `size` by an antialiased cubic, then the centre; equal sizes stay."""
    height, width = images.shape[2:]
    if min(height, width) != size:
        ratio = size / min(height, width)
        sides = (max(size, round(height * ratio)), max(size, round(width * ratio)))
        images = F.interpolate(images, sides, mode="bicubic", antialias=True, align_corners=False)
        height, width = sides
    top, left = (height - size) // 2, (width - size) // 2
    return images[:, :, top : top + size, left : left + size]


def load_clip(source: str = BUNDLED) -> Clip:
    """A CLIP ready to guide: float32, frozen, on the CPU.

    Args:
        source: "refinery", the bundled one; a folder in transformers' format (config.json,
            weights, tokenizer, preprocessor_config.json); or an id on the hub, read from the local
            cache where it is there, else fetched unless HF_HUB_OFFLINE forbids it.

    Raises:
        AssetError: no such folder, not in the cache and not reachable, or not a CLIP.
    """
    if source == BUNDLED:
        folder = ASSETS / "clip"
        if not (folder / "config.json").is_file():
            raise AssetError(
                f"CLIP {source}: {folder} is missing; reinstall the package, or train one with "
                "`refinery train clip`"
            )
        return _read(source, str(folder))
    path = Path(source).expanduser()
    if path.is_dir():
        return _read(path.name, str(path))
    if not HUB_ID.fullmatch(source) or path.suffix in (".pt", ".safetensors", ".bin"):
        raise AssetError(
            f"CLIP {source}: no such folder; give a folder with config.json and weights in "
            f'transformers\' format, a hub id such as openai/clip-vit-base-patch32, or "{BUNDLED}"'
        )
    return _read(source, source)


def _read(name: str, where: str) -> Clip:
    ensure_torchvision()
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # a bar for half a second of reading, in the middle of a log
    is_folder = Path(where).is_dir()
    is_local = is_folder or not _is_reachable(where)
    config = _config(name, where, is_folder, is_local)
    if config.get("model_type") != "clip":
        raise AssetError(
            f"CLIP {name}: its config.json is of a {config.get('model_type')!r}; expected 'clip', "
            "with both towers"
        )
    try:
        loaded: Any = CLIPModel.from_pretrained(
            where,
            config=CLIPConfig.from_dict(config),
            dtype=torch.float32,
            local_files_only=is_local,
            output_loading_info=True,
        )
        model, found = loaded
        tokenizer = AutoTokenizer.from_pretrained(where, local_files_only=is_local)
        preprocessing = _preprocessing(where, is_local)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise AssetError(f"CLIP {name}: cannot read its files: {_first_line(error)}") from error
    if missing := sorted(found["missing_keys"]):
        raise AssetError(
            f"CLIP {name}: {len(missing)} weights are missing ({', '.join(missing[:3])}, ...); "
            "the file is damaged or holds one tower only"
        )
    if preprocessing[0] != model.config.vision_config.image_size:
        raise AssetError(
            f"CLIP {name}: its preprocessing makes {preprocessing[0]} px, its vision tower sees "
            f"{model.config.vision_config.image_size}; the files do not belong together"
        )
    card = Path(where) / CARD
    words = json.loads(card.read_text())["known_words"] if is_folder and card.is_file() else None
    return Clip(name, model, tokenizer, preprocessing, words)


def _is_reachable(hub_id: str) -> bool:
    """Whether the hub answers for this id: one request, so that a machine without a network is
    told at once, where a download would be tried again for half a minute first."""
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(hub_id, timeout=5)
    except Exception as error:  # which kinds it raises depends on the version's HTTP library
        logger.info("CLIP %s: the hub does not answer (%s); looking in the cache", hub_id, error)
        return False
    return True


def _config(name: str, where: str, is_folder: bool, is_local: bool) -> dict[str, Any]:
    try:
        return _json_file(where, "config.json", is_local)
    except (OSError, ValueError) as error:
        hint = (
            "expected a folder in transformers' format"
            if is_folder
            else "it is neither in the local cache nor to be had from the hub; download it where "
            "there is a network (`hf download`) and give the folder, or check the id"
        )
        raise AssetError(f"CLIP {name}: {hint} ({_first_line(error)})") from error


def _json_file(where: str, file: str, is_local: bool) -> dict[str, Any]:
    from transformers.utils.hub import cached_file

    path = cached_file(where, file, local_files_only=is_local)
    return json.loads(Path(str(path)).read_text(encoding="utf-8"))


def _preprocessing(where: str, is_local: bool) -> Preprocessing:
    """From preprocessor_config.json, in the forms of old and new files."""
    found = _json_file(where, "preprocessor_config.json", is_local)
    size = found["crop_size"] if found.get("do_center_crop", True) else found["size"]
    if isinstance(size, dict):
        sides = {int(side) for side in size.values()}
        if len(sides) != 1:
            raise ValueError(f"expected a square, preprocessor_config.json says {size}")
        size = sides.pop()
    return int(size), list(found["image_mean"]), list(found["image_std"])


def _hash(model: nn.Module, tokenizer: Any, preprocessing: Preprocessing) -> str:
    vocabulary = sorted(tokenizer.get_vocab().items())
    text = json.dumps([weights_hash(model), preprocessing, vocabulary])
    return hashlib.sha256(text.encode()).hexdigest()


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
