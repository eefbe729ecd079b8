"""Train the attribute scorer: age, gender and smile of aligned faces.

It starts from the bundled perceptual trunk. The age is learned as a distribution over bins around
the label (arXiv 1611.01731) together with its mean (arXiv 1807.08255); the smile from its
pseudo-label's probability, not from a threshold of it.

Legend: N batch, M pictures, A age bins, H W image.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from scipy.stats import spearmanr
from torch import Tensor

from models.attributes import AttributeArchitecture, AttributeNetwork, AttributeScorer
from models.checkpoints.bundled import asset_path
from models.encoders.checkpoint import save_encoder
from models.errors import AssetError
from models.losses.trunk import load_trunk
from models.settings import Count, NotNegative, Positive, Share
from tasks.training.assets.labels import LabelledPictures, draw_weights, load_labelled
from tasks.training.blocks import card_settings, descend, rounded_scores, settle
from tasks.training.schedules import annealed
from tasks.training.trainer import Objective, TrainingConfig, to_images
from tasks.training.views import views


@dataclass(frozen=True, kw_only=True)
class FitAttributesConfig(TrainingConfig):
    """Settings of one run. The defaults are the bundled scorer's."""

    data: tuple[str, ...]
    """Parquet files with `image`, `age`, `gender` and `smile_prob`."""
    images: Count = 90_000
    batch: Count = 32
    resolution: Count = 64
    """Side that the network sees, px."""
    hidden: Count = 96
    dropout: Share = 0.3
    start_from: str | None = "bundled"
    """Perceptual trunk whose layers it starts from: "bundled", a trunk.safetensors, or None."""

    learning_rate: Positive = 1e-3
    trunk_rate: Share = 0.5
    """Factor of the rate for the trunk's layers."""
    weight_decay: NotNegative = 0.05
    anneal: Share = 0.8
    """Share of the run, at its end, in which the rate falls to 0 along a cosine."""
    age_spread: Positive = 4.0
    """Standard deviation of the distribution around an age label, years."""
    age_balance: Share = 0.5
    """How evenly the decades are drawn, see `draw_weights`."""
    terms: str = "as the pictures'"
    """For the card: on what terms the weights may be used."""


