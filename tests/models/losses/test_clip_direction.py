"""Directions between texts against values by hand."""

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F

from models.errors import ConfigError
from models.losses.clip_direction import text_direction


def unit(seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(8, generator=torch.Generator().manual_seed(seed)), dim=0)


class Words:
    """Embeds a text as the mean of its words' fixed unit vectors."""

    name = "words"

    def texts(self, texts: Sequence[str]) -> torch.Tensor:
        rows = [
            torch.stack([unit(sum(map(ord, word))) for word in text.split()]).mean(0)
            for text in texts
        ]
        return F.normalize(torch.stack(rows), dim=1)


def test_the_mean_over_templates() -> None:
    clip = Words()
    found = text_direction(clip, "photo", "ink drawing", ("{}", "old {}"))
    first = clip.texts(["ink drawing"])[0] - clip.texts(["photo"])[0]
    second = clip.texts(["old ink drawing"])[0] - clip.texts(["old photo"])[0]
    torch.testing.assert_close(found, F.normalize((first + second) / 2, dim=0))


def test_texts_and_templates_that_give_no_direction() -> None:
    with pytest.raises(ConfigError, match="'a b' and 'b a' have the same embedding in"):
        text_direction(Words(), "a b", "b a", ("{}",))
    with pytest.raises(ConfigError, match=r"texts with {} in each, found \['a photo'\]"):
        text_direction(Words(), "red", "green", ("{}", "a photo"))
    with pytest.raises(ConfigError, match="found none"):
        text_direction(Words(), "red", "green", ())
