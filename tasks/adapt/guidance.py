"""What pulls one domain towards its target, and what holds it to the source pictures.

Legend: B pictures of a batch, D an embedding, C channels, H W image, M references.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from models.adaptation.adversary import (
    PatchDiscriminator,
    discriminator_loss,
    generator_loss,
    shifted,
)
from models.adaptation.clip_losses import (
    direction_loss,
    in_domain_loss,
    reference_loss,
    set_direction,
    within_loss,
)
from models.adaptation.distribution import ReferenceTaps, sliced_distance
from models.losses.clip_direction import Embeds, text_direction
from models.losses.identity import Identity
from models.losses.trunk import PerceptualTrunk, tap_distance, unit_normalise
from tasks.adapt.config import CLIP_TERMS, TERMS, DomainConfig

CONTENT_SCALES = slice(2, None)
"""Scales of the trunk that the content term compares: a quarter of the size and coarser. Strokes
and colours of pixels are the style's."""
SHAPE_SCALES = slice(1, None)
"""Scales whose activations say how alike two pictures are, in the in-domain term."""


@dataclass(kw_only=True)
class Judges:
    """The frozen networks that the losses need, shared by all domains.

    Attributes:
        clips: with weights; empty where no domain needs one.
    """

    trunk: PerceptualTrunk
    clips: Sequence[tuple[Embeds, float]] = ()
    identity: Identity | None = None


@dataclass(kw_only=True)
class Seen:
    """Pictures and what the judges make of them: computed once for all domains, then sliced.

    Attributes:
        taps: activations of the trunk, finest first.
        embeddings: of every CLIP.
        faces: of the identity network, where there is one.
    """

    images: Float[Tensor, "B 3 H W"]
    taps: list[Tensor]
    embeddings: list[Tensor]
    faces: Tensor | None = None

    def __getitem__(self, rows: slice) -> "Seen":
        return Seen(
            images=self.images[rows],
            taps=[tap[rows] for tap in self.taps],
            embeddings=[e[rows] for e in self.embeddings],
            faces=None if self.faces is None else self.faces[rows],
        )


@dataclass(kw_only=True)
class Reference:
    """One reference picture and its own code in the source (image guidance)."""

    image: Float[Tensor, "1 3 H W"]
    w_plus: Float[Tensor, "1 L D"]
    seen: Seen
    inverted: Seen


