"""ReStyle's encoders (arXiv 2104.02699): every head reads the trunk's last map.

They see 6 channels: the picture, and the render of the codes so far. Their output is added to those
codes; `models.inversion.restyle` goes round. Names and, at the default settings, shapes are the
official ones.
"""

from models.encoders.e4e import Encoder4Editing
from models.encoders.psp import GradualStyleEncoder


class BackboneEncoder(GradualStyleEncoder):
    """Of ReStyle-pSp: every row on its own."""

    is_flat = True


class ProgressiveBackboneEncoder(Encoder4Editing):
    """Of ReStyle-e4e: one w and offsets to it."""

    is_flat = True
