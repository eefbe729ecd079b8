"""StyleCLIP's global directions with an embedding whose answer is known."""

import logging
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.editing.style_text import (
    Relevance,
    cached_relevance,
    channel_relevance,
    style_channels,
    style_text_direction,
)
from models.errors import ConfigError
from models.losses.clip_direction import text_direction
from models.statistics import Statistics, compute_statistics
from models.stylegan2.generator import Generator, weights_hash


class ColourClip:
    """Embeds a picture by its mean colour, and a text by the colours that it names."""

    name, hash = "colours", "c0" * 32
    calls = 0

    def images(self, images: Tensor) -> Tensor:
        self.calls += 1
        return F.normalize(images.mean((2, 3)) + torch.tensor([0.0, 0.0, 0.5]), dim=1)

    def texts(self, texts: Sequence[str]) -> Tensor:
        colours = ("red", "green", "blue")
        rows = [[1e-3 + text.count(colour) for colour in colours] for text in texts]
        return F.normalize(torch.tensor(rows), dim=1)


@pytest.fixture
def statistics(tiny_generator: Generator) -> Statistics:
    return compute_statistics(tiny_generator, samples=200)


def slow_relevance(
    generator: Generator, statistics: Statistics, index: int, channel: int, samples: int
) -> Tensor:
    """One channel, one code at a time, by changing the affine's bias."""
    z = torch.randn(samples, 16, generator=torch.Generator().manual_seed(0))
    bias = generator.layers()[index][1].modulation.bias
    step = 5.0 * statistics.style_std[index][channel]
    moves = []
    for row in generator.mapping(z):
        ends = []
        for sign in (1, -1):
            bias[channel] += sign * step
            ends.append(ColourClip().images(generator.synthesis(row[None]).clamp(-1, 1))[0])
            bias[channel] -= sign * step
        moves.append((ends[0] - ends[1]) / (ends[0] - ends[1]).norm())
    mean = torch.stack(moves).mean(0)
    return mean / mean.norm()


def test_relevance_is_the_mean_move_of_the_embedding(
    tiny_generator: Generator, statistics: Statistics
) -> None:
    seen: list[tuple[int, int]] = []
    found = channel_relevance(
        tiny_generator,
        ColourClip(),
        statistics,
        samples=3,
        on_progress=lambda done, total: seen.append((done, total)),
    )
    channels = style_channels(tiny_generator)
    assert found.channels == channels
    assert found.vectors.shape == (sum(channels), 3)
    starts = [sum(channels[:index]) for index in range(len(channels))]
    for index, channel in ((0, 0), (3, 7), (9, 2)):
        want = slow_relevance(tiny_generator, statistics, index, channel, 3)
        got = found.vectors[starts[index] + channel]
        torch.testing.assert_close(got, want, atol=2e-4, rtol=2e-3)
    for index, (name, _, _) in enumerate(tiny_generator.layers()):
        rows = found.vectors[starts[index] : starts[index] + channels[index]]
        expected = 0.0 if name.startswith("to_rgb") else 1.0
        torch.testing.assert_close(rows.norm(dim=1), torch.full((len(rows),), expected))
    moved = sum(
        n
        for n, (name, _, _) in zip(channels, tiny_generator.layers(), strict=True)
        if "rgb" not in name
    )
    done = [count for count, _ in seen]
    assert done == sorted(set(done))
    assert seen[-1] == (moved, moved)


def test_batches_change_nothing(tiny_generator: Generator, statistics: Statistics) -> None:
    whole, parts = (
        channel_relevance(tiny_generator, ColourClip(), statistics, samples=2, batch=batch)
        for batch in (64, 2)
    )
    torch.testing.assert_close(whole.vectors, parts.vectors, atol=1e-3, rtol=1e-3)


def test_relevance_is_computed_once(
    tiny_generator: Generator,
    statistics: Statistics,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Once for generator, CLIP and settings; a damaged file is replaced, with a word about it."""
    monkeypatch.setenv("REFINERY_CACHE", str(tmp_path))
    clip = ColourClip()
    first = cached_relevance(tiny_generator, clip, statistics, samples=2)
    (path,) = (tmp_path / "relevance").iterdir()
    assert weights_hash(tiny_generator)[:24] in path.name
    calls = clip.calls
    again = cached_relevance(tiny_generator, clip, statistics, samples=2)
    assert torch.equal(again.vectors, first.vectors)
    assert clip.calls == calls
    other = ColourClip()
    other.hash = "c1" * 32
    cached_relevance(tiny_generator, other, statistics, samples=2)
    assert other.calls == calls
    path.write_bytes(b"damaged")
    with caplog.at_level(logging.WARNING):
        repaired = cached_relevance(tiny_generator, clip, statistics, samples=2)
    assert "it is computed again" in caplog.text
    assert torch.equal(repaired.vectors, first.vectors)
    assert clip.calls == 2 * calls


def test_channels_above_the_threshold_move_by_their_deviation(statistics: Statistics) -> None:
    """The most relevant channel by one deviation, others in proportion, the rest not at all."""
    channels = tuple(len(std) for std in statistics.style_std)
    vectors = torch.zeros(sum(channels), 2)
    vectors[3], vectors[20], vectors[40] = (
        torch.tensor([-0.6, 0.8]),
        torch.tensor([0.3, 0.0]),
        torch.tensor([0.1, 0.9]),
    )
    relevance = Relevance(vectors=vectors, channels=channels)
    std = torch.cat(statistics.style_std)
    change = torch.tensor([1.0, 0.0])
    for limit in ({"beta": 0.2}, {"count": 2}):
        found = style_text_direction("red", relevance, change, statistics, **limit)
        assert (found.space, found.card["channels"]) == ("s", 2)
        moves = torch.zeros(sum(channels))
        moves[3], moves[20] = -std[3], 0.5 * std[20]
        shift = found.style_shift(2.0) or {}
        flat = torch.cat([shift.get(i, torch.zeros(n)) for i, n in enumerate(channels)])
        torch.testing.assert_close(flat, 2 * moves)
        assert float(found.vector.norm()) == pytest.approx(1.0)
    with pytest.raises(ConfigError, match=r"relevance of 0.7 for the texts, the largest is 0.600"):
        style_text_direction("red", relevance, change, statistics, beta=0.7)
    for count in (0, 4):
        with pytest.raises(ConfigError, match=rf"expected a count in 1..3, got {count}"):
            style_text_direction("red", relevance, change, statistics, count=count)


def test_the_direction_does_to_pictures_what_the_text_says(
    tiny_generator: Generator, statistics: Statistics
) -> None:
    """From red to green: pictures that were not among the samples lose red and gain green."""
    clip = ColourClip()
    relevance = channel_relevance(tiny_generator, clip, statistics, samples=8)
    change = text_direction(clip, "red", "green", ("{}",))
    found = style_text_direction("green", relevance, change, statistics, count=20)
    z = torch.randn(16, 16, generator=torch.Generator().manual_seed(99))
    w_plus = tiny_generator.mapping(z)
    along = []
    for strength in (-2.0, 0.0, 2.0):
        shift = {k: s[None] for k, s in (found.style_shift(strength) or {}).items()}
        images = tiny_generator.synthesis(w_plus, style_shift=shift).clamp(-1, 1)
        along.append(clip.images(images) @ change)
    for less, more in ((0, 1), (1, 2)):
        assert float((along[less] < along[more]).float().mean()) > 0.7
        assert float((along[more] - along[less]).mean()) > 0.1
    assert found.generator_hash == weights_hash(tiny_generator)
