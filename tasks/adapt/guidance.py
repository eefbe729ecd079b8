"""What pulls one domain towards its target, and what holds it to the source pictures.

Legend: B pictures of a batch, V views of each, D an embedding, T tokens, C channels, H W image,
M references.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from models.adaptation.clip_losses import set_direction
from models.adaptation.distribution import PatchBasis, ReferenceTaps, recoloured
from models.errors import ConfigError
from models.losses.clip_direction import Embeds, text_direction
from models.losses.identity import Identity
from models.losses.trunk import PerceptualTrunk
from tasks.adapt.config import DomainConfig
from tasks.adapt.critic import Critic
from tasks.adapt.terms import TERMS, Scene, Scenes, styles

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Judges:
    """The frozen networks that the losses need, shared by all domains.

    Attributes:
        clips: with weights; empty where no domain needs one.
        reads_tokens: whether a domain looks at the tokens of the CLIPs.
    """

    trunk: PerceptualTrunk
    clips: Sequence[tuple[Embeds, float]] = ()
    identity: Identity | None = None
    reads_tokens: bool = False


@dataclass(kw_only=True)
class Seen:
    """Pictures and what the judges make of them: computed once for all domains, then sliced.

    Attributes:
        taps: activations of the trunk, finest first.
        embeddings: of every CLIP, [V B D]; the first view is of the whole picture.
        tokens: of every CLIP, where a domain looks at them: [B T D] of the whole picture.
        faces: of the identity network, where there is one.
    """

    images: Float[Tensor, "B 3 H W"]
    taps: list[Tensor]
    embeddings: list[Tensor]
    tokens: list[Tensor] = field(default_factory=list)
    faces: Tensor | None = None

    def __getitem__(self, rows: slice) -> "Seen":
        return Seen(
            images=self.images[rows],
            taps=[tap[rows] for tap in self.taps],
            embeddings=[e[:, rows] for e in self.embeddings],
            tokens=[t[rows] for t in self.tokens],
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
        source: generated source pictures, where a set of pictures has a direction or is recoloured.
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
        self.source, self.reference = source, reference
        if references is not None and domain.colour < 1:
            assert source is not None
            references = recoloured(references, source.images).lerp(references, domain.colour)
        self.references = references
        self.terms = {name: term for name, term in TERMS.items() if domain.weight(name)}
        self.uses_clip = any("clip" in term.needs for term in self.terms.values())
        if "direction" in self.terms:
            _ = self.directions  # says at once where there is none
        self.critic: Critic | None = None
        if "adversarial" in self.terms:
            self.critic = Critic(judges.trunk, self.pictures, rng)

    # ------------------------------------------------------------------ what it stands on

    @property
    def one(self) -> Reference:
        assert self.reference is not None
        return self.reference

    @property
    def pictures(self) -> Float[Tensor, "M 3 H W"]:
        assert self.references is not None
        return self.references

    @cached_property
    def directions(self) -> list[Float[Tensor, "1 1 D"]]:
        """From source to target, in every CLIP."""
        domain, found = self.domain, []
        for index, (clip, _) in enumerate(self.judges.clips):
            if domain.guidance == "text":
                check_words(domain, clip)
                way = text_direction(clip, domain.source_text, domain.target_text, domain.templates)
            else:
                assert self.source is not None
                own = self._over_references(clip.images)
                way = set_direction(own, self.source.embeddings[index][0], clip.name)
            found.append(way[None, None])
        return found

    @cached_property
    def tokens(self) -> list[Float[Tensor, "M T D"]]:
        return [self._over_references(clip.tokens) for clip, _ in self.judges.clips]

    @cached_property
    @torch.no_grad()
    def taps(self) -> ReferenceTaps:
        return ReferenceTaps.of(styles(self.judges.trunk(self.pictures)))

    @cached_property
    def patches(self) -> ReferenceTaps:
        return ReferenceTaps.of(self.basis.taps(self.pictures))

    @cached_property
    def basis(self) -> PatchBasis:
        return PatchBasis.of(self.pictures)

    @torch.no_grad()
    def _over_references(self, network: "object") -> Tensor:
        return torch.cat([network(part) for part in self.pictures.split(32)])  # type: ignore[operator]

    # ------------------------------------------------------------------ the loss

    def losses(
        self,
        after: Seen,
        before: Seen,
        own: Seen | None,
        rng: torch.Generator,
        *,
        is_training: bool,
        known: Mapping[str, Float[Tensor, " B"]] = MappingProxyType({}),
    ) -> dict[str, Float[Tensor, " B"]]:
        """Every term with its weight in it, by picture.

        Args:
            after, before: adapted pictures and their sources.
            own: the reference's code rendered in the new domain (image guidance).
            rng: where lines, places and shifts come from.
            is_training: False leaves out the terms that are no scores.
            known: terms that were computed for all domains (`joint_terms`).
        """
        scene = Scene(after=after, before=before, own=own, guide=self, rng=rng)
        return {
            name: self.domain.weight(name)
            * (known[name] if name in known else term.loss(scene).expand(len(after.images)))
            for name, term in self.terms.items()
            if is_training or term.is_score
        }

    def state(self) -> dict[str, object]:
        """What a resumed job must find again."""
        found: dict[str, object] = {"rng": self.rng.get_state()}
        return found if self.critic is None else found | self.critic.state()

    def restore(self, state: dict[str, Any]) -> None:
        self.rng.set_state(state["rng"])
        if self.critic is not None:
            self.critic.restore(state)


def joint_terms(
    guides: Sequence[Guide], after: Seen, before: Seen
) -> list[dict[str, Float[Tensor, " B"]]]:
    """Of each domain the terms that all of them have and that have a joint form, without weights.

    Args:
        after: the adapted pictures of all domains, one domain after the other.
    """
    scenes = Scenes(after=after, before=before, guides=guides)
    shared = [
        (name, term.joint(scenes))
        for name, term in TERMS.items()
        if term.joint and all(name in guide.terms for guide in guides)
    ]
    return [{name: values[at] for name, values in shared} for at in range(len(guides))]


def check_words(domain: DomainConfig, clip: Embeds) -> None:
    """Tell which words a CLIP does not know, and refuse them where they carry the style: where the
    target says them and the source does not.

    Raises:
        ConfigError: names the words and what the CLIP knows in their place.
    """
    shared = clip.ignored(domain.source_text)
    carrying = clip.ignored(domain.target_text) - shared
    if carrying:
        known = ", ".join(sorted(getattr(clip, "known_words", None) or ()))
        raise ConfigError(
            f"{domain.name}: target_text {domain.target_text!r}: CLIP {clip.name} does not know "
            f"{', '.join(sorted(carrying))}, so the style would be another; it knows {known}. Use "
            "these words, or a CLIP that reads any text "
            "(clips.0.source=openai/clip-vit-base-patch32)"
        )
    if shared:
        logger.warning(
            "%s: CLIP %s does not know %s: the texts are read without",
            domain.name,
            clip.name,
            ", ".join(sorted(shared)),
        )


def look(
    images: Float[Tensor, "B 3 H W"], views: Sequence[Float[Tensor, "B 3 H W"]], judges: Judges
) -> Seen:
    """What the judges make of pictures.

    Args:
        views: the same, as CLIP shall see them; the first shows the whole picture.
    """
    size = (256, 256) if images.shape[2] > 256 else None
    small = images if size is None else F.adaptive_avg_pool2d(images, size)
    shown, count = torch.cat(list(views)), len(images)
    clips = [clip for clip, _ in judges.clips]
    return Seen(
        images=images,
        taps=[tap.float() for tap in judges.trunk(small)],
        embeddings=[clip.images(shown).float().unflatten(0, (-1, count)) for clip in clips],
        tokens=[clip.tokens(views[0]).float() for clip in clips] if judges.reads_tokens else [],
        faces=None if judges.identity is None else judges.identity.features(images),
    )
