"""LSAP: e4e's network, trained to give codes that the generator would draw (arXiv 2209.12746).

The method is `e4e` with other weights: the alignment is in the training
(`refinery train lsap`, LSAP_E of the paper).
"""

from dataclasses import dataclass

from models.inversion.e4e import E4e, E4eConfig


@dataclass(frozen=True, kw_only=True)
class LsapConfig(E4eConfig):
    """Settings of the method `lsap`: those of `e4e`, with LSAP's bundled encoder."""


class Lsap(E4e):
    """Codes of pictures in one forward pass of an encoder trained with the alignment loss."""

    Config = LsapConfig
    summary = "one forward pass of an encoder aligned with the style space (LSAP, arXiv 2209.12746)"
    name = "lsap"
