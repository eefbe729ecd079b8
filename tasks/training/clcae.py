"""CLCAE, stage 2: the encoder to w, w+ and the map F (arXiv 2211.11448).

Three renders of each picture are compared with it: G(w), G(w+), and G(w+, f). f is kept near the
activation that it replaces, and w near its picture by the frozen towers of stage 1, whose
negatives come from a memory, so that a small batch will do.

Legend: N batch, L num_ws, D w_dim, M memory, H W image.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from models.checkpoints.load import load_generator
from models.encoders.checkpoint import load_network
from models.encoders.clcae import FEATURE_LAYER, ClcaeArchitecture, ClcaeEncoder
from models.encoders.contrastive import TOWERS, ContrastiveTowers, info_nce
from models.errors import AssetError, ConfigError
from models.inversion.base import Inversion
from models.optim import Ranger
from models.statistics import statistics_for
from models.stylegan2.generator import Generator, weights_hash
from tasks.training.blocks import (
    LOSS_SIZE,
    card_settings,
    descend,
    example_edit,
    for_losses,
    prepared,
    rounded_scores,
    save_with_page,
    settle,
    started_from,
)
from tasks.training.clcae_align import adopt, encoder_state
from tasks.training.losses import PictureLosses
from tasks.training.schedules import annealed
from tasks.training.trainer import PRECISIONS, Objective, TrainingConfig, set_up, train


@dataclass(frozen=True, kw_only=True)
class FitClcaeConfig(TrainingConfig):
    """Settings of one CLCAE training run. The defaults suit a 64 px generator on a CPU."""

    generator: str
    """A bundled name or a checkpoint file; it stays as it is."""

    width: int = 24
    """Channels of the first stage, 64 in the published encoder."""
    units: tuple[int, int, int, int] = (2, 2, 2, 2)
    """Residual units of the stages, (3, 4, 14, 3) in the published encoder."""
    head_width: int = 64
    """Channels inside the style heads, 512 in the published encoder. At 64, as in the e4e encoder
    of our own, its heads can be taken over."""
    stem_stride: int = 2
    """1 in the published encoder; 2 saves the convolutions at full size."""
    hidden: int = 8
    """Width inside the rows' blocks, 1024 in the published encoder."""
    feature_hidden: int = 48
    """The same inside the map's block."""
    feature_width: int = 64
    """Channels between the convolutions that make f, 512 in the published encoder."""
    attention: Literal["one", "folded", "all"] = "folded"
    """See `ClcaeArchitecture`: "all" is real attention."""
    form: Literal["norm", "residual"] = "residual"
    """See `ClcaeArchitecture`: "norm" as released."""
    feature_slope: float = 0.2
    """Of the activation of f: the generator's, so that f reaches every value which it replaces;
    0.01 as published."""
    is_centred: bool = True
    """Take the picture of the mean code off the input, as published. Choose False for a run that
    starts from an e4e encoder, which saw whole pictures."""
    start_from: str | None = None
    """File of an e4e encoder or of the towers of stage 1: trunk, pyramid and every head whose shape
    agrees are taken from it. Published: the stage 1 tower."""

    learning_rate: float = 3e-3
    """Ranger's; 1e-4 as published, for a run many times as long."""
    anneal: float = 0.4
    """Share of the run, at its end, in which the rate falls to 0 along a cosine."""
    feature_ramp: float = 0.1
    """Share of the run over which f takes the activation's place; the published ramp starts again
    with every epoch."""

    mse_weight: float = 1.0
    perceptual_weight: float = 0.2
    perceptual: str = "auto"
    """Name for `load_perceptual`, or "none"."""
    identity: str | None = None
    """File of ArcFace weights for the identity loss."""
    identity_weight: float = 0.1
    feature_weight: float = 0.01
    """Of the squared distance of f to the generator's own activation."""
    w_share: float = 1.0
    """Share of each batch for which G(w) is rendered too; 1 as published, less is quicker."""

    align: str | None = None
    """File of the towers of stage 1; without it there is no alignment loss."""
    align_weight: float = 0.1
    align_target: Literal["input", "render"] = "input"
    """What w is aligned with: "input" as in the paper, the picture itself; "render" as in the
    released code, G(w), among the pictures of the batch alone."""
    align_memory: int = 256
    """Pairs kept from earlier steps as further negatives."""

    terms: str = "as the training data's"
    """For the card: on what terms the weights may be used."""

    def __post_init__(self) -> None:
        TrainingConfig.__post_init__(self)
        if not self.learning_rate > 0:
            raise ConfigError(f"learning_rate must be > 0, got {self.learning_rate}")
        for name in ("anneal", "feature_ramp", "w_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be in 0..1, got {getattr(self, name)}")
        if self.align_target not in ("input", "render"):
            raise ConfigError(
                f'align_target: expected "input" or "render", found {self.align_target!r}'
            )
        if self.batch < 2:
            raise ConfigError(f"batch must be >= 2, got {self.batch}")
        if self.align_memory < 0:
            raise ConfigError(f"align_memory must be >= 0, got {self.align_memory}")


