"""Train a pyramid encoder: e4e, pSp, a W encoder, LSAP or Cycle Encoding, by one objective.

Losses and schedule of e4e (arXiv 2102.02766): MSE + perceptual + identity on the render, a penalty
on the offsets, a latent discriminator, and offsets that open row by row. pSp (arXiv 2008.00951) has
neither offsets nor discriminator; LSAP (arXiv 2209.12746) aligns the styles instead; Cycle Encoding
(arXiv 2207.09367) closes the offsets again, so that its codes end in W. Two additions for short
runs: a learning rate that falls at the end, and, as an option, pictures drawn from the generator,
whose codes are known and need no render. The published schedule (300,000 steps) is scaled to the
budget.

Legend: N batch, Y synthetic pictures of it, L num_ws, D w_dim, S open offsets, H W image.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from models.encoders.checkpoint import build_encoder, differing_sizes, load_encoder
from models.encoders.e4e import Encoder4Editing
from models.encoders.latent_discriminator import CodePool, LatentDiscriminator
from models.encoders.psp import EncoderArchitecture, PyramidEncoder
from models.errors import AssetError
from models.inversion.base import SampleRng
from models.inversion.e4e import E4e, E4eConfig
from models.losses.style_space import StyleSpace
from models.stylegan2.generator import Generator
from tasks.training.blocks import adopt, descend, example_edit, for_losses
from tasks.training.encoder_config import FitCycleConfig as FitCycleConfig
from tasks.training.encoder_config import FitEncoderConfig as FitEncoderConfig
from tasks.training.encoder_config import FitLsapConfig as FitLsapConfig
from tasks.training.encoder_config import FitPspConfig as FitPspConfig
from tasks.training.encoder_config import FitRestyleConfig as FitRestyleConfig
from tasks.training.encoder_config import FitWEncoderConfig as FitWEncoderConfig
from tasks.training.losses import code_distance, delta_penalty
from tasks.training.network import InverterObjective
from tasks.training.schedules import progress


class EncoderObjective(InverterObjective[FitEncoderConfig]):
    """Encoder, latent discriminator, their optimisers and pools."""

    paths = (*InverterObjective.paths, "first_stage")

    def __init__(self, config: FitEncoderConfig, generator: Generator) -> None:
        super().__init__(config, generator)
        self.spread, self.edit = self.statistics.w_std, example_edit(generator)
        self.first: E4e | None = None
        if config.first_stage is not None:
            self.first = E4e(generator, E4eConfig(checkpoint=config.first_stage))
        in_channels = 6 if config.sees_render else 3
        self.architecture = self.sized(
            EncoderArchitecture, kind=config.kind, in_channels=in_channels
        )
        network = build_encoder(self.architecture)
        has_corrected = bool(config.start_from) and _start_from(network, config.start_from)
        if self.first is not None and not has_corrected:
            _silence(network)
        self.style_space = StyleSpace(generator, self.statistics.style_anchor)
        self.discriminator = LatentDiscriminator(generator.w_dim).to(config.device)
        self.optimizer_d = torch.optim.Adam(
            self.discriminator.parameters(), lr=config.discriminator_learning_rate
        )
        self.pool_real, self.pool_fake = CodePool(config.pool), CodePool(config.pool)
        identity: dict[str, Any] = {}
        if self.first is not None:
            identity["first_stage"] = self.first.hashes()["e4e"]
        self.trains(
            network,
            parts={
                "discriminator": self.discriminator,
                "optimizer_d": self.optimizer_d,
                "pool_real": self.pool_real,
                "pool_fake": self.pool_fake,
            },
            **identity,
        )

    # ------------------------------------------------------------------ one update

    def step(self, pictures: Float[Tensor, "N 3 H W"], shown: int) -> dict[str, Tensor]:
        share = self.set_rate(shown)
        stage = self._set_stage(share)
        known, drawn = self._draw(self.config.num_synthetic)
        seen = torch.cat([drawn, pictures[len(drawn) :]]) if len(drawn) else pictures
        total, logged, codes = torch.zeros(()), {}, self._mixed(self._first_codes(seen))
        for _ in range(self.config.iterations):
            loss, logged, codes = self._losses(seen, known, codes, share, stage)
            total = total + loss
        descend(total, list(self.network.parameters()), self.optimizer)
        if self.config.adversarial_weight:
            assert codes is not None
            logged |= self._discriminator_step(codes[:, : stage + 1], shown // self.config.batch)
        logged["rows"] = torch.tensor(float(stage + 1))
        return logged

    def _losses(
        self,
        seen: Float[Tensor, "N 3 H W"],
        known: Float[Tensor, "Y L D"],
        guess: Float[Tensor, "N L D"] | None,
        share: float,
        stage: int,
    ) -> tuple[Tensor, dict[str, Tensor], Float[Tensor, "N L D"]]:
        """One pass of the encoder from the codes so far: loss, what to log, the detached codes.

        The first Y pictures are the generator's own, of the codes `known`.
        """
        w, deltas = self._encode(seen, guess)
        w_plus = absolute_codes(w, deltas, self.generator, guess)
        table = self.losses(self._render(w_plus[len(known) :], "random"), seen[len(known) :])
        total = self.losses.total(table)
        logged = {name: value.detach() for name, value in table.items()}
        if len(known):
            logged["code"] = code_distance(w_plus[: len(known)], known, self.spread)
            total = total + self.config.code_weight * logged["code"].mean()
        shrunk = progress(share, self.config.shrink_start, self.config.shrink_end)
        if deltas.shape[1] and self.config.delta_weight:
            offsets = w_plus[:, 1 : stage + 1] - w_plus[:, :1]
            logged["delta"] = delta_penalty(offsets, self.generator.num_ws, self.spread)
            weight = self.config.delta_weight * self.config.delta_growth ** min(shrunk, 1.0)
            total = total + weight * logged["delta"].mean()
        if self.config.nscd_weight:
            rows = stage + 1 if self.config.align_open_rows else None
            logged["alignment"] = self.style_space.loss(w_plus, rows)
            total = total + self.config.nscd_weight * logged["alignment"].mean()
        if self.config.adversarial_weight:
            self.discriminator.requires_grad_(False)
            verdict = self.discriminator(w_plus[:, : stage + 1].flatten(0, 1))
            self.discriminator.requires_grad_(True)
            logged["adversarial"] = F.softplus(-verdict).mean()
            weight = self.config.adversarial_weight * self.config.adversarial_decay**shrunk
            total = total + weight * logged["adversarial"]
        return total, logged, w_plus.detach()

    def _set_stage(self, share: float) -> int:
        """Open the offsets of this moment; how many there are."""
        if not isinstance(self.network, Encoder4Editing):
            return self.architecture.num_ws - 1
        self.network.stage = self.config.open_offsets(share, self.architecture.num_ws)
        return self.network.stage

    def _discriminator_step(self, codes: Float[Tensor, "N S D"], step: int) -> dict[str, Tensor]:
        """One update of the latent discriminator on one open row of every picture."""
        n, rows, _ = codes.shape
        fake = self.pool_fake.query(codes[torch.arange(n), torch.randint(rows, (n,))])
        with torch.no_grad():
            drawn = self.generator.mapping(self._noise(n))[:, 0]
        real = self.pool_real.query(drawn)
        verdict = self.discriminator(torch.cat([fake, real]))
        loss = F.softplus(verdict[:n]).mean() + F.softplus(-verdict[n:]).mean()
        total, logged = loss, {"discriminator": loss}
        if self.config.r1_interval and step % self.config.r1_interval == 0:
            real.requires_grad_(True)
            (gradient,) = torch.autograd.grad(
                self.discriminator(real).sum(), real, create_graph=True
            )
            penalty = gradient.square().sum(1).mean()
            total = total + self.config.r1_gamma / 2 * self.config.r1_interval * penalty
            logged["r1"] = penalty
        descend(total, list(self.discriminator.parameters()), self.optimizer_d)
        return logged

    @torch.no_grad()
    def _draw(self, count: int) -> tuple[Float[Tensor, "Y L D"], Float[Tensor, "Y 3 H W"]]:
        """Codes of the mapping network and their pictures, as a picture file would hold them."""
        if not count:
            return torch.empty(0), torch.empty(0)
        w_plus = self.generator.mapping(self._noise(count))
        return w_plus, self._render(w_plus, "random").clamp(-1, 1)

    def _noise(self, count: int) -> Float[Tensor, "Y Z"]:
        return torch.randn(count, self.generator.z_dim).to(self.config.device)

    def _encode(
        self, pictures: Float[Tensor, "N 3 H W"], guess: Float[Tensor, "N L D"] | None = None
    ) -> tuple[Float[Tensor, "N D"], Float[Tensor, "N S D"]]:
        """w and offsets, or, where the encoder sees its last render too, what to add to them."""
        if self.config.sees_render:
            with torch.no_grad():
                start = self.generator.latent_avg.expand(len(pictures), self.generator.num_ws, -1)
                pictures = torch.cat(
                    [pictures, self._render(start if guess is None else guess, "const")], 1
                )
        with self.autocast():
            x = pictures.contiguous(memory_format=torch.channels_last)
            if isinstance(self.network, Encoder4Editing):
                return self.network.split(x)
            codes = self.network(x)
            # pSp has no offsets; relative to its first row its codes read as if it had.
            return codes[:, 0], codes[:, 1:] - codes[:, :1]

    @torch.no_grad()
    def _first_codes(self, pictures: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N L D"] | None:
        """The first stage's codes; None where the passes begin with the mean code."""
        if self.first is None:
            return None
        return self.first.invert(pictures, None, SampleRng([0] * len(pictures))).w_plus

    def _mixed(self, codes: Float[Tensor, "N L D"] | None) -> Float[Tensor, "N L D"] | None:
        """Codes some way towards those of the picture before, `first_mixed` of it at most."""
        if codes is None or not self.config.first_mixed:
            return codes
        share = self.config.first_mixed * torch.rand(len(codes), 1, 1).to(codes)
        return codes.lerp(codes.roll(1, 0), share)

    def _render(self, w_plus: Tensor, noise: Any) -> Float[Tensor, "N 3 H W"]:
        return for_losses(self.generator.synthesis(w_plus, noise))

    # ------------------------------------------------------------------ scores and export

    @torch.no_grad()
    def score(self, pictures: Float[Tensor, "N 3 H W"]) -> tuple[dict[str, Tensor], list[Tensor]]:
        self.network.eval()
        w_plus = self._first_codes(pictures)
        for _ in range(self.config.iterations):
            w_plus = absolute_codes(*self._encode(pictures, w_plus), self.generator, w_plus)
        assert w_plus is not None
        renders = self._render(w_plus, "const")
        edited = self._render(w_plus + self.edit.to(w_plus), "const")
        self.network.train()
        scores = self.losses.scores(renders, pictures)
        offsets = (w_plus - w_plus[:, :1]).square().sum(2).sqrt().mean(1)
        scores["offset_norm"] = offsets / self.spread
        scores["nscd"] = self.style_space.nscd(w_plus)
        return scores, [renders, edited]

    def settle(self) -> None:
        self._set_stage(1.0)
        super().settle()

    def export(self, scores: Mapping[str, float], shown: int) -> Path:
        method = self.config.method
        space = "w" if self.config.is_in_w else "w_plus"
        kind = self.config.kind
        fields: dict[str, Any] = {"kind": kind, "space": space}
        if self.config.sees_render:
            fields["iterations"] = self.config.iterations
        if "first_stage" in self.identity:
            fields["first_stage_sha256"] = self.identity["first_stage"]
        return self.write(method, f"refinery train {method}", scores, shown, **fields)