class Guide:
    """The loss of one domain. It owns what depends on the domain alone: its target directions, its
    references' activations, its discriminator and its stream of random numbers.

    Args:
        references: [M 3 H W] of `image` and `images`, else None.
        source: generated source pictures, where a set of pictures has a direction.
        reference: the inverted reference of `image`.
        rng: the domain's own stream, on the CPU.

    Raises:
        ConfigError: there is no direction from source to target.
    """

    def __init__(
        self,
        domain: DomainConfig,
        judges: Judges,
        references: Float[Tensor, "M 3 H W"] | None,
        source: Seen | None,
        reference: Reference | None,
        rng: torch.Generator,
    ) -> None:
        self.domain, self.judges, self.rng = domain, judges, rng
        self.references, self.reference = references, reference
        self.terms = [term for term in TERMS if domain.weight(term)]
        self.directions = self._directions(source) if "direction" in self.terms else []
        self.taps: ReferenceTaps | None = None
        self.critic: PatchDiscriminator | None = None
        if references is not None and {"distribution", "adversarial"} & set(self.terms):
            with torch.no_grad():
                self.taps = ReferenceTaps.of(_units(judges.trunk(references)))
        if "adversarial" in self.terms:
            self._make_critic()

    def _directions(self, source: Seen | None) -> list[Float[Tensor, " D"]]:
        domain, found = self.domain, []
        for index, (clip, _) in enumerate(self.judges.clips):
            if domain.guidance == "text":
                way = text_direction(clip, domain.source_text, domain.target_text, domain.templates)
            else:
                assert self.references is not None
                assert source is not None
                with torch.no_grad():
                    own = torch.cat([clip.images(part) for part in self.references.split(32)])
                way = set_direction(own, source.embeddings[index], clip.name)
            found.append(way)
        return found

    def _make_critic(self) -> None:
        assert self.taps is not None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31, (1,), generator=self.rng)))
            widths = self.judges.trunk.architecture.widths
            self.critic = PatchDiscriminator(widths, self.taps.spread)
        assert self.references is not None
        self.critic.to(self.references.device)
        self.critic_adam = torch.optim.Adam(self.critic.parameters(), lr=2e-3, betas=(0.0, 0.99))

    # ------------------------------------------------------------------ the loss

    def losses(
        self,
        after: Seen,
        before: Seen,
        own: Seen | None,
        rng: torch.Generator,
        *,
        is_training: bool,
    ) -> dict[str, Float[Tensor, " B"]]:
        """Every term with its weight in it, by picture.

        Args:
            after, before: adapted pictures and their sources.
            own: the reference's code rendered in the new domain (image guidance).
            rng: where lines, places and shifts come from.
            is_training: False leaves out the adversarial term, which is no score.
        """
        found: dict[str, Tensor] = {}
        for term in self.terms:
            if term == "adversarial":
                if is_training:
                    found[term] = self._adversarial(after.images, rng)
            elif term in ("direction", "across", "within", "reference_clip"):
                found[term] = self._by_clip(term, after, before, own)
            elif term in ("reference_mse", "reference_perceptual"):
                found[term] = self._to_reference(term, own).expand(len(after.images))
            elif term == "distribution":
                assert self.taps is not None
                found[term] = sliced_distance(_units(after.taps), [self.taps], rng)[0]
            else:
                found[term] = self._kept(term, after, before)
        return {term: self.domain.weight(term) * value for term, value in found.items()}

    def _by_clip(
        self, term: str, after: Seen, before: Seen, own: Seen | None
    ) -> Float[Tensor, " B"]:
        """Sum over CLIPs of weight times term."""
        parts = []
        for index, (_, weight) in enumerate(self.judges.clips):
            a, b = after.embeddings[index], before.embeddings[index]
            if term == "direction":
                value = direction_loss(a, b, self.directions[index][None])
            else:
                assert self.reference is not None
                target = self.reference.seen.embeddings[index]
                inverted = self.reference.inverted.embeddings[index]
                if term == "across":
                    value = direction_loss(a, b, target - inverted)
                elif term == "within":
                    value = within_loss(a, b, target, inverted)
                else:
                    assert own is not None
                    value = reference_loss(own.embeddings[index], target).expand(len(a))
            parts.append(weight * value)
        return torch.stack(parts).sum(0)

    def _to_reference(self, term: str, own: Seen | None) -> Float[Tensor, " 1"]:
        assert own is not None
        assert self.reference is not None
        if term == "reference_mse":
            return (own.images - self.reference.image).square().mean((1, 2, 3))
        return tap_distance(_units(own.taps), _units(self.reference.seen.taps))

    def _kept(self, term: str, after: Seen, before: Seen) -> Float[Tensor, " B"]:
        """What is preserved: differences between pictures, coarse content, identity."""
        if term == "in_domain":
            value = in_domain_loss(_shape(after.taps), _shape(before.taps))
            if not set(self.terms) & set(CLIP_TERMS):
                return value  # a CLIP that is there for another domain has no say
            for index, (_, weight) in enumerate(self.judges.clips):
                a, b = after.embeddings[index], before.embeddings[index]
                value = value + weight * in_domain_loss(a, b)
            return value
        if term == "identity":
            assert self.judges.identity is not None
            assert after.faces is not None
            assert before.faces is not None
            return 1 - self.judges.identity.compare(after.faces, before.faces)
        return tap_distance(_units(after.taps[CONTENT_SCALES]), _units(before.taps[CONTENT_SCALES]))

    # ------------------------------------------------------------------ the critic

    def _adversarial(
        self, images: Float[Tensor, "B 3 H W"], rng: torch.Generator
    ) -> Float[Tensor, " B"]:
        """One update of the discriminator, then its verdict on the adapted pictures."""
        assert self.critic is not None
        assert self.references is not None
        fake = _units(self.judges.trunk(shifted(images, rng)))
        rows = torch.randint(len(self.references), (len(images),), generator=rng)
        real_images = self.references[rows.to(images.device)]
        is_mirrored = torch.rand(len(rows), generator=rng) < 0.5
        real_images[is_mirrored] = real_images[is_mirrored].flip(3)
        with torch.no_grad():
            real = _units(self.judges.trunk(shifted(real_images, rng)))
        verdict = discriminator_loss(self.critic(real), self.critic([t.detach() for t in fake]))
        self.critic_adam.zero_grad()
        verdict.backward()
        self.critic_adam.step()
        self.critic.requires_grad_(False)
        loss = generator_loss(self.critic(fake))
        self.critic.requires_grad_(True)
        return loss

    def state(self) -> dict[str, object]:
        """What a resumed job must find again."""
        found: dict[str, object] = {"rng": self.rng.get_state()}
        if self.critic is not None:
            found |= {"critic": self.critic.state_dict(), "adam": self.critic_adam.state_dict()}
        return found

    def restore(self, state: dict) -> None:
        self.rng.set_state(state["rng"])
        if self.critic is not None:
            self.critic.load_state_dict(state["critic"])
            self.critic_adam.load_state_dict(state["adam"])


def _units(taps: Sequence[Float[Tensor, "B C h w"]]) -> list[Tensor]:
    """Channel-normalised activations. Compared as they are, a distribution is mostly contrast, and
    noise in flat places costs nothing; normalised, flat places count as much as edges do."""
    return [unit_normalise(tap) for tap in taps]


def _shape(taps: Sequence[Float[Tensor, "B C h w"]]) -> Float[Tensor, "B D"]:
    """Unit vectors whose products are the mean cosine of two pictures over places and scales."""
    chosen = taps[SHAPE_SCALES]
    parts = [unit_normalise(t).flatten(1) / (t.shape[2] * t.shape[3]) ** 0.5 for t in chosen]
    return torch.cat(parts, 1) / len(chosen) ** 0.5


def look(
    images: Float[Tensor, "B 3 H W"], clip_images: Float[Tensor, "B 3 H W"], judges: Judges
) -> Seen:
    """What the judges make of pictures.

    Args:
        clip_images: the same, as CLIP shall see them.
    """
    size = (256, 256) if images.shape[2] > 256 else None
    small = images if size is None else F.adaptive_avg_pool2d(images, size)
    return Seen(
        images=images,
        taps=judges.trunk(small),
        embeddings=[clip.images(clip_images) for clip, _ in judges.clips],
        faces=None if judges.identity is None else judges.identity.features(images),
    )
