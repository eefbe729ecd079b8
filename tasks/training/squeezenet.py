"""SqueezeNet v1.1 with ImageNet weights (MIT), read from a file and never shipped.

It teaches the perceptual trunk, judges what no loss of a training has seen by it, and may be the
eyes of a generator's second discriminator.

Legend: N batch, C channels, H W image.
"""

from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor, nn

from models.errors import AssetError
from models.losses.torchvision_shim import ensure_torchvision

TAPS = (1, 4, 7, 9, 10, 11, 12)
"""Modules whose outputs LPIPS compares."""
WIDTHS = (64, 128, 256, 384, 384, 512, 512)
"""C of each."""
MEAN = (103.939, 116.779, 123.68)
"""Caffe's mean of blue, green, red in 0..255."""


class SqueezeNet(nn.Module):
    """The network up to its last fire module, frozen, on pictures in [-1, 1].

    Args:
        path: safetensors file in torchvision's names (Caffe input scaling).

    Raises:
        AssetError: the file is missing or holds another network.
    """

    mean: Tensor

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        ensure_torchvision()
        from torchvision.models import squeezenet1_1

        if not Path(path).is_file():
            raise AssetError(
                f"SqueezeNet: {path} is missing; give its v1.1 features as safetensors in "
                "torchvision's names"
            )
        net = squeezenet1_1(weights=None)
        try:
            state = {k.removeprefix("features."): v for k, v in load_file(path).items()}
            net.features.load_state_dict(state)
        except RuntimeError as error:
            raise AssetError(f"{path} is not SqueezeNet v1.1: {error}") from error
        self.layers = net.features
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None])
        self.eval().requires_grad_(False)

    def forward(self, images: Float[Tensor, "N 3 H W"]) -> list[Float[Tensor, "N C h w"]]:
        """Unit-normalised features of `TAPS`, finest first."""
        x = (images.flip(1) + 1) * 127.5 - self.mean
        taps = []
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index in TAPS:
                taps.append(x * torch.rsqrt(x.square().sum(1, keepdim=True) + 1e-10))
        return taps
