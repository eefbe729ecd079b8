"""Captions composed from labels, and the vocabulary that they need.

A caption says some of what is known of a picture, in one of many wordings, and drops the rest: a
picture of a smiling young woman is "a photo", "a woman in her twenties" or "a photograph of a young
woman with a smile". What is not known is never said.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from tasks.training.assets.labels import MEDIA

MEDIUM_WORDS: Mapping[str, tuple[str, ...]] = {
    medium: tuple(words.split(", "))
    for medium, words in {
        "photo": "photo, photograph, realistic photo, real photo, portrait photo",
        "impasto": "impasto painting, impasto oil painting, impasto portrait, "
        "oil painting with thick brush strokes, painting",
        "fantasy": "fantasy painting, fantasy portrait, fantasy art, "
        "digital fantasy painting, painting",
        "illustration": "illustration, comic illustration, comic book drawing, "
        "drawn illustration, drawing",
        "pencil": "pencil sketch, pencil drawing, sketch, graphite pencil sketch",
        "charcoal": "charcoal drawing, charcoal sketch, charcoal portrait",
        "ink": "ink drawing, pen and ink drawing, line drawing, black ink line art",
        "watercolour": "watercolour painting, watercolor painting, watercolour, "
        "watercolor portrait",
        "oil": "oil painting, oil on canvas, oil portrait, oil paint on canvas",
        "cartoon": "cartoon, cartoon drawing, flat cartoon",
        "poster": "pop art poster, poster, pop art print",
        "engraving": "engraving, woodcut, engraved print, woodcut print",
        "mosaic": "mosaic, pixel art, mosaic of tiles",
    }.items()
}
"""The first names the medium alone; "painting" and "drawing" are said of several."""
ANY_MEDIUM = ("picture", "image", "portrait")
"""Said of every medium."""
GENDER_WORDS = (("man", "male person", "gentleman"), ("woman", "female person", "lady"))
ANY_PERSON = ("face", "person", "human face", "head")
AGE_WORDS: tuple[tuple[float, float, tuple[str, ...]], ...] = (
    (0, 32, ("young",)),
    (38, 56, ("middle-aged",)),
    (60, math.inf, ("old", "elderly", "aged")),
)
"""From, to (years), adjectives; none between."""
DECADES = (
    "teens",
    "twenties",
    "thirties",
    "forties",
    "fifties",
    "sixties",
    "seventies",
    "eighties",
)
SMILE_WORDS = (
    (("serious", "unsmiling"), ("with a serious expression", "who is not smiling", "not smiling")),
    (("smiling", "happy"), ("with a smile", "who is smiling", "smiling")),
)
"""Without and with a smile: before the noun, after it."""
FUNCTION_WORDS = frozenset(
    (
        *("a", "an", "the", "of", "in", "on", "with", "and", "who", "is", "not"),
        *("his", "her", "their"),
    )
)
"""Words that say nothing of a picture by themselves."""
KEPT = {"medium": 0.75, "age": 0.6, "gender": 0.7, "smile": 0.6}
"""Chance that a known part is said."""
ANY_MEDIUM_SHARE = 0.3
"""Chance that a dropped medium is replaced by a word of `ANY_MEDIUM`."""
DRAWS = 12
"""Random numbers of one caption."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is said of a picture; None where nothing is.

    Attributes:
        medium: one of `MEDIA`.
        age: years.
        gender: 0 male, 1 female.
        is_smiling: whether.
    """

    medium: str | None = None
    age: float | None = None
    gender: int | None = None
    is_smiling: bool | None = None

    @property
    def meaning(self) -> tuple[str | None, int | None, int | None, bool | None]:
        """Equal for subjects that no caption tells apart but by wording."""
        return self.medium, _decade(self.age), self.gender, self.is_smiling


def subject(medium: int, age: float, gender: float, smile: float, draw: float = 0.5) -> Subject:
    """From the labels of a file, NaN where there is none.

    Args:
        medium: index in `MEDIA`.
        smile: probability of a smile.
        draw: in 0..1; a smile is said where its probability is larger.
    """
    return Subject(
        medium=MEDIA[medium],
        age=None if math.isnan(age) else age,
        gender=None if math.isnan(gender) else int(gender),
        is_smiling=None if math.isnan(smile) else draw < smile,
    )


def said(known: Subject, draws: Sequence[float]) -> Subject:
    """The part of what is known that one caption says. Reads four numbers in 0..1."""
    is_alone = known.age is None and known.gender is None and known.is_smiling is None
    # Of a portrait only its medium is known: dropped too often, its captions would say nothing.
    medium_kept = 0.95 if is_alone else KEPT["medium"]
    return replace(
        known,
        medium=known.medium if draws[0] < medium_kept else None,
        age=known.age if draws[1] < KEPT["age"] else None,
        gender=known.gender if draws[2] < KEPT["gender"] else None,
        is_smiling=known.is_smiling if draws[3] < KEPT["smile"] else None,
    )


def wording(what: Subject, draws: Sequence[float]) -> str:
    """One of the ways to say it. Reads eight numbers in 0..1; equal numbers, equal words."""
    person = _person(what, draws)
    if what.medium is not None:
        medium = _pick(MEDIUM_WORDS[what.medium], draws[0])
    elif draws[0] < ANY_MEDIUM_SHARE:
        medium = _pick(ANY_MEDIUM, draws[0] / ANY_MEDIUM_SHARE)
    else:
        return person
    forms = (
        f"{_article(medium)} {medium} of {person}",
        f"{_article(medium)} {medium} of {person}",
        f"{person}, {medium}",
        f"{medium} of {person}",
    )
    is_bare = what.age is None and what.gender is None and what.is_smiling is None
    if is_bare and draws[2] < 0.4:
        return (medium, f"{_article(medium)} {medium}")[draws[1] < 0.5]
    return _pick(forms, draws[1])


def vocabulary() -> list[str]:
    """Every word that a caption may hold, sorted."""
    phrases = [*ANY_MEDIUM, *ANY_PERSON, *DECADES, *FUNCTION_WORDS]
    for group in (*MEDIUM_WORDS.values(), *GENDER_WORDS, *(words for _, _, words in AGE_WORDS)):
        phrases += group
    for before, after in SMILE_WORDS:
        phrases += [*before, *after]
    return sorted({word for phrase in phrases for word in split(phrase)})


def split(text: str) -> list[str]:
    """Lower-case words; punctuation only parts them."""
    return re.findall(r"[a-z]+", text.lower())


def _person(what: Subject, draws: Sequence[float]) -> str:
    noun = _pick(ANY_PERSON if what.gender is None else GENDER_WORDS[what.gender], draws[3])
    before, after = [], []
    if what.age is not None:
        adjectives = next((w for low, high, w in AGE_WORDS if low <= what.age <= high), ())
        if adjectives and draws[4] < 0.65:
            before.append(_pick(adjectives, draws[4] / 0.65))
        else:
            owner = "their" if what.gender is None else ("his", "her")[what.gender]
            after.append(f"in {owner} {DECADES[_decade(what.age) or 0]}")
    if what.is_smiling is not None:
        adjectives, tails = SMILE_WORDS[what.is_smiling]
        if draws[5] < 0.5:
            before.insert(0, _pick(adjectives, draws[5] * 2))
        else:
            after.append(_pick(tails, draws[5] * 2 - 1))
    words = " ".join([*before, noun])
    lead = "the" if draws[6] < 0.1 else _article(words)
    return " ".join([lead, words, *after])


def _decade(age: float | None) -> int | None:
    return None if age is None else min(max(int(age) // 10, 1), len(DECADES)) - 1


def _article(words: str) -> str:
    return "an" if words[0] in "aeiou" else "a"


def _pick(options: Sequence[str], draw: float) -> str:
    return options[min(int(draw * len(options)), len(options) - 1)]
