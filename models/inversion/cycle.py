"""Cycle Encoding: e4e's network, trained to w+ and back to W (arXiv 2207.09367).

The training is what matters (`refinery train cycle`): offsets open row by row and are closed again,
so that a single w inherits the low distortion of w+. The method evaluates its end: one w, repeated.
"""

from dataclasses import dataclass

from models.encoders.e4e import Encoder4Editing
from models.errors import AssetError
from models.inversion.e4e import E4e, E4eConfig
from models.stylegan2.generator import Generator


@dataclass(frozen=True, kw_only=True)
class CycleConfig(E4eConfig):
    """Settings of the method `cycle`: those of `e4e`, with Cycle Encoding's bundled encoder."""

    all_heads: bool = False
    """Add every row's offset, as the released inference does, although those heads stood still
    while the rest of the network was trained on: the codes are then in W+."""


class Cycle(E4e):
    """Codes in W in one forward pass: `latent_avg` + the encoder's w, the same in every row."""

    Config = CycleConfig
    summary = "one forward pass of an encoder to a single w (Cycle Encoding, arXiv 2207.09367)"
    name = "cycle"

    def __init__(self, generator: Generator, config: CycleConfig) -> None:
        super().__init__(generator, config)
        if not isinstance(self.encoder, Encoder4Editing):
            raise AssetError(
                f"{self.name}: `checkpoint` is a {type(self.encoder).__name__}, which has no w of "
                "its own; expected an encoder of the kind e4e, as `refinery train cycle` makes"
            )
        if not config.all_heads:
            self.encoder.stage = 0
            self.latent_avg = self.latent_avg[:1].expand_as(self.latent_avg)
