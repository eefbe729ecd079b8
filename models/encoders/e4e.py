"""e4e's encoder: one w, and offsets to it that open row by row (arXiv 2102.02766).

Legend: N batch, L num_ws, D w_dim, C h w feature map, H W image.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from models.encoders.psp import EncoderArchitecture, PyramidEncoder


class Encoder4Editing(PyramidEncoder):
    """w_0 from head 0, w_i = w_0 + delta_i from head i; deltas beyond `stage` are not computed.

    Attributes:
        stage: number of open offsets, 0 (codes in W) to L - 1 (all, the state after construction).
    """

    def __init__(self, architecture: EncoderArchitecture) -> None:
        super().__init__(architecture)
        self.stage = architecture.num_ws - 1

    def forward(self, image: Float[Tensor, "N I H W"]) -> Float[Tensor, "N L D"]:
        """Codes relative to `latent_avg`, from pictures in [-1, 1] of any size."""
        w, deltas = self.split(image)
        rows = self.architecture.num_ws
        closed = deltas.new_zeros(len(w), rows - 1 - deltas.shape[1], w.shape[1])
        return w[:, None] + torch.cat([deltas.new_zeros(len(w), 1, w.shape[1]), deltas, closed], 1)

    def split(
        self, image: Float[Tensor, "N I H W"]
    ) -> tuple[Float[Tensor, "N D"], Float[Tensor, "N S D"]]:
        """w_0 relative to `latent_avg`, and the S = `stage` open offsets."""
        return self.split_maps(self.pyramid(image, self.stage + 1))

    def split_maps(
        self, maps: list[Float[Tensor, "N C h w"]]
    ) -> tuple[Float[Tensor, "N D"], Float[Tensor, "N S D"]]:
        """As `split`, from the pyramid's maps of the first `stage` + 1 rows (or of more)."""
        codes = [head(x) for head, x in zip(self.styles, maps[: self.stage + 1], strict=False)]
        w = codes[0]
        deltas = torch.stack(codes[1:], 1) if self.stage else w.new_zeros(len(w), 0, w.shape[1])
        return w, deltas
