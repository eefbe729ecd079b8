"""Identity similarity: the cosine of two pictures' embeddings by a face recognition network.

Legend: N batch, H W image, S side of the face, K numbers of an embedding.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from models.encoders.checkpoint import check_layout
from models.encoders.irse import IrSe
from models.errors import AssetError
from models.losses.dlib_face import FACE_CHIP, FFHQ_CHIP, find_dlib, load_dlib
from models.stylegan2.generator import weights_hash
from models.torch_file import read_state_dict

FFHQ_CROP = (35, 223, 32, 220)
"""(top, bottom, left, right): what ArcFace sees of an FFHQ-aligned face at 256 px in pSp."""
DLIB = {"dlib": FACE_CHIP, "dlib-ffhq": FFHQ_CHIP}
"""dlib's network by name, with what it sees of faces on our template and on FFHQ's."""


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


@dataclass(frozen=True)
class ArcFaceCrop:
    """pSp's way from an aligned picture to the 112 px that ArcFace sees.

    Sizes other than 256 px are averaged (larger) or interpolated (smaller) to 256, cropped to
    `box`, and averaged to 112 px.
    """

    box: tuple[int, int, int, int] = FFHQ_CROP

    def __call__(self, images: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N 3 112 112"]:
        if images.shape[2] > 256:
            images = F.adaptive_avg_pool2d(images, 256)
        elif images.shape[2] < 256:
            images = F.interpolate(images, size=(256, 256), mode="bilinear", align_corners=False)
        top, bottom, left, right = self.box
        return F.adaptive_avg_pool2d(images[:, :, top:bottom, left:right], 112)


class Identity(nn.Module):
    """Cosine of the embeddings of two faces; 1 for the same picture, higher is better.

    Attributes:
        name: the column name, "identity".
        hash: sha256 over the network's weights.
        network: faces of the side that it knows to embeddings of unit length.
        view: aligned pictures [N 3 H W] in [-1, 1] to such faces [N 3 S S].
    """

    name = "identity"

    def __init__(
        self, network: nn.Module, view: Callable[[Tensor], Tensor] = ArcFaceCrop()
    ) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.view = view
        self.hash = weights_hash(network)

    def features(self, images: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N K"]:
        """Unit embeddings of square faces in [-1, 1]."""
        return self.network(self.view(images))

    def compare(self, a: Float[Tensor, "N K"], b: Float[Tensor, "N K"]) -> Float[Tensor, " N"]:
        """Cosine of two results of `features`."""
        return (a * b).sum(1)

    def forward(
        self, a: Float[Tensor, "N 3 H W"], b: Float[Tensor, "N 3 H W"]
    ) -> Float[Tensor, " N"]:
        """Similarity of pictures in [-1, 1], row by row; the loss is 1 - similarity."""
        return self.compare(self.features(a), self.features(b))


def load_identity(source: str | Path) -> Identity:
    """A face recognition network by name or file; float32, frozen, on the CPU.

    Args:
        source: "dlib" or "dlib-ffhq": dlib's network from the installed package
            `face_recognition_models`, for faces on the bundled generators' template or on FFHQ's;
            a file with the same weights (.dat of dlib, or .safetensors of
            `python -m models.losses.dlib_face`), for the bundled template; any other file: ArcFace
            IR-SE50 in the official key names (`model_ir_se50.pth`), which sees pSp's crop of an
            FFHQ-aligned face. Nothing in a file is executed.

    Raises:
        AssetError: missing, unreadable, or another network; the message names what differs.
    """
    if source in DLIB:
        return Identity(load_dlib(find_dlib()), DLIB[str(source)])
    path = Path(source)
    if not path.is_file():
        raise AssetError(
            f"identity {path}: no such file; give dlib's face network ({', '.join(DLIB)}, or its "
            "file), the ArcFace IR-SE50 weights (model_ir_se50.pth of the pSp or e4e project), or "
            "leave `identity` unset"
        )
    if path.suffix in (".dat", ".safetensors"):
        return Identity(load_dlib(path), FACE_CHIP)
    return Identity(_load_arcface(path))


def _load_arcface(path: Path) -> ArcFace:
    state = read_state_dict(path, f"identity {path}: expected model_ir_se50.pth or dlib's .dat")
    with torch.device("meta"):
        network = ArcFace()
    check_layout(state, network.state_dict(), f"identity {path}: not ArcFace's IR-SE50")
    network.load_state_dict(state, assign=True)
    return network.float()
