"""Train a compact CLIP on faces and portraits with captions composed from their labels.

Both towers are transformers' (arXiv 2103.00020), small. The loss is InfoNCE with a learned
temperature; captions that say the same are one answer, not each other's negatives. Photographs come
with age, gender and smile, portraits with their style alone, each style as often as the others;
some photographs are drawn or painted by a filter, which is a style with age, gender and smile.

Legend: N batch, M prompts, D embedding, H W image.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from models.errors import AssetError, ConfigError
from models.losses.clip import Clip, load_clip
from models.losses.torchvision_shim import ensure_torchvision
from models.settings import Count, NotNegative, Positive, Several, Share
from tasks.training.assets.captions import DRAWS, Subject, said, subject, vocabulary, wording
from tasks.training.assets.clip_files import MEAN, STD, build_tokenizer, save_clip
from tasks.training.assets.clip_media import FILTERS, in_medium
from tasks.training.assets.clip_scores import clip_scores
from tasks.training.assets.labels import MEDIA, LabelledPictures, draw_weights, load_labelled
from tasks.training.blocks import descend
from tasks.training.schedules import annealed
from tasks.training.trainer import Objective, TrainingConfig
from tasks.training.views import views, zoomed

logger = logging.getLogger(__name__)

LARGEST_SCALE = 100.0
"""Bound of one over the temperature, as published."""
UNKNOWN_SHARE = 0.03
"""Words of a training caption that are hidden, so that an unknown word means nothing."""


@dataclass(frozen=True, kw_only=True)
class FitClipConfig(TrainingConfig):
    """Settings of one run. The defaults are the bundled network's."""

    data: tuple[str, ...]
    """Parquet files of faces (age, gender, smile_prob) and of portraits (style); one portrait in
    five, chosen by its id, is never trained on and scores with `validation`."""
    images: Count = 110_000
    batch: Several = 64
    """Pairs of a step: each is told apart from batch - 1 others."""
    portraits: Share = 0.35
    """Share of a batch that is painted or drawn, from the files."""
    filtered: Share = 0.5
    """Share of the photographs that a filter draws or paints (clip_media.py)."""
    zoomed: Share = 0.3
    """Share of the pictures of which a part is shown alone."""
    age_balance: Share = 0.5
    """How evenly decades of age are drawn, see `draw_weights`."""

    resolution: Count = 64
    """Side that the vision tower sees, px."""
    patch: Count = 8
    """Side of its patches, px."""
    width: Count = 128
    """Of both towers."""
    layers: Count = 4
    """Of the vision tower."""
    text_layers: Count = 2
    heads: Count = 4
    embedding: Count = 128

    learning_rate: Positive = 1e-3
    weight_decay: NotNegative = 0.05
    start: str = ""
    """A CLIP of this training (a folder or "refinery") whose weights and words this one begins
    with; the sizes must be the same."""
    warm_up: Share = 0.03
    """Share of the run in which the rate rises to `learning_rate`."""
    anneal: Share = 0.9
    """Share of the run, at its end, in which the rate falls to 0 along a cosine."""
    terms: str = "as the pictures'"
    """For the card: on what terms the weights may be used."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.heads:
            raise ConfigError(f"width {self.width} must be a multiple of heads, {self.heads}")
        if self.resolution % self.patch:
            raise ConfigError(
                f"resolution {self.resolution} must be a multiple of patch, {self.patch}"
            )


def caption_nce(
    pictures: Float[Tensor, "N D"],
    captions: Float[Tensor, "N D"],
    scale: Tensor | float,
    is_same: Bool[Tensor, "N N"],
) -> Float[Tensor, " N"]:
    """Symmetric InfoNCE with several right answers: cross-entropy against the even distribution
    over the captions that say the same. With no two alike it is CLIP's loss.

    Args:
        pictures, captions: rows of norm 1; rows of one index belong together.
        scale: factor of the cosines, one over the temperature.
        is_same: captions that say the same; symmetric, true on the diagonal.
    """
    target = is_same.float() / is_same.sum(1, keepdim=True)
    logits = scale * pictures @ captions.T
    of_pictures = -(target * logits.log_softmax(1)).sum(1)
    of_captions = -(target * logits.T.log_softmax(1)).sum(1)
    return (of_pictures + of_captions) / 2


def balanced_rows(
    medium: Int[Tensor, " M"], chances: Float[Tensor, " M"], count: int, portraits: float
) -> Int[Tensor, " N"]:
    """Random rows: a share `portraits` of them painted or drawn, each style as often; all of them
    from what there is where a file holds one kind only. Within a medium by `chances`."""
    present = medium.bincount(minlength=len(MEDIA)) > 0
    weights = torch.full((len(MEDIA),), portraits / max(int(present[1:].sum()), 1))
    weights[0] = 1 - portraits
    weights = weights * present
    if not float(weights.sum()) > 0:
        weights = present.float()
    media = torch.multinomial(weights, count, replacement=True)
    rows = torch.empty(count, dtype=torch.long)
    for index in media.unique().tolist():
        own = (medium == index).nonzero()[:, 0]
        chosen = media == index
        rows[chosen] = own[torch.multinomial(chances[own], int(chosen.sum()), replacement=True)]
    return rows


class ClipObjective(Objective):
    """Both towers, the temperature and their optimiser."""

    needs_pictures = False

    def __init__(self, config: FitClipConfig) -> None:
        super().__init__(config)
        self.resolution = config.resolution
        pictures = load_labelled(config.data, config.resolution)
        self.pictures = pictures.at(~pictures.is_held_out)
        if not len(self.pictures):
            raise AssetError(f"training data: every picture of {list(config.data)} is held out")
        self.chances = draw_weights(self.pictures.labels, config.age_balance)
        self.held_out = [pictures.at(pictures.is_held_out)]
        if config.validation:
            faces = load_labelled(config.validation, config.resolution)
            self.held_out += [faces, *(drawn(faces, name) for name in FILTERS if config.filtered)]
        self.tokenizer = build_tokenizer(vocabulary())
        self.model = build_model(config, self.tokenizer).to(config.device)
        if config.start:
            begin_with(load_clip(config.start), self.model, self.tokenizer)
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": config.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            betas=(0.9, 0.98),
        )
        self.parts = {"model": self.model, "optimizer": self.optimizer}
        self.identity = {
            "architecture": self.model.config.to_diff_dict(),
            "words": vocabulary(),
            "batch": config.batch,
            "shares": [config.portraits, config.filtered, config.zoomed],
        }

    def step(self, pictures: Float[Tensor, "0 3 H W"], shown: int) -> dict[str, Tensor]:
        """One update from pairs of its own drawing; `pictures` is empty."""
        share = shown / self.config.images
        rate = self.config.learning_rate * annealed(share, self.config.anneal)
        rate *= min(1.0, (share + 1e-3) / max(self.config.warm_up, 1e-3))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        config, medium = self.config, self.pictures.medium
        rows = balanced_rows(medium, self.chances, config.batch, config.portraits)
        chosen = refiltered(self.pictures.at(rows), config.filtered)
        subjects = [said(known, draws) for known, draws in drawn_subjects(chosen)]
        captions = [wording(what, torch.rand(DRAWS).tolist()) for what in subjects]
        seen = zoomed(views(chosen.pictures), config.zoomed).to(self.config.device)
        with self.autocast():
            images = self._embed_pictures(seen)
            texts = self._embed_captions(captions)
        is_same = same(subjects, captions).to(images.device)
        loss = caption_nce(images, texts, self.model.logit_scale.exp(), is_same)
        descend(loss.mean(), list(self.model.parameters()), self.optimizer)
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=math.log(LARGEST_SCALE))
        return {"contrast": loss, "temperature": 1 / self.model.logit_scale.exp()}

    @torch.no_grad()
    def score(self, pictures: Float[Tensor, "0 3 H W"]) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Retrieval, zero-shot accuracy and directions on what is held out; no grid."""
        clip = self.clip().to(self.config.device)
        self.model.train().requires_grad_(True)
        found = [part for part in self.held_out if len(part)]
        if not found:
            return {}, []
        scores = clip_scores(clip, found)
        return {name: torch.tensor([value]) for name, value in scores.items()}, []

    def settle(self) -> None:
        """Half precision for every value: the file holds nothing else."""
        with torch.no_grad():
            for tensor in self.model.state_dict().values():
                tensor.copy_(tensor.half())

    def export(self, scores: Mapping[str, float], shown: int) -> Path:
        return save_clip(self.clip(), Path(self.config.out) / "clip", self.config, shown, scores)

    def clip(self) -> Clip:
        """The towers as `load_clip` gives them; they are frozen and shared, not copied."""
        preprocessing = (self.resolution, list(MEAN), list(STD))
        return Clip("training", self.model, self.tokenizer, preprocessing)

    # ------------------------------------------------------------------ inside

    def _embed_pictures(self, images: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N D"]:
        pixels = ((images + 1) / 2 - MEAN[0]) / STD[0]
        found = self.model.vision_model(pixel_values=pixels)
        return F.normalize(self.model.visual_projection(found.pooler_output).float(), dim=1)

    def _embed_captions(self, captions: Sequence[str]) -> Float[Tensor, "N D"]:
        tokens = self.tokenizer(list(captions), padding=True, return_tensors="pt")
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        is_word = ids >= len(self.tokenizer.all_special_ids)
        ids[is_word & (torch.rand(ids.shape) < UNKNOWN_SHARE)] = self.tokenizer.unk_token_id
        found = self.model.text_model(
            input_ids=ids.to(self.config.device), attention_mask=mask.to(self.config.device)
        )
        return F.normalize(self.model.text_projection(found.pooler_output).float(), dim=1)


fit = ClipObjective.fit


def build_model(config: FitClipConfig, tokenizer: Any) -> Any:
    """Fresh towers of the configured sizes."""
    ensure_torchvision()
    from transformers import CLIPConfig, CLIPModel

    both = {"hidden_size": config.width, "intermediate_size": 4 * config.width}
    both |= {"num_attention_heads": config.heads, "projection_dim": config.embedding}
    text = {
        "vocab_size": len(tokenizer),
        "num_hidden_layers": config.text_layers,
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "num_hidden_layers": config.layers,
        "image_size": config.resolution,
        "patch_size": config.patch,
    }
    sizes = CLIPConfig(
        text_config={**both, **text},
        vision_config={**both, **vision},
        projection_dim=config.embedding,
    )
    model: nn.Module = CLIPModel(sizes)
    return model.train()


def begin_with(clip: Clip, model: Any, tokenizer: Any) -> None:
    """Copy the weights of a trained CLIP into a fresh one, words by their name.

    Raises:
        AssetError: its sizes are others.
    """
    words, state = tokenizer.get_vocab(), model.state_dict()
    known, own = clip.tokenizer.get_vocab(), clip.model.state_dict()
    for name, value in state.items():
        given = own[name]
        is_words = name.endswith("token_embedding.weight")
        if given.shape[is_words:] != value.shape[is_words:]:
            raise AssetError(
                f"start: {clip.name} has {name} of {list(given.shape)}, this training makes "
                f"{list(value.shape)}; choose the same sizes, or start without it"
            )
        if is_words:
            shared = sorted(words.keys() & known.keys())
            rows = [words[word] for word in shared]
            value[rows] = given[[known[word] for word in shared]].to(value)
        else:
            value.copy_(given)


def refiltered(chosen: LabelledPictures, share: float) -> LabelledPictures:
    """The same pictures, a share of the photographs in the media of `FILTERS`, each as often."""
    kinds = torch.randint(len(FILTERS), (len(chosen),)) + MEDIA.index(next(iter(FILTERS)))
    is_turned = (chosen.medium == 0) & (torch.rand(len(chosen)) < share)
    medium = torch.where(is_turned, kinds, chosen.medium)
    pictures = chosen.pictures.clone()
    for index in medium[is_turned].unique().tolist():
        rows = is_turned & (medium == index)
        pictures[rows] = _filtered(pictures[rows], MEDIA[index])
    return replace(chosen, pictures=pictures, medium=medium)


def drawn(faces: LabelledPictures, name: str) -> LabelledPictures:
    """All photographs in one medium, the same way every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pictures = _filtered(faces.pictures, name)
    return replace(
        faces, pictures=pictures, medium=torch.full_like(faces.medium, MEDIA.index(name))
    )


def _filtered(pictures: UInt8[Tensor, "N 3 H W"], name: str) -> UInt8[Tensor, "N 3 H W"]:
    images = in_medium(pictures.float() / 127.5 - 1, name)
    return ((images + 1) * 127.5).round().clamp(0, 255).byte()


def drawn_subjects(chosen: LabelledPictures) -> list[tuple[Subject, list[float]]]:
    """What is known of each picture, a smile drawn by its probability, and numbers for `said`."""
    draws = torch.rand(len(chosen), 5).tolist()
    columns = [chosen.labels[name].tolist() for name in ("age", "gender", "smile")]
    return [
        (subject(medium, age, gender, smile, row[4]), row[:4])
        for medium, age, gender, smile, row in zip(
            chosen.medium.tolist(), *columns, draws, strict=True
        )
    ]


def same(subjects: Sequence[Subject], captions: Sequence[str]) -> Bool[Tensor, "N N"]:
    """Captions that are equal in words or in what they say."""
    by_words, by_meaning = _numbered(captions), _numbered([what.meaning for what in subjects])
    return (by_words[:, None] == by_words) | (by_meaning[:, None] == by_meaning)


def _numbered(values: Sequence[Any]) -> Int[Tensor, " N"]:
    numbers: dict[Any, int] = {}
    return torch.tensor([numbers.setdefault(value, len(numbers)) for value in values])
