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

from models.encoders.checkpoint import ENCODERS, load_network
from models.encoders.clcae import CLCAE, FEATURE_LAYER, ClcaeArchitecture, ClcaeEncoder
from models.encoders.contrastive import TOWERS, ContrastiveTowers, info_nce
from models.errors import AssetError
from models.inversion.base import Inversion
from models.settings import Count, CountOrNone, NotNegative, Several, Share
from models.stylegan2.generator import Generator
from tasks.training.blocks import (
    adopt,
    begin_as,
    descend,
    example_edit,
    for_losses,
    random_edits,
    starting_network,
)
from tasks.training.network import InverterConfig, InverterObjective


@dataclass(frozen=True, kw_only=True)
class FitClcaeConfig(InverterConfig):
    """Settings of one CLCAE training run.

    `start_from` takes an e4e encoder or the towers of stage 1 (published: stage 1's tower): trunk,
    pyramid and every head whose shape agrees. At the `head_width` 64 an e4e encoder of our own can
    be taken over. A network of this kind, of the same sizes, is trained further.
    """

    batch: Several = 16

    hidden: Count = 8
    """Width inside the rows' blocks, 1024 in the published encoder."""
    feature_hidden: Count = 48
    """The same inside the map's block."""
    feature_width: Count = 64
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
    feature_ramp: Share = 0.1
    """Share of the run over which f takes the activation's place; the published ramp starts again
    with every epoch."""

    perceptual_weight: NotNegative = 0.2
    feature_weight: NotNegative = 0.01
    """Of the squared distance of f to the generator's own activation."""
    pair_weight: NotNegative = 0.0
    """Of the losses of an edit whose outcome is known: a render of the batch's codes, encoded and
    edited, against the render of the edited codes (after StyleFeatureEditor, arXiv 2406.10601).
    Without it f holds much of what an edit would move."""
    pair_share: Share = 0.5
    """Share of each batch of which pairs are made."""
    w_share: Share = 1.0
    """Share of each batch for which G(w) is rendered too; 1 as published, less is quicker."""

    align: str | None = None
    """File of the towers of stage 1; without it there is no alignment loss."""
    align_weight: NotNegative = 0.1
    align_target: Literal["input", "render"] = "input"
    """What w is aligned with: "input" as in the paper, the picture itself; "render" as in the
    released code, G(w), among the pictures of the batch alone."""
    align_memory: CountOrNone = 256
    """Pairs kept from earlier steps as further negatives."""


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


class ClcaeObjective(InverterObjective[FitClcaeConfig]):
    """The encoder, its optimiser, and the memory of negatives."""

    paths = (*InverterObjective.paths, "align")

    def __init__(self, config: FitClcaeConfig, generator: Generator) -> None:
        super().__init__(config, generator)
        self.edit = example_edit(generator)
        self.average = for_losses(self.statistics.average_image[None])[0].to(config.device)
        self.architecture = self.sized(
            ClcaeArchitecture,
            feature_channels=generator.conv(FEATURE_LAYER - 1).conv.weight.shape[1],
        )
        network = ClcaeEncoder(self.architecture)
        if config.start_from:
            self._start_from(config.start_from, network)
        self.towers = _load_towers(config, self.generator_hash)
        self.memory = PairMemory(config.align_memory)
        self.trains(network, parts={"memory": self.memory})

    def _start_from(self, path: str, network: ClcaeEncoder) -> None:
        """Begin as an encoder of this kind, or with what fits of another or of stage 1's towers."""
        kinds = {**ENCODERS, **TOWERS, **CLCAE}
        found, _ = starting_network(path, kinds, self.generator_hash)
        if isinstance(found, ClcaeEncoder):
            begin_as(network, found, path)
            return
        image = found.image if isinstance(found, ContrastiveTowers) else found
        adopt(network, _own_names(image.state_dict()), path)

    # ------------------------------------------------------------------ one update

    def step(self, pictures: Float[Tensor, "N 3 H W"], shown: int) -> dict[str, Tensor]:
        config, share = self.config, self.set_rate(shown)
        w, w_plus, features = self._encode(pictures)
        renders, activation = self._renders(w, w_plus, features, share)
        total, logged = self._picture_losses(renders, pictures)
        logged["feature"] = F.mse_loss(features, activation.detach())
        total = total + config.feature_weight * logged["feature"]
        if config.pair_weight:
            count = max(round(len(w_plus) * config.pair_share), 1)
            total = total + config.pair_weight * self._pair_losses(w_plus[:count].detach(), logged)
        if self.towers is not None:
            aligned = self._align(pictures, w, renders["w"])
            logged["align"] = aligned
            total = total + config.align_weight * aligned.mean()
        descend(total, list(self.network.parameters()), self.optimizer)
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

    def _pair_losses(self, codes: Float[Tensor, "N L D"], logged: dict[str, Tensor]) -> Tensor:
        """What `Inversion.edited` makes of the encoded G(codes), against G(codes + edit)."""
        edit = random_edits(self.statistics, len(codes)).to(codes)[:, None]
        with torch.no_grad():
            before, after = self._render(torch.cat([codes, codes + edit]), "const").chunk(2)
        _, w_plus, features = self._encode(before)
        found = Inversion(w_plus=w_plus, features={FEATURE_LAYER: features})
        moved = found.edited(self.generator, w_plus + edit)
        table = self.losses(for_losses(moved.render(self.generator)), after)
        logged |= {f"{name}_pair": value.detach() for name, value in table.items()}
        return self.losses.total(table)

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
        with self.autocast():
            pictures = pictures.contiguous(memory_format=torch.channels_last)
            base, rows, features = self.network(pictures, self.average)
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
        self.network.eval()
        w, w_plus, features = self._encode(pictures)
        self.network.train()
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

    def export(self, scores: Mapping[str, float], shown: int) -> Path:
        return self.write("clcae", "CLCAE (arXiv 2211.11448), tasks.training.clcae", scores, shown)


fit = ClcaeObjective.fit


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
