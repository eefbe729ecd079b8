"""Identity similarity: the cosine of ArcFace embeddings of two pictures.

Legend: N batch, H W image.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from models.encoders.checkpoint import check_layout
from models.encoders.irse import IrSe
from models.errors import AssetError
from models.stylegan2.generator import weights_hash

FFHQ_CROP = (35, 223, 32, 220)
"""(top, bottom, left, right): what ArcFace sees of an FFHQ-aligned face at 256 px in pSp."""


class ArcFace(IrSe):
    """IR-SE50 with ArcFace's embedding head; official key names (`model_ir_se50.pth`)."""

    def __init__(self) -> None:
        super().__init__()
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(512),
            nn.Dropout(0.6),
            nn.Flatten(),
            nn.Linear(512 * 7 * 7, 512),
            nn.BatchNorm1d(512),
        )

    def forward(self, face: Float[Tensor, "N 3 112 112"]) -> Float[Tensor, "N 512"]:
        """Embeddings of unit length."""
        return F.normalize(self.output_layer(self.stages(face)[-1]), dim=1)


class Identity(nn.Module):
    """Cosine of the ArcFace embeddings of two pictures; 1 for the same picture, higher is better.

    Attributes:
        name: the column name, "identity".
        hash: sha256 over the network's weights.
        crop: (top, bottom, left, right) at 256 px, the part of the picture that ArcFace sees.
    """

    name = "identity"

    def __init__(self, network: nn.Module, crop: tuple[int, int, int, int] = FFHQ_CROP) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.crop = crop
        self.hash = weights_hash(network)

    def features(self, images: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N K"]:
        """Unit embeddings of square faces in [-1, 1].

        Sizes other than 256 px are averaged (larger) or interpolated (smaller) to 256, cropped, and
        averaged to 112 px, as in pSp's identity loss.
        """
        if images.shape[2] > 256:
            images = F.adaptive_avg_pool2d(images, 256)
        elif images.shape[2] < 256:
            images = F.interpolate(images, size=(256, 256), mode="bilinear", align_corners=False)
        top, bottom, left, right = self.crop
        return self.network(F.adaptive_avg_pool2d(images[:, :, top:bottom, left:right], 112))

    def compare(self, a: Float[Tensor, "N K"], b: Float[Tensor, "N K"]) -> Float[Tensor, " N"]:
        """Cosine of two results of `features`."""
        return (a * b).sum(1)

    def forward(
        self, a: Float[Tensor, "N 3 H W"], b: Float[Tensor, "N 3 H W"]
    ) -> Float[Tensor, " N"]:
        """Similarity of pictures in [-1, 1], row by row; the loss is 1 - similarity."""
        return self.compare(self.features(a), self.features(b))


def load_identity(path: str | Path, crop: tuple[int, int, int, int] = FFHQ_CROP) -> Identity:
    """ArcFace IR-SE50 from a weights file in the official key names; float32, frozen, on the CPU.

    Args:
        path: a state dict saved by torch (`model_ir_se50.pth`). Nothing in it is executed.
        crop: part of the picture at 256 px; the default suits FFHQ-aligned faces.

    Raises:
        AssetError: missing, unreadable, or another network; the message names what differs.
    """
    path = Path(path)
    if not path.is_file():
        raise AssetError(
            f"identity {path}: no such file; give the ArcFace IR-SE50 weights (model_ir_se50.pth "
            f"of the pSp or e4e project) or leave `identity` unset"
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is not its own
        raise AssetError(f"identity {path}: cannot read as a torch state dict: {error}") from error
    if not isinstance(state, dict):
        raise AssetError(
            f"identity {path}: expected a state dict of IR-SE50, found {type(state).__name__}"
        )
    with torch.device("meta"):
        network = ArcFace()
    check_layout(state, network.state_dict(), f"identity {path}: not ArcFace's IR-SE50")
    network.load_state_dict(state, assign=True)
    return Identity(network.float(), crop)
