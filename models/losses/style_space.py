"""LSAP's normalised style space and the cosine distance in it (arXiv 2209.12746).

The style space is what the affines of the 3x3 layers and of the last ToRGB make of a code. Each
layer's style is divided by its norm and compared with the mean of such vectors over the mapping
network's samples: codes that the generator draws itself are near, codes that only happen to render
a picture are far. The paper's first version calls the distance SNCD, its third NSCD.

Legend: N batch, L num_ws, D w_dim, S style layers (= L), I input channels of a layer.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from models.stylegan2.generator import Generator


def style_layers(generator: Generator) -> list[int]:
    """Positions in `Generator.layers()` of the 3x3 layers and the last ToRGB, in order of rows.

    Entry l reads row l of w+: there are as many as rows.
    """
    layers = generator.layers()
    found = [i for i, (name, _, _) in enumerate(layers) if not name.startswith("to_rgb")]
    return [*found, len(layers) - 1]


class StyleSpace:
    """Styles of one generator, normalised, and their alignment with the anchors.

    Args:
        generator: whose affines are used; gradients flow to the codes.
        anchors: [I] per entry of `Generator.layers()`, `Statistics.style_anchor`: means of
            normalised styles, not normalised again.
    """

    def __init__(self, generator: Generator, anchors: Sequence[Tensor]) -> None:
        self.generator = generator
        layers = style_layers(generator)
        self.affines = [generator.layers()[i][1].modulation for i in layers]
        self.anchors = [anchors[i].float() for i in layers]

    def normalised(self, w_plus: Float[Tensor, "N L D"]) -> list[Float[Tensor, "N I"]]:
        """Every style layer's output divided by its L2 norm."""
        return [
            F.normalize(affine(w_plus[:, row]), dim=1) for row, affine in enumerate(self.affines)
        ]

    def similarity(
        self, w_plus: Float[Tensor, "N L D"], is_renormalised: bool = False
    ) -> Float[Tensor, "N S"]:
        """Inner product of each normalised style with its anchor.

        Args:
            is_renormalised: with the anchor's direction, which makes it a cosine; else with the
                anchor itself, whose norm (below 1) weighs the layer, as the released loss does.
        """
        found = []
        for style, anchor in zip(self.normalised(w_plus), self.anchors, strict=True):
            anchor = anchor.to(style)
            found.append(style @ (F.normalize(anchor, dim=0) if is_renormalised else anchor))
        return torch.stack(found, 1)

    def loss(
        self, w_plus: Float[Tensor, "N L D"], open_rows: int | None = None
    ) -> Float[Tensor, " N"]:
        """Minus the summed similarity (LSAP's L_SNCD); its floor is minus the sum of anchor norms.

        Args:
            open_rows: only the first rows count; None counts all. The released training passes the
                number of open rows, and so aligns one layer during its first 20,000 steps although
                all rows are in use.
        """
        return -self.similarity(w_plus)[:, :open_rows].sum(1)

    def nscd(self, w_plus: Float[Tensor, "N L D"]) -> Float[Tensor, " N"]:
        """The metric: mean over layers of 1 - cos(style, anchor), 0 at the anchors.

        Lower is nearer to what the mapping network draws. Scaling a style changes nothing.
        """
        return 1 - self.similarity(w_plus, is_renormalised=True).mean(1)
