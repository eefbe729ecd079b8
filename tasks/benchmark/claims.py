"""What the papers claim, held against what was measured; and that what reconstructs still edits."""

import math
from collections.abc import Mapping
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


@dataclass(frozen=True)
class _Ratio:
    """One number of a row over that of another row (or of the table's head), and its bounds."""

    claim: str
    wanted: str
    value: str
    over: str
    column: str
    most: float = math.inf
    least: float = 0.0

    def verdict(self, rows: Rows, perceptual: str) -> ClaimResult:
        column = perceptual if self.column == "perceptual" else self.column
        a, b = (rows.get(name, {}).get(column) for name in (self.value, self.over))
        if a is None or not b:
            missing = [name for name, x in ((self.value, a), (self.over, b)) if x is None]
            measured = f"not measured: {column} of {' and '.join(missing) or self.over}"
            is_met = None
        else:
            measured = f"{a:.4g} / {b:.4g} = {a / b:.4g}"
            is_met = self.least <= a / b <= self.most
        return ClaimResult(claim=self.claim, wanted=self.wanted, measured=measured, is_met=is_met)


LESS = 0.9999
FAR, AGE = "an edit ages as far", "age_change"
PTI, FURTHER = "e4e+pti", "clcae-further"
CLAIMS = (
    _Ratio("ReStyle corrects e4e", "MSE < 1 x", "restyle", "e4e", "mse", LESS),
    _Ratio("LSAP: NSCD below e4e's", "<= 0.75 x", "lsap", "e4e", "nscd", 0.75),
    _Ratio("LSAP: perceptual distance", "<= 1 x", "lsap", "e4e", "perceptual", 1.0),
    _Ratio("LSAP: quality under edit", "< 1 x", "lsap", "e4e", "frechet_edited", LESS),
    _Ratio("Cycle: MSE of the W pivot", "<= 0.8 x", "cycle", "w-encoder", "mse", 0.8),
    _Ratio("Cycle: consistency of edits", "<= 1 x", "cycle", "w-encoder", "lec", 1.0),
    _Ratio("cycle_refine beats cycle", "MSE < 1 x", "cycle_refine", "cycle", "mse", LESS),
    _Ratio("cycle+pti reconstructs", "MSE <= 1 x", "cycle+pti", PTI, "mse", 1.0),
    _Ratio("cycle+pti under edit", "< 1 x", "cycle+pti", PTI, "frechet_edited", LESS),
    _Ratio("CLCAE: MSE against e4e", "<= 0.5 x", "clcae", "e4e", "mse", 0.5),
    _Ratio(f"CLCAE: {FAR}", ">= 0.8 x", "clcae", "e4e", AGE, least=0.8),
    _Ratio(f"CLCAE, half of the map kept: {FAR}", ">= 0.8 x", "clcae-half", "e4e", AGE, least=0.8),
    _Ratio(f"CLCAE, edits half as far again: {FAR}", ">= 0.8 x", FURTHER, "e4e", AGE, least=0.8),
    _Ratio("RefineStyle two-stage: MSE", "<= 0.5 x", "refine", "e4e", "mse", 0.5),
    _Ratio(f"RefineStyle two-stage: {FAR}", ">= 0.85 x", "refine", "e4e", AGE, least=0.85),
    _Ratio("RefineStyle one-stage: MSE", "<= 1 x", "refine-one-stage", "e4e", "mse", 1.0),
    _Ratio(
        "refine_opt: perceptual distance of PTI", "<= 1 x", "refine_opt", PTI, "perceptual", 1.0
    ),
    _Ratio(
        "refine_opt: images per hour of PTI",
        ">= 10 x",
        "refine_opt",
        PTI,
        "images_per_s",
        least=10.0,
    ),
    _Ratio(
        "refine_opt: stored size against the generator's",
        "<= 1/50",
        "refine_opt",
        "generator",
        "bytes_per_picture",
        most=1 / 50,
    ),
)


def judge(result: Mapping[str, Any]) -> list[ClaimResult]:
    """Every claim against the table.

    Args:
        result: the benchmark's JSON: `rows` by chain, `perceptual`, `generator_bytes`.
    """
    rows = {**result["rows"], "generator": {"bytes_per_picture": result["generator_bytes"]}}
    return [claim.verdict(rows, result["perceptual"]) for claim in CLAIMS]
