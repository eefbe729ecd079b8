"""The spaces in which samples are compared: what stands for a sample, as one vector.

    w            the mean row of w+                     styles, whatever the layer
    w_plus       all rows of w+                         what the generator is given
    style        normalised styles of every layer       what the generator makes of it: the squared
                                                        distance is twice the mean of 1 - cosine
    clip         CLIP's embedding of the picture        what it shows; can be asked in words
    identity     a face network's embedding             who it shows
    perceptual   mean features of the perceptual net    what it looks like; the same for a mirrored
                 over the picture and its mirror image  copy

The last three are of unit length and of the stored pictures: the input where the run has it, else
the inversion.

Legend: N batch, E values of a vector, H W picture.
"""

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from models.losses.clip import load_clip
from models.losses.identity import load_identity
from models.losses.perceptual import load_perceptual
from models.losses.style_space import StyleSpace
from tasks.work.device import local_copy

SpaceName = Literal["w", "w_plus", "style", "clip", "identity", "perceptual"]
OF_CODES = ("w", "w_plus", "style")
"""Spaces of the codes; the others are of pictures."""


def of_codes(
    space: str, w_plus: Float[Tensor, "N L D"], style_space: StyleSpace
) -> Float[Tensor, "N E"]:
    """Vectors of codes."""
    if space == "w":
        return w_plus.mean(1)
    if space == "w_plus":
        return w_plus.flatten(1)
    styles = style_space.normalised(w_plus)
    return torch.cat(styles, 1) / len(styles) ** 0.5


class PictureSpace:
    """Embeds pictures.

    Args:
        space: "clip", "identity" or "perceptual".
        network: which: `clip`, `identity` or `perceptual` of the job.

    Raises:
        AssetError, ConfigError: the network cannot be loaded.
    """

    def __init__(self, space: str, network: str) -> None:
        load: dict[str, Any] = {
            "clip": load_clip,
            "identity": load_identity,
            "perceptual": load_perceptual,
        }
        self.space = space
        self.network: Any = load[space](local_copy(network))

    @torch.inference_mode()
    def __call__(self, images: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N E"]:
        """Vectors of pictures in [-1, 1]."""
        if self.space == "clip":
            return self.network.images(images)
        if self.space == "identity":
            return self.network.features(images)
        both = [self.network.features(each) for each in (images, images.flip(3))]
        pooled = [torch.cat([tap.mean((2, 3)) for tap in found], 1) for found in both]
        return torch.nn.functional.normalize(pooled[0] + pooled[1], dim=1)
