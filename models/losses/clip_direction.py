"""From one text to another in CLIP's space: what guides a domain and chooses style channels.

Legend: N pictures, M, P prompts, D size of an embedding, T tokens of a picture, W their width.
"""

from collections.abc import Sequence
from typing import Protocol

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from models.errors import ConfigError

SAME = 1e-3
"""Embeddings that are nearer than this say the same."""

TEMPLATES = (
    "{}",
    "a {}",
    "a picture of a {}",
    "an image of a {}",
    "a portrait, {}",
    "a close-up of a {}",
    "a rendering of a {}",
    "a good picture of a {}",
)
"""Prompts that a text is put into, after CLIP's own for ImageNet; none names a medium, because the
text may ("a photo of an oil painting" contradicts itself)."""


class EmbedsTexts(Protocol):
    """Unit embeddings of texts."""

    name: str

    def texts(self, prompts: Sequence[str], /) -> Float[Tensor, "M D"]: ...


class Embeds(EmbedsTexts, Protocol):
    """What is needed of a CLIP: unit embeddings of pictures in [-1, 1] and of texts."""

    hash: str

    def images(self, images: Float[Tensor, "N 3 H W"], /) -> Float[Tensor, "N D"]: ...
    def tokens(self, images: Float[Tensor, "N 3 H W"], /) -> Float[Tensor, "N T W"]: ...
    def ignored(self, text: str, /) -> set[str]: ...


def text_direction(
    clip: EmbedsTexts, source: str, target: str, templates: Sequence[str] = TEMPLATES
) -> Float[Tensor, " D"]:
    """Unit `mean_t E_T(t(target)) - E_T(t(source))` over prompt templates (StyleGAN-NADA,
    arXiv 2108.00946; StyleCLIP, arXiv 2103.17249, section 6).

    Raises:
        ConfigError: a template has no place for the text, or the two have the same embedding: there
            is no way from one to the other.
    """
    wrong = [template for template in templates if "{}" not in template]
    if wrong or not templates:
        raise ConfigError(f"templates: expected texts with {{}} in each, found {wrong or 'none'}")
    both = [clip.texts([t.format(text) for t in templates]).mean(0) for text in (target, source)]
    change = both[0] - both[1]
    if float(change.norm()) < SAME:
        raise ConfigError(
            f"the texts {source!r} and {target!r} have the same embedding in CLIP {clip.name!r}: "
            "it does not tell them apart; use words that it knows"
        )
    return F.normalize(change, dim=0)
