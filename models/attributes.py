"""Age, gender and smile of aligned faces, measured on pictures: what an edit changed.

A small convolutional network, smooth everywhere, so that a small change of a picture changes its
numbers a little. It learned from labels of photographs; age labels are estimates, smiles are
another network's. Nothing here says who somebody is.

Legend: N pictures, A age bins, C channels, H W image, S the network's side in px.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from models.checkpoints.bundled import asset_path
from models.encoders.checkpoint import Kinds, load_network
from models.errors import AssetError
from models.losses.trunk import PerceptualTrunk, TrunkArchitecture
from models.stylegan2.generator import weights_hash

NAMES = ("age", "gender", "smile")
BUNDLED = ("faces64", "attributes.safetensors")


@dataclass(frozen=True, kw_only=True)
class AttributeArchitecture:
    """Sizes of the network.

    Attributes:
        input_size: side of the pictures it sees, px.
        widths, depths: of its trunk, see `TrunkArchitecture`.
        hidden: width of the layer between trunk and answers.
        ages: centres of the age bins, years; the age is their mean under the network's softmax.
    """

    kind: Literal["attributes"] = "attributes"
    input_size: int = 64
    widths: Sequence[int] = (16, 48, 64, 96, 128)
    depths: Sequence[int] = (1, 1, 2, 2, 2)
    hidden: int = 96
    ages: Sequence[int] = tuple(range(10, 101, 5))

    def __post_init__(self) -> None:
        for name in ("widths", "depths", "ages"):
            object.__setattr__(self, name, tuple(int(value) for value in getattr(self, name)))
        if len(self.ages) < 2 or list(self.ages) != sorted(set(self.ages)):
            raise ValueError(f"attributes: expected rising ages, found {self.ages}")
        if self.input_size % 2 ** (len(self.widths) - 1):
            raise ValueError(
                f"attributes input_size: expected a multiple of {2 ** (len(self.widths) - 1)}, "
                f"found {self.input_size}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready values."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


class AttributeNetwork(nn.Module):
    """The perceptual trunk's layers with answers: a softmax over ages (arXiv 1505.00496 calls its
    mean the expected value), a logit of gender and one of a smile.

    Places are kept up to the answers, since the faces are aligned.
    """

    ages: Tensor

    def __init__(self, architecture: AttributeArchitecture, dropout: float = 0.0) -> None:
        super().__init__()
        self.architecture = arch = architecture
        self.trunk = PerceptualTrunk(TrunkArchitecture(widths=arch.widths, depths=arch.depths))
        side = arch.input_size >> (len(arch.widths) - 1)
        self.hidden = nn.Linear(side * side * sum(arch.widths[-2:]), arch.hidden)
        self.dropout = nn.Dropout(dropout)
        self.answers = nn.Linear(arch.hidden, len(arch.ages) + 2)
        self.register_buffer("ages", torch.tensor(arch.ages).float(), persistent=False)

    def forward(
        self, images: Float[Tensor, "N 3 S S"]
    ) -> tuple[Float[Tensor, "N A"], Float[Tensor, "N 2"]]:
        """Logits of the age bins, and of female and smiling, for pictures in [-1, 1]."""
        *_, fine, coarse = self.trunk(images)
        features = torch.cat([F.avg_pool2d(fine, 2), coarse], 1).flatten(1)
        answers = self.answers(self.dropout(F.silu(self.hidden(self.dropout(features)))))
        return answers[:, :-2], answers[:, -2:]

    def expected_age(self, logits: Float[Tensor, "N A"]) -> Float[Tensor, " N"]:
        """Mean of the bins' centres under the softmax, years."""
        return logits.softmax(1) @ self.ages


ATTRIBUTE_NETWORKS: Kinds = {"attributes": (AttributeArchitecture, AttributeNetwork)}
"""For `load_network`."""


class AttributeScorer(nn.Module):
    """Numbers of pictures of any size; frozen, differentiable.

    Attributes:
        names: of what it measures.
        hash: sha256 over the weights.
    """

    names: tuple[str, ...] = NAMES

    def __init__(self, network: AttributeNetwork) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.hash = weights_hash(network)

    def forward(self, images: Float[Tensor, "N 3 H W"]) -> dict[str, Float[Tensor, " N"]]:
        """Of aligned faces in [-1, 1]: "age" in years, "gender" and "smile" as the probabilities,
        0..1, of a female and of a smiling face."""
        found = self.logits(images)
        return {name: x if name == "age" else x.sigmoid() for name, x in found.items()}

    def logits(self, images: Float[Tensor, "N 3 H W"]) -> dict[str, Float[Tensor, " N"]]:
        """The same with gender and smile as logits, which do not saturate: what a comparison of
        strong edits wants."""
        side = self.network.architecture.input_size
        images = images.float()
        if images.shape[2:] != (side, side):
            images = F.interpolate(
                images, (side, side), mode="bicubic", antialias=True, align_corners=False
            )
        ages, others = self.network(images.clamp(-1, 1))
        return {
            "age": self.network.expected_age(ages),
            "gender": others[:, 0],
            "smile": others[:, 1],
        }


def load_attributes(source: str = "auto") -> AttributeScorer:
    """A scorer ready to measure: float32, frozen, on the CPU.

    Args:
        source: "auto", the bundled one for faces aligned as faces64's; or a file that
            `refinery train attributes` wrote.

    Raises:
        AssetError: missing, damaged, or another kind of network.
    """
    path = asset_path(*BUNDLED) if source == "auto" else Path(source)
    if not path.is_file():
        raise AssetError(
            f'attributes {path}: no such file; set "auto" for the bundled scorer, or train one '
            "with `refinery train attributes`"
        )
    network, _, _ = load_network(path, ATTRIBUTE_NETWORKS)
    return AttributeScorer(network)
