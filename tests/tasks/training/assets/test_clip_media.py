"""Filters that draw and paint: what each does to a picture, and that training words follow them."""

import pytest
import torch

from tasks.training.assets.captions import MEDIUM_WORDS
from tasks.training.assets.clip_media import FILTERS, edges, in_medium, kuwahara, luma, saturated
from tasks.training.assets.labels import MEDIA
from tasks.training.views import zoomed


def face() -> torch.Tensor:
    """A bright disc with two dark spots on a grey ground, in [-1, 1]."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    picture = torch.full((3, 64, 64), -0.1)
    picture[:, (x**2 + y**2) < 0.6] = torch.tensor([0.6, 0.3, 0.1])[:, None]
    for centre in (-0.3, 0.3):
        picture[:, ((x - centre) ** 2 + (y + 0.2) ** 2) < 0.01] = -0.8
    return picture.expand(4, -1, -1, -1)


@pytest.mark.parametrize("name", list(FILTERS))
def test_every_medium_is_a_picture_of_the_same_thing(name: str) -> None:
    torch.manual_seed(0)
    found = in_medium(face(), name)
    assert found.shape == (4, 3, 64, 64)
    assert float(found.abs().max()) <= 1 + 1e-5
    assert float((found - face()).abs().mean()) > 0.05
    assert float((found[0] - found[2]).abs().mean()) > 1e-3  # settings are drawn
    torch.manual_seed(0)
    assert torch.equal(in_medium(face(), name), found)


def test_media_have_words_and_no_two_share_the_first() -> None:
    assert MEDIA[4:] == tuple(FILTERS)
    first = [MEDIUM_WORDS[name][0] for name in MEDIA]
    assert len(set(first)) == len(MEDIA)


def saturation(x: torch.Tensor) -> float:
    return float((x.amax(1) - x.amin(1)).mean())


def test_drawings_are_grey_on_white_and_paints_are_not() -> None:
    torch.manual_seed(1)
    plain = (face() + 1) / 2
    for name in ("pencil", "ink", "engraving", "charcoal"):
        assert saturation((in_medium(face(), name) + 1) / 2) < 0.12, name
    for name in ("pencil", "ink", "watercolour"):
        assert float(((in_medium(face(), name) + 1) / 2).mean()) > float(plain.mean()) + 0.1, name
    for name in ("oil", "cartoon", "poster"):
        assert saturation((in_medium(face(), name) + 1) / 2) > saturation(plain), name
    ink = (in_medium(face(), "ink") + 1) / 2
    assert float(((ink < 0.2) | (ink > 0.8)).float().mean()) > 0.85  # nothing between
    tiles = in_medium(face(), "mosaic")
    assert float((tiles[:, :, 1:] - tiles[:, :, :-1]).abs().gt(0).float().mean()) < 0.4


def test_what_filters_are_made_of() -> None:
    x = torch.zeros(1, 3, 16, 16)
    x[:, :, :, 8:] = 1.0
    noisy = x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    smooth = kuwahara(noisy, 2)
    assert float((smooth - x).square().mean()) < 0.3 * float((noisy - x).square().mean())
    lines = edges(luma(x), 0.8, 10)
    assert float(lines[0, 0, :, 7].max()) < 0.9  # dark on the dark side of the border
    assert float(lines[0, 0, :, 12].min()) > 0.99
    colour = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(1)) * 0.2 + 0.4
    torch.testing.assert_close(luma(saturated(colour, 1.5)), luma(colour))


def test_a_share_is_zoomed_into() -> None:
    torch.manual_seed(0)
    ramp = torch.linspace(-1, 1, 32).expand(400, 3, 32, 32)
    spread = (lambda x: x[:, 0, 0, -1] - x[:, 0, 0, 0])(zoomed(ramp, 0.5))
    is_part = spread < 1.99
    assert 150 < int(is_part.sum()) < 250
    assert float(spread.min()) > 0.9
    torch.testing.assert_close(zoomed(ramp[:4], 0.0), ramp[:4], atol=1e-5, rtol=0)
