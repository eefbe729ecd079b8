"""Captions: what they say, what they leave out, and that the vocabulary covers them."""

import math

import pytest
import torch

from tasks.training.assets.captions import (
    DRAWS,
    FUNCTION_WORDS,
    MEDIUM_WORDS,
    SMILE_WORDS,
    Subject,
    said,
    split,
    subject,
    vocabulary,
    wording,
)
from tasks.training.assets.labels import MEDIA

WOMAN = Subject(medium="photo", age=27, gender=1, is_smiling=True)
SERIOUS = {word for phrase in SMILE_WORDS[0][0] + SMILE_WORDS[0][1] for word in split(phrase)}


def wordings(what: Subject, count: int = 300) -> list[str]:
    rng = torch.Generator().manual_seed(0)
    return [wording(what, torch.rand(DRAWS, generator=rng).tolist()) for _ in range(count)]


@pytest.mark.parametrize(
    ("what", "draws", "want"),
    [
        (WOMAN, [0.0, 0, 1, 0, 0, 0, 1, 1], "a photo of a smiling young woman"),
        (WOMAN, [0.0, 0.6, 1, 0, 0.9, 0.6, 1, 1], "a woman in her twenties with a smile, photo"),
        (WOMAN, [0.0, 0, 1, 0, 0, 0, 0.0, 1], "a photo of the smiling young woman"),
        (Subject(gender=0), [0.9] + [0.0] * 7, "the man"),
        (Subject(gender=0), [0.0] * 7, "a picture of the man"),
        (Subject(medium="impasto"), [0.0, 0.0, 0.0, 0], "an impasto painting"),
        (Subject(medium="impasto", age=95), [0.0, 0, 1, 0, 0, 0, 1], ""),
    ],
)
def test_wordings_are_a_function_of_the_numbers(what: Subject, draws: list, want: str) -> None:
    draws = draws + [0.0] * (DRAWS - len(draws))
    want = want or "an impasto painting of an old face"
    assert wording(what, draws) == want == wording(what, draws)


def test_every_wording_says_what_it_should_and_nothing_else() -> None:
    for caption in wordings(WOMAN):
        words = set(split(caption))
        assert words & {"woman", "female", "lady"}, caption
        assert not words & {"man", "male", "gentleman"}, caption
        assert words & {"young", "twenties"}, caption
        assert words & {"smile", "smiling", "happy"}, caption
        assert not words & {"serious", "unsmiling", "not"}, caption
        assert words & {"photo", "photograph"}, caption
        assert not words & {"painting", "impasto", "illustration", "drawing"}, caption
    for caption in wordings(Subject(medium="illustration")):
        words = set(split(caption))
        assert words & {"illustration", "drawing"}, caption
        assert not words & {"man", "woman", "young", "old", "smile", "serious", "photo"}, caption
    assert len(set(wordings(WOMAN))) > 100


def test_smiles_are_denied_in_words() -> None:
    for caption in wordings(Subject(is_smiling=False)):
        assert set(split(caption)) & {"serious", "unsmiling", "not"}, caption


def test_what_is_said_is_a_part_of_what_is_known() -> None:
    rng = torch.Generator().manual_seed(1)
    draws = torch.rand(4000, 4, generator=rng).tolist()
    found = [said(WOMAN, row) for row in draws]
    assert {part.medium for part in found} == {"photo", None}
    assert {part.age for part in found} == {27, None}
    shares = [sum(getattr(p, n) is not None for p in found) / 4000 for n in ("medium", "gender")]
    assert shares == pytest.approx([0.75, 0.7], abs=0.03)
    alone = Subject(medium="fantasy")
    kept = sum(said(alone, row).medium is not None for row in draws) / 4000
    assert kept == pytest.approx(0.95, abs=0.015)


def test_subjects_of_labels() -> None:
    nan = math.nan
    assert subject(0, 31.0, 1.0, 0.9) == Subject(medium="photo", age=31, gender=1, is_smiling=True)
    assert subject(0, nan, nan, 0.3, draw=0.2).is_smiling is True
    assert subject(0, nan, nan, 0.3, draw=0.4).is_smiling is False
    assert subject(2, nan, nan, nan) == Subject(medium="fantasy")
    assert Subject(age=31).meaning == Subject(age=38).meaning != Subject(age=41).meaning


def test_the_vocabulary_holds_every_word_of_every_caption() -> None:
    words = set(vocabulary())
    rng = torch.Generator().manual_seed(2)
    for index in range(2000):
        draws = torch.rand(DRAWS + 5, generator=rng).tolist()
        what = subject(index % len(MEDIA), 18 + 80 * draws[0], index % 2, draws[1], draws[2])
        caption = wording(said(what, draws[-4:]), draws)
        assert set(split(caption)) <= words, caption
    assert {"impasto", "photo", "smile", "eighties", "middle", "aged"} <= words
    assert words >= FUNCTION_WORDS
    assert words - FUNCTION_WORDS >= SERIOUS - FUNCTION_WORDS
    assert len(words) == len(vocabulary()) < 100


def test_the_first_word_of_a_medium_is_its_own() -> None:
    first = [words[0] for words in MEDIUM_WORDS.values()]
    assert list(MEDIUM_WORDS) == list(MEDIA)
    assert len(set(first)) == len(MEDIA)
    assert "painting" not in first