def fit(config: FitClcaeConfig) -> Path:
    """Train until `config.images` were shown, resuming from `<out>/checkpoint.pt`.

    Returns:
        `<out>/clcae.safetensors` (half precision, its card beside it), or the checkpoint where the
        time limit came first.

    Raises:
        AssetError: no generator, pictures or towers, or a checkpoint of another run.
    """
    set_up(config)
    return train(ClcaeObjective(config, load_generator(config.generator)), config)


class PairMemory:
    """The last embedded pairs, as negatives for the next ones.

    Args:
        size: M, pairs kept.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.pictures: Tensor | None = None
        self.codes: Tensor | None = None

    def add(self, pictures: Float[Tensor, "N D"], codes: Float[Tensor, "N D"]) -> None:
        """Remember a batch in place of the oldest."""
        self.pictures = self._appended(self.pictures, pictures)
        self.codes = self._appended(self.codes, codes)

    def state_dict(self) -> dict[str, Tensor]:
        if self.pictures is None or self.codes is None:
            return {}
        return {"pictures": self.pictures, "codes": self.codes}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.pictures, self.codes = state.get("pictures"), state.get("codes")

    def _appended(self, old: Tensor | None, new: Tensor) -> Tensor:
        new = new.detach()
        joined = new if old is None else torch.cat([old.to(new.device), new])
        return joined[max(len(joined) - self.size, 0) :]


class ClcaeObjective(Objective):
    """The encoder, its optimiser, and the memory of negatives."""

    def __init__(self, config: FitClcaeConfig, generator: Generator) -> None:
        self.config, self.dtype = config, PRECISIONS[config.precision]
        self.generator_hash = weights_hash(generator)
        statistics = statistics_for(generator)
        self.edit = example_edit(generator)
        self.generator = prepared(generator, config.device, self.dtype)
        self.resolution = min(generator.resolution, LOSS_SIZE)
        self.average = for_losses(statistics.average_image[None])[0].to(config.device)
        self.architecture = ClcaeArchitecture(
            num_ws=generator.num_ws,
            w_dim=generator.w_dim,
            input_size=self.resolution,
            width=config.width,
            units=config.units,
            head_width=config.head_width,
            stem_stride=config.stem_stride,
            hidden=config.hidden,
            feature_hidden=config.feature_hidden,
            feature_width=config.feature_width,
            feature_channels=generator.conv(FEATURE_LAYER - 1).conv.weight.shape[1],
            feature_slope=config.feature_slope,
            attention=config.attention,
            form=config.form,
            is_centred=config.is_centred,
        )
        encoder = ClcaeEncoder(self.architecture)
        if config.start_from:
            adopt(encoder, _own_names(encoder_state(config.start_from)), config.start_from)
        self.encoder = encoder.to(config.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = Ranger(self.encoder.parameters(), lr=config.learning_rate)
        self.towers = _load_towers(config, self.generator_hash)
        self.memory = PairMemory(config.align_memory)
        self.losses = PictureLosses.of(config, self.dtype)
        self.parts = {
            "encoder": self.encoder,
            "optimizer": self.optimizer,
            "memory": self.memory,
        }
        self.identity = {
            "architecture": self.architecture.to_dict(),
            "generator_hash": self.generator_hash,
            "batch": config.batch,
        }

    # ------------------------------------------------------------------ one update

    def step(self, pictures: Float[Tensor, "N 3 H W"], shown: int) -> dict[str, Tensor]:
        config = self.config
        share = shown / config.images
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * annealed(share, config.anneal)
        w, w_plus, features = self._encode(pictures)
        renders, activation = self._renders(w, w_plus, features, share)
        total, logged = self._picture_losses(renders, pictures)
        logged["feature"] = F.mse_loss(features, activation.detach())
        total = total + config.feature_weight * logged["feature"]
        if self.towers is not None:
            aligned = self._align(pictures, w, renders["w"])
            logged["align"] = aligned
            total = total + config.align_weight * aligned.mean()
        descend(total, list(self.encoder.parameters()), self.optimizer)
        return logged

    def _renders(
        self, w: Tensor, w_plus: Tensor, features: Tensor, share: float
    ) -> tuple[dict[str, Float[Tensor, "_ 3 H W"]], Tensor]:
        """G(w+, f), G(w+), G(w) of the first rows, and the activation of G(w+) that f replaces."""
        count = round(len(w) * self.config.w_share)
        pivots = w[:count, None].expand(-1, self.generator.num_ws, -1)
        captured: list[Tensor] = []
        hook = self.generator.conv(FEATURE_LAYER - 1).register_forward_hook(
            lambda _m, _i, out: captured.append(out)  # pyright: ignore
        )
        try:
            plain = self._render(torch.cat([pivots, w_plus]), "random")
        finally:
            hook.remove()
        activation = captured[0][count:].float()
        scale = min(share / self.config.feature_ramp, 1.0) if self.config.feature_ramp else 1.0
        blended = features if scale == 1 else activation.lerp(features, scale)
        full = self._render(w_plus, "random", {FEATURE_LAYER: blended})
        return {"full": full, "w_plus": plain[count:], "w": plain[:count]}, activation

    def _picture_losses(
        self, renders: Mapping[str, Tensor], pictures: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        total, logged = torch.zeros((), device=pictures.device), {}
        for which, images in renders.items():
            if len(images):
                table = self.losses(images, pictures[: len(images)])
                total = total + self.losses.total(table)
                suffix = "" if which == "full" else f"_{which}"
                logged |= {name + suffix: value.detach() for name, value in table.items()}
        return total, logged

    def _align(self, pictures: Tensor, w: Tensor, renders: Tensor) -> Float[Tensor, " N"]:
        """L_align of w; gradients reach the encoder through the frozen towers."""
        assert self.towers is not None
        codes = self.towers.embed_codes(w - self.generator.latent_avg)
        if self.config.align_target == "render":
            images = self.towers.embed_pictures(renders, self.average)
            return info_nce(images, codes[: len(images)], self.towers.scale)
        with torch.no_grad():
            images = self.towers.embed_pictures(pictures, self.average)
        memory = self.memory
        loss = info_nce(images, codes, self.towers.scale, memory.pictures, memory.codes)
        memory.add(images, codes)
        return loss

    def _encode(self, pictures: Float[Tensor, "N 3 H W"]) -> tuple[Tensor, Tensor, Tensor]:
        """w [N D] and w+ [N L D], absolute, and f."""
        with torch.autocast(pictures.device.type, self.dtype, enabled=self.dtype is not None):
            pictures = pictures.contiguous(memory_format=torch.channels_last)
            base, rows, features = self.encoder(pictures, self.average)
        average = self.generator.latent_avg
        return average + base, average + rows, features.float()

    def _render(
        self, w_plus: Tensor, noise: Any, features: Mapping[int, Tensor] | None = None
    ) -> Float[Tensor, "N 3 H W"]:
        return for_losses(self.generator.synthesis(w_plus, noise, features))

    # ------------------------------------------------------------------ scores and export

    @torch.no_grad()
    def score(self, pictures: Float[Tensor, "N 3 H W"]) -> tuple[dict[str, Tensor], list[Tensor]]:
        """The columns are G(w+, f), G(w+) and an edit."""
        self.encoder.eval()
        w, w_plus, features = self._encode(pictures)
        self.encoder.train()
        found = Inversion(w_plus=w_plus, features={FEATURE_LAYER: features})
        edited = found.edited(self.generator, w_plus + self.edit.to(w_plus))
        render, plain, moved = (
            for_losses(x.render(self.generator)) for x in (found, Inversion(w_plus=w_plus), edited)
        )
        scores = self.losses.scores(render, pictures)
        pivot = self._render(w[:, None].expand_as(w_plus), "const")
        for name, images in (("mse_w", pivot), ("mse_w_plus", plain)):
            scores[name] = (images - pictures).square().mean((1, 2, 3))
        return scores, [render, plain, moved]

    def settle(self) -> None:
        self.dtype = self.losses.dtype = self.generator.compute_dtype = None
        settle(self.encoder)

    def export(self, scores: Mapping[str, float], shown: int) -> Path:
        config = self.config
        card = {
            "generator_hash": self.generator_hash,
            "terms": config.terms,
            "provenance": {
                "method": "CLCAE (arXiv 2211.11448), tasks.training.clcae",
                "generator": Path(config.generator).stem,
                "images_shown": shown,
                "perceptual": self.losses.perceptual_name,
                **started_from(config.start_from),
                "settings": card_settings(config, ("generator", "identity", "start_from", "align")),
            },
            "scores": rounded_scores(scores),
        }
        return save_with_page(self.encoder, Path(config.out) / "clcae.safetensors", card)


def _own_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An e4e encoder's tensors under CLCAE's names: its first head is apart from the others."""
    renamed = {}
    for name, value in state.items():
        group, _, rest = name.partition(".")
        index, _, tail = rest.partition(".")
        if group == "styles" and index != "0":
            name = f"styles_others.{int(index) - 1}.{tail}"
        renamed[name] = value
    return renamed


def _load_towers(config: FitClcaeConfig, generator_hash: str) -> ContrastiveTowers | None:
    """The frozen towers, where they are asked for.

    Raises:
        AssetError: missing, damaged, or of another generator.
    """
    if config.align is None or not config.align_weight:
        return None
    towers, _, card = load_network(config.align, TOWERS)
    if card.get("generator_hash") != generator_hash:
        raise AssetError(
            f"align {config.align}: its towers belong to generator {card.get('generator_hash')}, "
            f"this run's is {generator_hash}: train them with `refinery train clcae-align`"
        )
    return towers.to(config.device, memory_format=torch.channels_last)
