"""The table of losses that encoders train with: each per picture, each with a weight and a name.

Legend: N batch, H W image, L num_ws, D w_dim, S open offsets.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from models.losses.identity import load_identity
from models.losses.perceptual import load_perceptual


class PictureLosses:
    """Distances between renders and pictures: MSE, a perceptual distance, identity.

    Args:
        weights: by row of the table, "mse", "perceptual", "identity"; 0 or absent leaves a row out.
        perceptual: name for `load_perceptual`, or "none".
        identity: name or file for `load_identity`, or None.
        device, dtype: where the networks run, and in which precision (None is float32).
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        perceptual: str = "auto",
        identity: str | None = None,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        self.weights = {name: weight for name, weight in weights.items() if weight}
        if perceptual == "none":
            self.weights.pop("perceptual", None)
        if identity is None:
            self.weights.pop("identity", None)
        self.device_type, self.dtype = torch.device(device).type, dtype
        # The networks by row of the table; each has features(images) and compare(a, b).
        self.networks: dict[str, Any] = {}
        if "perceptual" in self.weights:
            self.networks["perceptual"] = load_perceptual(perceptual)
        if "identity" in self.weights and identity is not None:
            self.networks["identity"] = load_identity(identity)
        for network in self.networks.values():
            network.to(device, memory_format=torch.channels_last)

    @property
    def perceptual_name(self) -> str:
        """The honest name of the perceptual row; "none" without one."""
        network = self.networks.get("perceptual")
        return "none" if network is None else network.name

    def __call__(
        self, renders: Float[Tensor, "N 3 H W"], pictures: Float[Tensor, "N 3 H W"]
    ) -> dict[str, Float[Tensor, " N"]]:
        """Every row of the table; the pictures take no gradient."""
        table: dict[str, Tensor] = {}
        if "mse" in self.weights:
            table["mse"] = (renders - pictures).square().mean((1, 2, 3))
        for name, network in self.networks.items():
            with torch.autocast(self.device_type, self.dtype, enabled=self.dtype is not None):
                with torch.no_grad():
                    wanted = network.features(pictures)
                found = network.features(renders)
            value = network.compare(_float32(found), _float32(wanted))
            table[name] = 1 - value if name == "identity" else value
        return table

    def scores(
        self, renders: Float[Tensor, "N 3 H W"], pictures: Float[Tensor, "N 3 H W"]
    ) -> dict[str, Float[Tensor, " N"]]:
        """The table as metrics: the perceptual row under the name of its distance, identity as the
        cosine that columns of that name hold (the loss is 1 - it)."""
        table = self(renders, pictures)
        if "identity" in table:
            table["identity"] = 1 - table["identity"]
        return {self.perceptual_name if k == "perceptual" else k: v for k, v in table.items()}

    def total(self, table: Mapping[str, Tensor]) -> Tensor:
        """The weighted sum of the means of a table."""
        return torch.stack([self.weights[name] * table[name].mean() for name in table]).sum()


def delta_penalty(
    deltas: Float[Tensor, "N S D"], num_ws: int, spread: float
) -> Float[Tensor, " N"]:
    """e4e's L_delta: norms (not squared) of the offsets, in units that fit every generator.

    The mean over all L - 1 offsets (closed ones are 0) in units of the spread of W. Published is
    2e-4 times the sum of 17 norms for FFHQ at 1024 px, whose W has a spread of about 9: a weight of
    0.03 here.

    Args:
        num_ws: L.
        spread: root mean square distance of W from its mean (`Statistics.w_std`).
    """
    # A new offset may be exactly zero, where the norm itself has no gradient.
    norms = (deltas.square().sum(2) + 1e-12).sqrt()
    return norms.sum(1) / ((num_ws - 1) * spread)


def code_distance(
    found: Float[Tensor, "N L D"], wanted: Float[Tensor, "N L D"], spread: float
) -> Float[Tensor, " N"]:
    """Mean squared distance of codes of generated pictures, in units of the spread of W."""
    return (found - wanted).square().sum(2).mean(1) / spread**2


def _float32(features: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    return features.float() if isinstance(features, Tensor) else [f.float() for f in features]
