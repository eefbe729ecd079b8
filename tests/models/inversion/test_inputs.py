"""What a method refuses before any work."""

import pytest
import torch

from models import SampleRng, load_method
from models.editing.direction import apply_edits
from models.editing.find import find_direction
from models.stylegan2.generator import Generator


@pytest.mark.parametrize("scale", [255.0, None])
def test_pictures_of_another_range_are_refused(
    tiny_generator: Generator, scale: float | None
) -> None:
    method = load_method("wplus", tiny_generator, steps=1, perceptual="none")
    images = torch.rand(1, 3, 32, 32)
    wrong = images * scale if scale else (images * 255).byte()
    with pytest.raises(ValueError, match=r"expected pictures of floats in \[-1, 1\], found"):
        method.invert(wrong, None, SampleRng([0]))
    assert len(method.invert(images, None, SampleRng([0]))) == 1


def test_editing_has_its_functions_at_the_door() -> None:
    assert callable(apply_edits)
    assert callable(find_direction)
