"""A second discriminator, with the eyes of a network that knows many other pictures.

Vision-aided training (arXiv 2112.09130): small heads on frozen features tell real pictures from
generated ones beside the discriminator that learns from the training pictures alone. The heads are
those of Projected GAN (arXiv 2111.01007).

Legend: N batch, H W image.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from models.adaptation.adversary import PatchDiscriminator
from tasks.training.squeezenet import WIDTHS, SqueezeNet

SCALES = 3
"""Finest taps that it looks at: 64 to 256 channels, at a half to an eighth of the side."""
SIDE = 128
"""Smaller pictures are enlarged to this, px: the features were learned on larger ones."""


class VisionDiscriminator(nn.Module):
    """Frozen features and the heads on them.

    Args:
        path: as of `SqueezeNet`.
        dtype: of the features; None for float32.
    """

    def __init__(self, path: str, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.features, self.dtype = SqueezeNet(path), dtype
        widths = WIDTHS[:SCALES]
        # A unit vector of C channels has values of about C^-1/2.
        self.heads = PatchDiscriminator(widths, [width**-0.5 for width in widths])

    def forward(self, images: Float[Tensor, "N 3 H W"]) -> list[Tensor]:
        """Logits of the patches by scale, for pictures in [-1, 1]; higher is more real."""
        if images.shape[2] < SIDE:
            images = F.interpolate(images, size=(SIDE, SIDE), mode="bilinear")
        with torch.autocast(images.device.type, self.dtype, enabled=self.dtype is not None):
            taps = self.features(images)[:SCALES]
        return self.heads([tap.float() for tap in taps])
