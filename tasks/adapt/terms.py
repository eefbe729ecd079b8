"""The loss terms of an adaptation, a table of small functions: a new term is one entry of `TERMS`.

Terms that stand on nothing random are computed for all domains in one program; the twin, domain by
domain, is what a test holds it against.

Legend: G domains, B pictures of a batch, V views of each, D an embedding.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from models.adaptation.clip_losses import (
    direction_loss,
    in_domain_loss,
    reference_loss,
    relaxed_transport,
    within_loss,
)
from models.adaptation.distribution import placed, sliced_distance
from models.losses.trunk import tap_distance, unit_normalise

if TYPE_CHECKING:
    from tasks.adapt.guidance import Guide, Seen

Guidance = Literal["text", "image", "images"]
Need = Literal["clip", "target", "reference", "references", "identity"]
"""What a term stands on: a CLIP, a direction in its space, one reference with a code of its own,
reference pictures, an identity network."""
GIVEN: Mapping[str, frozenset[Need]] = {
    "text": frozenset({"clip", "target", "identity"}),
    "image": frozenset({"clip", "reference", "references", "identity"}),
    "images": frozenset({"clip", "target", "references", "identity"}),
}
"""What a guidance has."""
CONTENT_SCALES = slice(2, None)
"""Scales of the trunk that the content term compares: a quarter of the size and coarser. Strokes
and colours of pixels are the style's."""
STYLE_SCALES = slice(0, 3)
"""Scales that are compared with references and that the critic sees: down to a quarter of the size.
Coarser ones know where a face has its nose, and would move it."""
SHAPE_SCALES = slice(1, None)
"""Scales whose activations say how alike two pictures are, in the in-domain term."""


@dataclass(kw_only=True)
class Scene:
    """What a term looks at: adapted pictures, their sources, and what the domain stands on.

    Attributes:
        own: the reference's code rendered in the new domain, where there is one.
        rng: where lines, places and shifts come from.
    """

    after: "Seen"
    before: "Seen"
    own: "Seen | None"
    guide: "Guide"
    rng: torch.Generator

    @property
    def found(self) -> "Seen":
        assert self.own is not None
        return self.own

    def over_clips(self, value: Callable[[int], Float[Tensor, " B"]]) -> Float[Tensor, " B"]:
        """Sum over CLIPs of weight times value."""
        weights = [weight for _, weight in self.guide.judges.clips]
        return torch.stack([w * value(index) for index, w in enumerate(weights)]).sum(0)


@dataclass(kw_only=True)
class Scenes:
    """The same of several domains, whose pictures stand one after the other in `after`; all have
    the sources in common."""

    after: "Seen"
    before: "Seen"
    guides: Sequence["Guide"]

    def grouped(self, value: Float[Tensor, "_ ..."]) -> Float[Tensor, "G B ..."]:
        return value.unflatten(0, (len(self.guides), -1))

    def over_clips(self, value: Callable[[int], Float[Tensor, "G B"]]) -> Float[Tensor, "G B"]:
        """As `Scene.over_clips`."""
        weights = [weight for _, weight in self.guides[0].judges.clips]
        return torch.stack([w * value(index) for index, w in enumerate(weights)]).sum(0)


@dataclass(frozen=True, kw_only=True)
class Term:
    """One loss.

    Attributes:
        loss: [B], or [1] where it is the same for all pictures.
        joint: the same of several domains at once, where it can be.
        weights: by guidance, where a domain does not set its own; 0 elsewhere.
        needs: what must be given for it.
        is_pull: whether it pulls towards the domain; others hold to the source.
        is_score: False for a term that is no measure of the result.
    """

    loss: Callable[[Scene], Float[Tensor, " _"]]
    joint: Callable[[Scenes], Float[Tensor, "G B"]] | None = None
    needs: frozenset[Need] = frozenset()
    weights: Mapping[str, float] = field(default_factory=dict)
    is_pull: bool = True
    is_score: bool = True

    def fits(self, guidance: str) -> bool:
        return self.needs <= GIVEN[guidance]