class AttributesObjective(Objective):
    """The network and its optimiser."""

    needs_pictures = False

    def __init__(self, config: FitAttributesConfig) -> None:
        super().__init__(config)
        self.resolution = config.resolution
        self.pictures = _complete(load_labelled(config.data, config.resolution), config.data)
        self.held_out = None
        if config.validation:
            held_out = load_labelled(config.validation, config.resolution)
            self.held_out = _complete(held_out, config.validation)
        architecture = AttributeArchitecture(input_size=config.resolution, hidden=config.hidden)
        network = AttributeNetwork(architecture, config.dropout)
        if config.start_from:
            _adopt_trunk(network, config.start_from)
        self.network = network.to(config.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        heads = [*self.network.hidden.parameters(), *self.network.answers.parameters()]
        self.optimizer = torch.optim.AdamW(
            [{"params": heads}, {"params": list(self.network.trunk.parameters())}],
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
        )
        self.weights = draw_weights(self.pictures.labels, config.age_balance)
        self.parts = {"network": self.network, "optimizer": self.optimizer}
        self.identity = {"architecture": architecture.to_dict(), "batch": config.batch}

    def step(self, pictures: Float[Tensor, "0 3 H W"], shown: int) -> dict[str, Tensor]:
        """One update from pictures of its own drawing; `pictures` is empty."""
        rate = self.config.learning_rate * annealed(shown / self.config.images, self.config.anneal)
        for group, factor in zip(
            self.optimizer.param_groups, (1.0, self.config.trunk_rate), strict=True
        ):
            group["lr"] = rate * factor
        rows = torch.multinomial(self.weights, self.config.batch, replacement=True)
        chosen = self.pictures.at(rows)
        images = views(chosen.pictures).to(self.config.device)
        labels = {name: x.to(self.config.device) for name, x in chosen.labels.items()}
        losses = self._losses(images.contiguous(memory_format=torch.channels_last), labels)
        total = torch.stack([loss.mean() for loss in losses.values()]).sum()
        descend(total, list(self.network.parameters()), self.optimizer)
        return losses

    @torch.no_grad()
    def score(self, pictures: Float[Tensor, "0 3 H W"]) -> tuple[dict[str, Tensor], list[Tensor]]:
        """`attribute_scores` of the held-out pictures; no grid."""
        if self.held_out is None:
            return {}, []
        self.network.eval()
        scores = attribute_scores(self.network, self.held_out, self.config.device)
        self.network.train()
        return {name: torch.tensor([value]) for name, value in scores.items()}, []

    def settle(self) -> None:
        settle(self.network)

    def export(self, scores: Mapping[str, float], shown: int) -> Path:
        config = self.config
        start = config.start_from
        card = {
            "hash": AttributeScorer(self.network).hash,
            "terms": config.terms,
            "provenance": {
                "method": "tasks.training.assets.attributes",
                "images_shown": shown,
                "settings": card_settings(config, ()) | {"start_from": start and Path(start).name},
            },
            "scores": rounded_scores(scores),
        }
        return save_encoder(self.network, Path(config.out) / "attributes.safetensors", card)

    # ------------------------------------------------------------------ inside

    def _losses(
        self, images: Float[Tensor, "N 3 H W"], labels: Mapping[str, Float[Tensor, " N"]]
    ) -> dict[str, Float[Tensor, " N"]]:
        with self.autocast():
            ages, others = self.network(images)
        ages, others = ages.float(), others.float()
        target = age_distribution(labels["age"], self.network.ages, self.config.age_spread)
        spread = F.kl_div(ages.log_softmax(1), target, reduction="none").sum(1)
        off = (self.network.expected_age(ages) - labels["age"]).abs()
        wanted = torch.stack([labels["gender"], labels["smile"]], 1)
        others = F.binary_cross_entropy_with_logits(others, wanted, reduction="none")
        return {"age": spread + off / 10, "gender": others[:, 0], "smile": others[:, 1]}


fit = AttributesObjective.fit


def age_distribution(
    ages: Float[Tensor, " N"], centres: Float[Tensor, " A"], spread: float
) -> Float[Tensor, "N A"]:
    """A normal distribution around each label, on the bins; rows sum to 1."""
    distance = (ages[:, None] - centres) / spread
    return (-0.5 * distance.square()).softmax(1)


@torch.no_grad()
def attribute_scores(
    network: AttributeNetwork, pictures: LabelledPictures, device: str
) -> dict[str, float]:
    """Age: mean absolute error in years and correlation; gender: accuracy; smile: area under the
    curve against a pseudo-label above 0.5, and rank correlation with it."""
    found: list[list[Tensor]] = []
    for part in pictures.pictures.split(64):
        ages, others = network(to_images(part, device))
        found.append([network.expected_age(ages).cpu(), *others.cpu().unbind(1)])
    age, gender, smile = (torch.cat(column) for column in zip(*found, strict=True))
    labels = pictures.labels
    ranks: Any = spearmanr(smile, labels["smile"])
    return {
        "age_mae": float((age - labels["age"]).abs().mean()),
        "age_mae_of_the_mean": float((labels["age"].mean() - labels["age"]).abs().mean()),
        "age_correlation": correlation(age, labels["age"]),
        "gender_accuracy": float(((gender > 0) == (labels["gender"] > 0.5)).float().mean()),
        "smile_auc": area_under_curve(smile, labels["smile"] > 0.5),
        "smile_rank_correlation": float(ranks.statistic),
    }


def area_under_curve(scores: Float[Tensor, " M"], is_positive: Tensor) -> float:
    """Chance that a positive scores above a negative, ties counting half; NaN without both."""
    a, b = scores[is_positive][:, None], scores[~is_positive]
    return float(((a > b).double() + 0.5 * (a == b)).mean())


def correlation(a: Float[Tensor, " M"], b: Float[Tensor, " M"]) -> float:
    """Pearson's."""
    return float(torch.corrcoef(torch.stack([a, b]).double())[0, 1])


def _complete(pictures: LabelledPictures, paths: tuple[str, ...]) -> LabelledPictures:
    missing = [name for name, values in pictures.labels.items() if values.isnan().any()]
    if missing:
        raise AssetError(
            f"training data {list(paths)}: pictures without {', '.join(missing)}; expected the "
            "columns age, gender and smile_prob in every file"
        )
    return pictures


def _adopt_trunk(network: AttributeNetwork, source: str) -> None:
    path = asset_path("trunk", "trunk.safetensors") if source == "bundled" else source
    trunk, card = load_trunk(path)
    if trunk.architecture != network.trunk.architecture:
        raise AssetError(
            f"start_from {source}: its trunk has widths {card['architecture']['widths']} and "
            f"depths {card['architecture']['depths']}, this network "
            f"{network.trunk.architecture.to_dict()}; choose another or None"
        )
    network.trunk.load_state_dict(trunk.state_dict())
