"""Words for values: numbers, counted nouns, durations, dates."""

import math


def number(value: float) -> str:
    """Counts with thousands apart; other values with three significant digits, `-` when missing."""
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return "-"
    if value and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.2e}"
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{max(digits, 0)}f}"


def counted(count: int, noun: str) -> str:
    return f"{number(count)} {noun}{'' if count == 1 else 's'}"


def time_unit(seconds: float) -> tuple[str, float]:
    if seconds < 120:
        return "s", 1.0
    return ("min", 60.0) if seconds < 7200 else ("h", 3600.0)


def when(iso: str) -> str:
    """`2026-11-20T17:56:01.123+00:00` -> `2026-11-20 17:56 UTC`."""
    return f"{iso[:10]} {iso[11:16]} UTC" if iso else "not yet"


def duration(seconds: float) -> str:
    """`4.2 ms`, `0.42 s`, `12.3 s`, `4 min 12 s`, `3 h 20 min`, `2 d 5 h`."""
    if 0 < seconds < 0.1:
        return f"{1000 * seconds:.1f} ms"
    if seconds < 120:
        return f"{seconds:.{2 if seconds < 10 else 1}f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400:,} d {whole % 86400 // 3600} h"


def size(num_bytes: float) -> str:
    """ "1.4 GB": decimal, as object stores bill."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"
