"""What a setting may hold, declared at its field and checked in one place.

steps: Count = 100
ramp_down: Share = 0.25
space: Literal["w", "w_plus"] = "w_plus"
"""

import math
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from models.errors import ConfigError


@dataclass(frozen=True)
class Bounds:
    """The numbers that a field takes: from `least` (or above it, where `is_open`) to `most`."""

    least: float
    most: float = math.inf
    is_open: bool = False

    def __contains__(self, value: float) -> bool:
        return (value > self.least if self.is_open else value >= self.least) and value <= self.most

    def __str__(self) -> str:
        least = f"{'>' if self.is_open else '>='} {self.least:g}"
        if self.most == math.inf:
            return least
        if self.is_open:
            return f"{least} and <= {self.most:g}"
        return f"in {self.least:g}..{self.most:g}"


Positive = Annotated[float, Bounds(0, is_open=True)]
NotNegative = Annotated[float, Bounds(0)]
Share = Annotated[float, Bounds(0, 1)]
Count = Annotated[int, Bounds(1)]
CountOrNone = Annotated[int, Bounds(0)]
"""A number of things that may be 0."""
Several = Annotated[int, Bounds(2)]


def check_fields(config: Any, where: str = "") -> None:
    """Check a settings dataclass against the types and bounds of its fields.

    For `__post_init__`. Fields of other types than numbers, texts, truth values and choices among
    them are left to their own checks.

    Args:
        where: comes before the field in the message, for one table of several.

    Raises:
        ConfigError: a value of another type or out of bounds; the message starts with the field.
    """
    for name, rule in _rules(type(config)):
        value = getattr(config, name)
        if not (value is None and rule.is_optional):
            rule.check(where + name, value)


class _Rule(NamedTuple):
    check: Callable[[str, Any], None]
    is_optional: bool


_WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


@cache
def _rules(cls: type) -> list[tuple[str, _Rule]]:
    fields = get_type_hints(cls, include_extras=True)
    rules = ((name, _rule(hint)) for name, hint in fields.items() if name in _fields(cls))
    return [(name, rule) for name, rule in rules if rule is not None]


def _fields(cls: type) -> dict[str, Any]:
    return cls.__dataclass_fields__


def _rule(hint: Any) -> _Rule | None:
    bounds, is_optional = [], False
    while True:
        if get_origin(hint) is Annotated:
            hint, *notes = get_args(hint)
            bounds += [note for note in notes if isinstance(note, Bounds)]
        elif get_origin(hint) in (Union, types.UnionType):
            kinds = [kind for kind in get_args(hint) if kind is not type(None)]
            if len(kinds) != 1:
                return None
            is_optional, hint = True, kinds[0]
        else:
            break
    if get_origin(hint) is Literal:
        return _Rule(lambda name, value: _check_choice(name, value, get_args(hint)), is_optional)
    if hint not in _WORDS:
        return None
    return _Rule(lambda name, value: _check_value(name, value, hint, bounds), is_optional)


def _check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        known = ", ".join(str(choice) for choice in choices)
        raise ConfigError(f"{name}: expected one of {known}, found {value!r}")


def _check_value(name: str, value: Any, kind: type, bounds: list[Bounds]) -> None:
    accepted = (int, float) if kind is float else (kind,)
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"{name}: expected {_WORDS[kind]}, found {value!r}")
    for bound in bounds:
        if value not in bound:
            raise ConfigError(f"{name} must be {bound}, got {value}")
