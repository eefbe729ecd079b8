"""A small discriminator of patches, on the activations of a frozen perceptual trunk.

As Projected GAN (arXiv 2111.01007): the features are given, so that a few references do; the heads
are spectrally normalised and see patches, not faces. Pictures and references are shifted alike
before the trunk (DiffAugment's translation, arXiv 2006.10738).

Legend: B pictures, C channels.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

SHIFT = 1 / 16
"""Largest shift, of the picture's side."""


class PatchDiscriminator(nn.Module):
    """A head of 3x3 and 1x1 convolutions for each scale of the trunk.

    Args:
        widths: C of each scale.
        spread: by scale, what its activations are divided by.
        hidden: channels inside a head.
    """

    def __init__(self, widths: Sequence[int], spread: Sequence[float], hidden: int = 32) -> None:
        super().__init__()
        self.spread = tuple(spread)
        self.heads = nn.ModuleList(
            nn.Sequential(
                spectral_norm(nn.Conv2d(width, hidden, 3)),
                nn.LeakyReLU(0.2),
                spectral_norm(nn.Conv2d(hidden, hidden, 1)),
                nn.LeakyReLU(0.2),
                spectral_norm(nn.Conv2d(hidden, 1, 1)),
            )
            for width in widths
        )

    def forward(self, taps: Sequence[Float[Tensor, "B C h w"]]) -> list[Tensor]:
        """Logits [B 1 h w] of the patches of every scale of 3 px or more; higher is more real."""
        pairs = zip(self.heads, taps, self.spread, strict=True)
        return [head(tap / unit) for head, tap, unit in pairs if min(tap.shape[2:]) >= 3]


def generator_loss(logits: Sequence[Float[Tensor, "B 1 h w"]]) -> Float[Tensor, " B"]:
    """`-D(x)`, mean over places and scales: the hinge loss of the generator."""
    return -torch.stack([part.mean((1, 2, 3)) for part in logits]).mean(0)


def discriminator_loss(
    real: Sequence[Float[Tensor, "B 1 h w"]], fake: Sequence[Float[Tensor, "B 1 h w"]]
) -> Float[Tensor, ""]:
    """`max(0, 1 - D(real)) + max(0, 1 + D(fake))`, mean over places and scales."""
    parts = [F.relu(1 - r).mean() + F.relu(1 + f).mean() for r, f in zip(real, fake, strict=True)]
    return torch.stack(parts).mean()


def shifted(images: Float[Tensor, "B 3 H W"], rng: torch.Generator) -> Float[Tensor, "B 3 H W"]:
    """Every picture moved by up to SHIFT of its side, edges reflected; differentiable."""
    n, _, h, w = images.shape
    pad = max(1, round(SHIFT * h))
    moves = torch.randint(0, 2 * pad + 1, (n, 2), generator=rng).tolist()
    wide = F.pad(images, (pad, pad, pad, pad), mode="reflect")
    return torch.stack([wide[i, :, y : y + h, x : x + w] for i, (y, x) in enumerate(moves)])
