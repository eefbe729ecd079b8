"""Whose face it is, and what an edit did to it: the benchmark's judges of faces.

Legend: N pictures, H W image, K numbers of an embedding.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol

from jaxtyping import Float
from torch import Tensor

from models.errors import AssetError
from models.losses.identity import load_identity
from models.losses.sface import load_sface


class FaceNetwork(Protocol):
    """What is needed of `models.losses.identity.Identity`."""

    name: str
    hash: str

    def features(self, images: Float[Tensor, "N 3 H W"]) -> Float[Tensor, "N K"]: ...
    def compare(self, a: Float[Tensor, "N K"], b: Float[Tensor, "N K"]) -> Float[Tensor, " N"]: ...


NETWORKS = {"identity": partial(load_identity, "dlib"), "identity_judge": load_sface}
"""By column. Identity losses may use the first; nothing trains with the second."""


def face_networks() -> tuple[tuple[FaceNetwork, ...], dict[str, str]]:
    """Those whose packages are installed; for each other column, what to install."""
    found: list[Any] = []
    missing = {}
    for name, load in NETWORKS.items():
        try:
            found.append(load())
        except AssetError as error:
            missing[name] = str(error)
    return tuple(found), missing


def attribute_changes(
    before: Mapping[str, Float[Tensor, " N"]], after: Mapping[str, Float[Tensor, " N"]]
) -> dict[str, float]:
    """Mean change of each attribute; of `AttributeScorer.logits`, so age in years and the others in
    logits, which do not saturate where a face smiles already."""
    return {name: float((after[name] - before[name]).mean()) for name in before}
