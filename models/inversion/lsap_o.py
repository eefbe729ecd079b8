"""LSAP by optimisation: the projector with the alignment of the codes in its loss.

Source: LSAP (arXiv 2209.12746), LSAP_O. The authors' program has no such method; ours is `wplus`
plus `nscd_weight` times the NSCD of the codes in its mean form.
"""

from dataclasses import dataclass

from models.inversion.wplus import WPlus, WPlusConfig
from models.settings import NotNegative


@dataclass(frozen=True, kw_only=True)
class LsapOConfig(WPlusConfig):
    """Settings of the method `lsap_o`: those of `wplus`, with the alignment switched on."""

    nscd_weight: NotNegative = 0.25
    """Weight of the codes' distance from the generator's own styles (LSAP's NSCD, mean form)."""


class LsapO(WPlus):
    """`wplus` whose codes stay near those that the mapping network makes."""

    Config = LsapOConfig
    summary = "wplus that keeps the codes near the generator's own (LSAP_O, arXiv 2209.12746)"