fit = EncoderObjective.fit


def absolute_codes(
    w: Float[Tensor, "N D"],
    deltas: Float[Tensor, "N S D"],
    generator: Generator,
    start: Float[Tensor, "N L D"] | None = None,
) -> Float[Tensor, "N L D"]:
    """`start` (latent_avg without one) + w on every row, plus the open offsets on rows 1..S."""
    rest = generator.num_ws - 1 - deltas.shape[1]
    offsets = F.pad(deltas, (0, 0, 1, rest))
    return (generator.latent_avg if start is None else start) + w[:, None] + offsets


def _silence(encoder: PyramidEncoder) -> None:
    """Let every head say zero, whatever it sees."""
    with torch.no_grad():
        for head in encoder.styles:
            for parameter in head.linear.parameters():  # pyright: ignore
                parameter.zero_()


def _start_from(encoder: PyramidEncoder, path: str) -> bool:
    """Take a file's weights; whether its network has seen renders before."""
    arch = encoder.architecture
    loaded = load_encoder(path, arch.num_ws, arch.w_dim).encoder
    may_differ = {"kind"}
    if loaded.architecture.in_channels <= arch.in_channels:
        may_differ.add("in_channels")
    if different := differing_sizes(loaded.architecture, arch, may_differ):
        raise AssetError(f"start_from {path}: {different}; choose another file or its sizes")
    state = loaded.state_dict()
    if loaded.architecture.kind != arch.kind:
        state = {k: v for k, v in state.items() if not k.startswith("styles.")}
    adopt(encoder, state, path)
    return loaded.architecture.kind == arch.kind and loaded.architecture.in_channels > 3
