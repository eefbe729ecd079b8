"""CLCAE's two towers: pictures and codes of one generator in one space (arXiv 2211.11448).

The image tower sees a picture minus the picture of the mean code, the latent tower a code minus the
mean code; both end in a projection whose output has norm 1. InfoNCE pulls a picture and its own
code together and every other pair of the batch apart.

The published latent tower is a transformer on a sequence of one token. A softmax over one key is 1,
so queries, keys and the position vector added to them never act, and self-attention is the linear
map `out_proj(v_proj(.))` of the token. It is stored here as that one map.

Legend: N batch, D w_dim, M more negatives, C H W image.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from models.encoders.checkpoint import Kinds
from models.encoders.psp import EncoderArchitecture, GradualStyleEncoder, TrunkSizes

TEMPERATURE = 0.07
"""At the start of training; it is learned."""


@dataclass(frozen=True, kw_only=True)
class ContrastiveArchitecture(TrunkSizes):
    """Sizes of both towers. The defaults are the published ones.

    Attributes:
        w_dim: dimension of w, D; of the embedding too.
        input_size, width, units, head_width, stem_stride: of the image tower's trunk and its one
            style head, see `TrunkSizes`.
        layers: transformer layers of the latent tower.
        hidden: width inside their feed-forward parts.
    """

    w_dim: int = 512
    kind: Literal["clcae_align"] = "clcae_align"
    layers: int = 3
    hidden: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("layers", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"contrastive {name}: expected >= 1, found {getattr(self, name)}")

    def trunk(self) -> EncoderArchitecture:
        """Of the image tower: an encoder with one row."""
        return EncoderArchitecture(
            num_ws=1,
            w_dim=self.w_dim,
            kind="psp",
            **self.trunk_sizes(),
        )


class TokenLayer(nn.Module):
    """A post-norm transformer layer on one token: its self-attention is a linear map."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.attention = nn.Linear(dim, dim)
        self.linear1, self.linear2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        x = self.norm1(x + self.attention(x))
        return self.norm2(x + self.linear2(F.relu(self.linear1(x))))


class ContrastiveTowers(nn.Module):
    """Embeddings of pictures and of codes, and the learned temperature between them."""

    def __init__(self, architecture: ContrastiveArchitecture) -> None:
        super().__init__()
        self.architecture = arch = architecture
        self.image = GradualStyleEncoder(arch.trunk())
        self.image_projection = _projection(arch.w_dim)
        self.latent = nn.Sequential(
            *(TokenLayer(arch.w_dim, arch.hidden) for _ in range(arch.layers))
        )
        self.latent_projection = _projection(arch.w_dim)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / TEMPERATURE)))

    @property
    def scale(self) -> Tensor:
        """One over the temperature."""
        return self.log_scale.exp()

    def embed_pictures(
        self, pictures: Float[Tensor, "N 3 H W"], average: Float[Tensor, "3 H W"]
    ) -> Float[Tensor, "N D"]:
        """Of pictures in [-1, 1]; `average` is the generator's picture of its mean code."""
        code = self.image(centred(self.image, pictures, average))[:, 0]
        return F.normalize(self.image_projection(code).float(), dim=1)

    def embed_codes(self, offsets: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        """Of codes minus the mean code."""
        return F.normalize(self.latent_projection(self.latent(offsets)).float(), dim=1)


TOWERS: Kinds = {"clcae_align": (ContrastiveArchitecture, ContrastiveTowers)}
"""For `load_network`."""


def centred(
    encoder: Any, pictures: Float[Tensor, "N 3 H W"], average: Float[Tensor, "3 H W"]
) -> Float[Tensor, "N 3 h w"]:
    """Pictures minus the average picture, at the size that the encoder sees."""
    return encoder.resized(pictures) - encoder.resized(average[None].to(pictures))


def info_nce(
    pictures: Float[Tensor, "N D"],
    codes: Float[Tensor, "N D"],
    scale: Tensor | float,
    more_pictures: Float[Tensor, "M D"] | None = None,
    more_codes: Float[Tensor, "M D"] | None = None,
    balance: float = 0.5,
) -> Float[Tensor, " N"]:
    """L_align: cross-entropy of each picture among all codes and of each code among all pictures.

    Row n of `pictures` and row n of `codes` belong together; embeddings have norm 1.

    Args:
        scale: factor of the cosines, one over the temperature.
        more_pictures, more_codes: further negatives.
        balance: share of the pictures' side (lambda, 0.5 as published).
    """
    own = torch.arange(len(pictures), device=pictures.device)
    all_codes = codes if more_codes is None else torch.cat([codes, more_codes])
    all_pictures = pictures if more_pictures is None else torch.cat([pictures, more_pictures])
    of_pictures = F.cross_entropy(scale * pictures @ all_codes.T, own, reduction="none")
    of_codes = F.cross_entropy(scale * codes @ all_pictures.T, own, reduction="none")
    return balance * of_pictures + (1 - balance) * of_codes


def _projection(dim: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(dim, dim, bias=False),
        nn.BatchNorm1d(dim),
        nn.ReLU(),
        nn.Linear(dim, dim, bias=False),
    )