def _direction(scene: Scene) -> Float[Tensor, " B"]:
    """StyleGAN-NADA, over the views of each picture."""
    a, b, ways = scene.after, scene.before, scene.guide.directions
    return scene.over_clips(
        lambda i: direction_loss(a.embeddings[i], b.embeddings[i], ways[i]).mean(0)
    )


def _direction_joint(scenes: Scenes) -> Float[Tensor, "G B"]:
    a, b = scenes.after, scenes.before

    def value(index: int) -> Float[Tensor, "G B"]:
        after = torch.stack([scenes.grouped(view) for view in a.embeddings[index]])  # [V G B D]
        before = b.embeddings[index][:, None].expand_as(after)
        ways = torch.cat([guide.directions[index] for guide in scenes.guides])  # [G 1 D]
        return direction_loss(after, before, ways.expand(len(after), -1, -1, -1)).mean(0)

    return scenes.over_clips(value)


def _across(scene: Scene) -> Float[Tensor, " B"]:
    a, b, reference = scene.after, scene.before, scene.guide.one
    wanted = [
        seen - inverted
        for seen, inverted in zip(
            reference.seen.embeddings, reference.inverted.embeddings, strict=True
        )
    ]
    return scene.over_clips(
        lambda i: direction_loss(a.embeddings[i], b.embeddings[i], wanted[i]).mean(0)
    )


def _within(scene: Scene) -> Float[Tensor, " B"]:
    a, b, reference = scene.after, scene.before, scene.guide.one
    return scene.over_clips(
        lambda i: within_loss(
            a.embeddings[i][0],
            b.embeddings[i][0],
            reference.seen.embeddings[i][0],
            reference.inverted.embeddings[i][0],
        )
    )


def _reference_clip(scene: Scene) -> Float[Tensor, " 1"]:
    own, wanted = scene.found.embeddings, scene.guide.one.seen.embeddings
    return scene.over_clips(lambda i: reference_loss(own[i][0], wanted[i][0]))


def _reference_mse(scene: Scene) -> Float[Tensor, " 1"]:
    return (scene.found.images - scene.guide.one.image).square().mean((1, 2, 3))


def _reference_perceptual(scene: Scene) -> Float[Tensor, " 1"]:
    return tap_distance(units(scene.found.taps), units(scene.guide.one.seen.taps))


def _tokens(scene: Scene) -> Float[Tensor, " B"]:
    """DiFa's local term: tokens of the vision tower against those of references."""
    a, count = scene.after, len(scene.after.images)
    wanted = scene.guide.tokens
    rows = torch.randint(len(wanted[0]), (count,), generator=scene.rng)
    return scene.over_clips(lambda i: relaxed_transport(a.tokens[i], wanted[i][rows]))


def _distribution(scene: Scene) -> Float[Tensor, " B"]:
    return sliced_distance(styles(scene.after.taps), [scene.guide.taps], scene.rng)[0]


def _patches(scene: Scene) -> Float[Tensor, " B"]:
    taps = scene.guide.basis.taps(scene.after.images)
    return sliced_distance(taps, [scene.guide.patches], scene.rng)[0]


def _adversarial(scene: Scene) -> Float[Tensor, " B"]:
    assert scene.guide.critic is not None
    return scene.guide.critic.verdict(scene.after.images, scene.rng)


def _in_domain(scene: Scene) -> Float[Tensor, " B"]:
    """Differences between pictures stay, in the trunk and in the CLIPs that the domain uses."""
    a, b = scene.after, scene.before
    value = in_domain_loss(_shape(a), _shape(b))
    if scene.guide.uses_clip:  # a CLIP that is there for another domain has no say
        value = value + scene.over_clips(
            lambda i: in_domain_loss(a.embeddings[i][0], b.embeddings[i][0])
        )
    return value


