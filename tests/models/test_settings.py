"""Settings are checked against the types and bounds of their fields."""

from dataclasses import dataclass
from typing import Literal

import pytest

from models.errors import ConfigError
from models.inversion.registry import load_method
from models.settings import Count, Positive, Share, check_fields
from models.stylegan2.generator import Generator


@dataclass(frozen=True, kw_only=True)
class Settings:
    steps: Count = 3
    rate: Positive = 0.1
    share: Share | None = None
    name: str = ""
    is_fast: bool = False
    space: Literal["w", "w_plus"] = "w"
    sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"steps": 2.5}, r"steps: expected a whole number, found 2\.5"),
        ({"steps": "60"}, "steps: expected a whole number, found '60'"),
        ({"steps": True}, "steps: expected a whole number, found True"),
        ({"rate": 0}, "rate must be > 0, got 0"),
        ({"rate": float("nan")}, "rate must be > 0, got nan"),
        ({"share": 1.5}, r"share must be in 0\.\.1, got 1\.5"),
        ({"name": 3}, "name: expected a text, found 3"),
        ({"is_fast": 1}, "is_fast: expected true or false, found 1"),
        ({"space": "z"}, "space: expected one of w, w_plus, found 'z'"),
    ],
)
def test_a_wrong_value_is_refused_by_the_field_s_name(
    wrong: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{message}$"):
        Settings(**wrong)  # type: ignore[arg-type]


def test_right_values_pass() -> None:
    assert Settings(steps=1, rate=1, share=1, space="w_plus", sizes=(1,)).rate == 1
    assert Settings().share is None


@pytest.mark.parametrize("steps", [2.5, "60"])
def test_a_method_refuses_a_setting_of_another_type(
    tiny_generator: Generator, steps: object
) -> None:
    with pytest.raises(ConfigError, match=f"^method wplus: steps: .* found {steps!r}"):
        load_method("wplus", tiny_generator, steps=steps)
