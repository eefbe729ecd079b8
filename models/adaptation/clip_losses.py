"""Directions and similarities in CLIP's space that lead a generator into another domain.

Every loss is per picture, and pictures come in groups (one for each domain): [*G B D] unit
embeddings give [*G B]. `after` are the adapted pictures G_B(w), `before` the source's G_A(w).

Sources: StyleGAN-NADA (arXiv 2108.00946), Mind the Gap (arXiv 2110.08398), HyperDomainNet
(arXiv 2210.08884).

Legend: G groups, B pictures of a group, D size of an embedding, T, S tokens, M, K pictures.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from models.errors import ConfigError
from models.losses.clip_direction import SAME

SOFTNESS = 0.05
"""Length below which a difference of unit embeddings counts as short. Differences between a picture
and its adapted version are 0.3 to 1 long, so their cosine is changed by less than 1.5 %."""


def soft_cosine(
    a: Float[Tensor, "*G D"], b: Float[Tensor, "*G D"] | Float[Tensor, " D"]
) -> Float[Tensor, "*G"]:
    """`<a, b> / (sqrt(|a|^2 + SOFTNESS^2) |b|)`: the cosine, with a gradient also at a = 0.

    At the first step an adapted picture equals its source, and the cosine of the zero vector is not
    defined (StyleGAN-NADA perturbs the picture by 1e-6 and takes the gradient of the noise). Here
    it is 0 and its gradient is `b / (SOFTNESS |b|)`: straight along the wanted direction.
    """
    length = (a.square().sum(-1) + SOFTNESS**2).sqrt()
    return (a * F.normalize(b, dim=-1)).sum(-1) / length


def direction_loss(
    after: Float[Tensor, "*G B D"],
    before: Float[Tensor, "*G B D"],
    wanted: Float[Tensor, "*G 1 D"] | Float[Tensor, "*G B D"],
) -> Float[Tensor, "*G B"]:
    """`1 - cos(E(G_B(w)) - E(G_A(w)), wanted)` (StyleGAN-NADA, equation 3).

    Args:
        wanted: `text_direction`, `set_direction`, or E(I_B) - E(G_A(w_B)), the across term of Mind
            the Gap, where I_B is the reference and w_B its inversion.
    """
    return 1 - soft_cosine(after - before, wanted.expand_as(after))


def within_loss(
    after: Float[Tensor, "*G B D"],
    before: Float[Tensor, "*G B D"],
    reference: Float[Tensor, "*G 1 D"],
    inverted: Float[Tensor, "*G 1 D"],
) -> Float[Tensor, "*G B"]:
    """`1 - cos(E(G_B(w)) - E(I_B), E(G_A(w)) - E(G_A(w_B)))`: inside the new domain a picture lies
    from the reference as it lies from the reference's inversion inside the source (Mind the Gap).

    Args:
        reference: embedding of I_B.
        inverted: embedding of G_A(w_B).
    """
    return 1 - soft_cosine(after - reference, before - inverted)


def reference_loss(
    found: Float[Tensor, "*G D"], reference: Float[Tensor, "*G D"]
) -> Float[Tensor, "*G"]:
    """`1 - cos(E(G_B(w_B)), E(I_B))`: the reference's own code renders the reference (ibid.)."""
    return 1 - (found * reference).sum(-1)


def in_domain_loss(
    after: Float[Tensor, "*G B D"], before: Float[Tensor, "*G B D"]
) -> Float[Tensor, "*G B"]:
    """Mean over the other pictures m of `(<a_n, a_m> - <b_n, b_m>)^2`: pictures stay as different
    from each other as their sources are (HyperDomainNet, equation 9; its sum over pairs, by row).

    Args:
        after, before: unit embeddings by any network: CLIP, or a perceptual trunk.
    """
    change = after @ after.transpose(-1, -2) - before @ before.transpose(-1, -2)
    others = max(after.shape[-2] - 1, 1)  # the diagonal is 0
    return change.square().sum(-1) / others


def relaxed_transport(
    tokens: Float[Tensor, "B T D"], wanted: Float[Tensor, "B S D"]
) -> Float[Tensor, " B"]:
    """The relaxed earth mover's distance of two sets of tokens under the cosine distance: the
    larger of the mean distance of each token to the nearest wanted one, and of each wanted one to
    the nearest token (STROTSS, arXiv 1904.12785, equation 5; DiFa, arXiv 2207.08736, for tokens of
    CLIP's vision tower)."""
    cost = 1 - F.normalize(tokens, dim=2) @ F.normalize(wanted, dim=2).transpose(1, 2)
    return torch.maximum(cost.amin(2).mean(1), cost.amin(1).mean(1))


def set_direction(
    references: Float[Tensor, "M D"], source: Float[Tensor, "K D"], name: str
) -> Float[Tensor, " D"]:
    """Unit `mean E_I(references) - mean E_I(source samples)` (StyleGAN-NADA, section 5).

    Args:
        name: of the CLIP, for the message.

    Raises:
        ConfigError: both means are the same.
    """
    change = references.mean(0) - source.mean(0)
    if float(change.norm()) < SAME:
        raise ConfigError(
            f"references: their mean embedding in {name} is that of the generator's own pictures: "
            "there is no direction to follow; give pictures of another domain"
        )
    return F.normalize(change, dim=0)