def _in_domain_joint(scenes: Scenes) -> Float[Tensor, "G B"]:
    a, b = scenes.after, scenes.before

    def change(after: Float[Tensor, "_ D"], before: Float[Tensor, "B D"]) -> Tensor:
        after = scenes.grouped(after)
        return in_domain_loss(after, before.expand_as(after))

    value = change(_shape(a), _shape(b))
    uses = [guide.uses_clip for guide in scenes.guides]
    if any(uses):
        seen = scenes.over_clips(lambda i: change(a.embeddings[i][0], b.embeddings[i][0]))
        value = torch.where(torch.tensor(uses, device=value.device)[:, None], value + seen, value)
    return value


def _content(scene: Scene) -> Float[Tensor, " B"]:
    a, b = scene.after.taps[CONTENT_SCALES], scene.before.taps[CONTENT_SCALES]
    return tap_distance(units(a), units(b))


def _content_joint(scenes: Scenes) -> Float[Tensor, "G B"]:
    a, b = units(scenes.after.taps[CONTENT_SCALES]), units(scenes.before.taps[CONTENT_SCALES])
    repeated = [tap.repeat(len(scenes.guides), 1, 1, 1) for tap in b]
    return scenes.grouped(tap_distance(a, repeated))


def _identity(scene: Scene) -> Float[Tensor, " B"]:
    network, a, b = scene.guide.judges.identity, scene.after.faces, scene.before.faces
    assert network is not None
    assert a is not None
    assert b is not None
    return 1 - network.compare(a, b)


TERMS: Mapping[str, Term] = {
    "direction": Term(
        loss=_direction,
        joint=_direction_joint,
        needs=frozenset({"clip", "target"}),
        weights={"text": 1.0},
    ),
    "across": Term(loss=_across, needs=frozenset({"clip", "reference"}), weights={"image": 1.0}),
    "within": Term(loss=_within, needs=frozenset({"clip", "reference"}), weights={"image": 0.5}),
    "reference_clip": Term(
        loss=_reference_clip, needs=frozenset({"clip", "reference"}), weights={"image": 30.0}
    ),
    "reference_mse": Term(
        loss=_reference_mse, needs=frozenset({"reference"}), weights={"image": 10.0}
    ),
    "reference_perceptual": Term(
        loss=_reference_perceptual, needs=frozenset({"reference"}), weights={"image": 10.0}
    ),
    "tokens": Term(loss=_tokens, needs=frozenset({"clip", "references"}), weights={"image": 1.0}),
    "distribution": Term(
        loss=_distribution, needs=frozenset({"references"}), weights={"images": 1.0}
    ),
    "patches": Term(
        loss=_patches, needs=frozenset({"references"}), weights={"image": 0.5, "images": 1.0}
    ),
    "adversarial": Term(
        loss=_adversarial, needs=frozenset({"references"}), is_score=False, weights={"images": 0.1}
    ),
    "in_domain": Term(
        loss=_in_domain,
        joint=_in_domain_joint,
        is_pull=False,
        weights={"text": 1.0, "images": 1.0},
    ),
    "content": Term(
        loss=_content,
        joint=_content_joint,
        is_pull=False,
        weights={"text": 0.05, "image": 0.05, "images": 0.1},
    ),
    "identity": Term(loss=_identity, is_pull=False, needs=frozenset({"identity"})),
}
"""By name. `image` has Mind the Gap's weights (arXiv 2110.08398); the others are chosen here
(docs/adaptation.md)."""


def units(taps: list[Float[Tensor, "B C h w"]]) -> list[Tensor]:
    """Channel-normalised activations. Compared as they are, a distribution is mostly contrast, and
    noise in flat places costs nothing; normalised, flat places count as much as edges do."""
    return [unit_normalise(tap) for tap in taps]


def styles(taps: list[Float[Tensor, "B C h w"]]) -> list[Tensor]:
    """What is compared with references: normalised activations of the fine scales, and where."""
    return placed(units(taps[STYLE_SCALES]))


def _shape(seen: "Seen") -> Float[Tensor, "B D"]:
    """Unit vectors whose products are the mean cosine of two pictures over places and scales."""
    chosen = seen.taps[SHAPE_SCALES]
    parts = [unit_normalise(t).flatten(1) / (t.shape[2] * t.shape[3]) ** 0.5 for t in chosen]
    return torch.cat(parts, 1) / len(chosen) ** 0.5
