"""What the papers claim, held against what was measured; and that what reconstructs still edits."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Rows = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class ClaimResult:
    """One line of the claims table.

    Attributes:
        measured: in words; what is missing where it could not be measured.
        is_met: None where a row of the comparison is missing.
    """

    claim: str
    wanted: str
    measured: str
    is_met: bool | None


@dataclass(frozen=True, kw_only=True)
class _Ratio:
    """One number of a row against that of another row (or of the table's head)."""

    claim: str
    wanted: str
    value: str
    over: str
    column: str
    holds: Callable[[float], bool]

    def verdict(self, rows: Rows, perceptual: str) -> ClaimResult:
        column = perceptual if self.column == "perceptual" else self.column
        a, b = (_number(rows, name, column) for name in (self.value, self.over))
        if a is None or b is None or not b:
            missing = " and ".join(
                name for name, x in ((self.value, a), (self.over, b)) if x is None
            )
            return ClaimResult(
                claim=self.claim,
                wanted=self.wanted,
                measured=f"not measured: {column} of {missing or self.over}",
                is_met=None,
            )
        return ClaimResult(
            claim=self.claim,
            wanted=self.wanted,
            measured=f"{a:.4g} / {b:.4g} = {a / b:.3g}",
            is_met=self.holds(a / b),
        )


def _below(limit: float) -> Callable[[float], bool]:
    return lambda ratio: ratio <= limit


def _above(limit: float) -> Callable[[float], bool]:
    return lambda ratio: ratio >= limit


def _claim(
    claim: str, wanted: str, pair: tuple[str, str], column: str, holds: Callable[[float], bool]
) -> _Ratio:
    value, over = pair
    return _Ratio(claim=claim, wanted=wanted, value=value, over=over, column=column, holds=holds)


CLAIMS: tuple[_Ratio, ...] = (
    _claim("LSAP: NSCD below e4e's", "<= 0.75 x", ("lsap", "e4e"), "nscd", _below(0.75)),
    _claim("LSAP: perceptual distance", "<= 1 x", ("lsap", "e4e"), "perceptual", _below(1.0)),
    _claim("LSAP: quality under edit", "< 1 x", ("lsap", "e4e"), "frechet_edited", _below(0.9999)),
    _claim("Cycle: MSE of the W pivot", "<= 0.8 x", ("cycle", "w-encoder"), "mse", _below(0.8)),
    _claim("Cycle: consistency of edits", "<= 1 x", ("cycle", "w-encoder"), "lec", _below(1.0)),
    _claim(
        "cycle_refine beats cycle", "MSE < 1 x", ("cycle_refine", "cycle"), "mse", _below(0.9999)
    ),
    _claim("cycle+pti reconstructs", "MSE <= 1 x", ("cycle+pti", "e4e+pti"), "mse", _below(1.0)),
    _claim(
        "cycle+pti under edit",
        "< 1 x",
        ("cycle+pti", "e4e+pti"),
        "frechet_edited",
        _below(0.9999),
    ),
    _claim("CLCAE: MSE against e4e", "<= 0.5 x", ("clcae", "e4e"), "mse", _below(0.5)),
    _claim("CLCAE: an edit ages as far", ">= 0.8 x", ("clcae", "e4e"), "age_change", _above(0.8)),
    _claim(
        "CLCAE, half of the map kept: an edit ages as far",
        ">= 0.8 x",
        ("clcae-half", "e4e"),
        "age_change",
        _above(0.8),
    ),
    _claim("RefineStyle two-stage: MSE", "<= 0.5 x", ("refine", "e4e"), "mse", _below(0.5)),
    _claim(
        "RefineStyle two-stage: an edit ages as far",
        ">= 0.85 x",
        ("refine", "e4e"),
        "age_change",
        _above(0.85),
    ),
    _claim("RefineStyle one-stage: MSE", "<= 1 x", ("refine-one-stage", "e4e"), "mse", _below(1.0)),
    _claim(
        "refine_opt: perceptual distance of PTI",
        "<= 1 x",
        ("refine_opt", "e4e+pti"),
        "perceptual",
        _below(1.0),
    ),
    _claim(
        "refine_opt: images per hour of PTI",
        ">= 10 x",
        ("refine_opt", "e4e+pti"),
        "images_per_s",
        _above(10.0),
    ),
    _claim(
        "refine_opt: stored size against the generator's",
        "<= 1/50",
        ("refine_opt", "generator"),
        "bytes_per_picture",
        _below(1 / 50),
    ),
)


def judge(result: Mapping[str, Any]) -> list[ClaimResult]:
    """Every claim against the table.

    Args:
        result: the benchmark's JSON: `rows` by chain, `perceptual`, `generator_bytes`.
    """
    rows = {**result["rows"], "generator": {"bytes_per_picture": result["generator_bytes"]}}
    return [claim.verdict(rows, result["perceptual"]) for claim in CLAIMS]


def _number(rows: Rows, name: str, column: str) -> float | None:
    value = rows.get(name, {}).get(column)
    return None if value is None else float(value)
