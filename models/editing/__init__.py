"""Edits of codes.

direction.py: one direction of a latent space with its unit, its file, and how it is applied.
find.py: a direction by name or path.
files.py: raw vectors as the field publishes them.
boundary.py: InterFaceGAN's boundary between two kinds of codes.
ganspace.py, sefa.py: directions without labels: principal components of W, and closed form.
style_text.py: StyleCLIP's global directions in style space from a pair of texts.
"""

from models.editing.boundary import balanced_accuracy, fit_boundary
from models.editing.direction import (
    Direction,
    apply_edits,
    bundled_directions,
    load_direction,
    save_direction,
)
from models.editing.files import import_direction
from models.editing.find import find_direction, known_directions
from models.editing.ganspace import ganspace_direction
from models.editing.sefa import sefa_directions
from models.editing.style_text import style_text_direction

__all__ = [
    "Direction",
    "apply_edits",
    "balanced_accuracy",
    "bundled_directions",
    "find_direction",
    "fit_boundary",
    "ganspace_direction",
    "import_direction",
    "known_directions",
    "load_direction",
    "save_direction",
    "sefa_directions",
    "style_text_direction",
]
