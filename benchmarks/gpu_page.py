"""The Markdown page of `make bench-gpu`, from its JSON."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]
Columns = Mapping[str, Callable[[Row], str]]

INTRODUCTION = """# Speed on a GPU

`make bench-gpu` measures all of this and writes it here. Generators are StyleGAN2 config f with
random weights, scaled so that pictures have a root mean square of 0.5. Times are medians of rounds
that run every form of a group; the spread is (largest - smallest) / median. fp32 is exact float32
(no TF32), tf32 lets float32 products use it, bf16 and fp16 are the convolutions alone (the rest is
float32), "bf16 + tf32" is both. cuDNN picks the fastest of the 4 algorithms that it thinks best,
except where a form says "deterministic": that is what the pipeline sets. Layouts are the project's
own choice (channels-last on a GPU), except where a form says "contiguous". "graph" replays a CUDA
graph; of a search's step, the loss and its gradient are graphs and the bookkeeping is not. Errors
are relative L2 and the largest difference, of pictures in their own units (white is 1, black -1),
of codes in those of W. Other implementations are not measured here.
"""


def number(key: str, digits: int = 3, scale: float = 1.0) -> Callable[[Row], str]:
    """A cell with a figure to some significant digits, "-" where there is none."""

    def cell(row: Row) -> str:
        value = row.get(key)
        if value is None:
            return "-"
        value *= scale
        return f"{value:.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"

    return cell


def form(row: Row) -> str:
    return f"{row['precision']}, {row['mode']}"


def text(key: str) -> Callable[[Row], str]:
    return lambda row: str(row[key])


SPREAD: Columns = {"spread": number("spread", 2), "ms": number("seconds", 3, 1e3)}
ERRORS: Columns = {
    "relative error": number("relative_error", 2),
    "largest error": number("max_error", 2),
}
PEAK: Columns = {"peak MiB": number("peak_mib")}
RATE: Columns = {"images/s": number("images_per_s"), **SPREAD}
PLACE: Columns = {"px": text("resolution"), "batch": text("batch"), "form": form}


def table(columns: Columns, rows: Sequence[Row]) -> list[str]:
    """Lines of a Markdown table."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(row) for cell in columns.values()) + " |" for row in rows]
    return lines


def page(state: Mapping[str, Any]) -> str:
    """Every group that was measured, and what was not and why."""
    groups: Mapping[str, Any] = state["groups"]

    def rows(*starts: str) -> list[Row]:
        chosen = [g["rows"] for name, g in groups.items() if name.startswith(starts)]
        return [row for found in chosen for row in found if "seconds" in row]

    m = state["machine"]
    versions = [f"{k} {m[k]}" for k in ("torch", "python", "cuda", "cudnn", "driver") if k in m]
    lines = [INTRODUCTION, f"{m['date']}, {m['chip']}; {', '.join(versions)}; `{m['command']}`."]
    if m["device"] == "cpu":
        lines += [
            "",
            "**No GPU here: smaller sizes, on the CPU.** No TF32, fp16, graphs, busy share.",
        ]
    if state["is_quick"]:
        lines += ["", "**Tiny networks (`--quick`): these figures mean nothing.**"]

    def section(title: str, columns: Columns, found: Sequence[Row]) -> None:
        if found:
            lines.extend(["", f"## {title}", "", *table(columns, found)])

    def rate(row: Row) -> str:
        giga = row["unit"] == "B/s"
        return f"{row['rate'] / (1e9 if giga else 1e12):.4g} {'GB/s' if giga else 'TFLOP/s'}"

    ceilings: Columns = {"what": text("name"), "rate": rate, "spread": number("spread", 2)}
    section("What the device can do", ceilings, rows("ceilings"))
    plain = rows("synthesis", "compile: synthesis")
    plain.sort(key=lambda row: row["resolution"])
    section("Synthesis, images/s", pivot(plain), pivot_rows(plain))
    flop: Columns = {"TFLOP/s": number("flop_per_s", 3, 1e-12)}
    ordered = sorted(plain, key=lambda row: (row["resolution"], row["batch"]))
    ratio: Columns = {"time / plain": number("time / plain")}
    section(
        "A different rank-4 residual for every picture (errors against the grouped twin)",
        {**PLACE, **RATE, **ratio, **ERRORS, **PEAK},
        rows("residuals"),
    )
    gradient: Columns = {"error of the gradient": number("relative_error", 2)}
    steps = rows("wplus", "refine_opt", "pti", "compile: wplus")
    section(
        "A step of a search, images/s",
        {"method": text("method"), **PLACE, **RATE, **gradient, **PEAK},
        steps,
    )
    codes: Columns = {"encoder": text("encoder"), **PLACE, **RATE, **ERRORS, **PEAK}
    section("e4e's encoder, images/s (errors of codes)", codes, rows("e4e"))
    watched = [row for row in rows("busy") if "busy" in row]
    busy: Columns = {
        "what": lambda row: row.get("method") or row.get("encoder") or "synthesis",
        **PLACE,
        "busy": number("busy"),
        "ms": number("seconds", 3, 1e3),
    }
    section("Share of the time in which the GPU computes", busy, watched)
    for row in watched:
        name = f"{busy['what'](row)}, {row['resolution']} px, batch {row['batch']}, {form(row)}"
        kernels = [{"kernel": f"`{k[:100]}`", "share": v} for k, v in row["kernels"].items()]
        columns: Columns = {"share": number("share", 2), "kernel": text("kernel")}
        lines += ["", f"Longest kernels of {name}:", "", *table(columns, kernels)]
    section("Every form of synthesis", {**PLACE, **RATE, **flop, **ERRORS, **PEAK}, ordered)
    failed = failures(groups)
    if failed:
        lines += ["", "## Not measured", "", *failed]
    return "\n".join(lines) + "\n"


def failures(groups: Mapping[str, Any]) -> list[str]:
    """One line for every row without a time, and for every profile that was not to be had."""
    lines = []
    for name, group in groups.items():
        for row in group["rows"]:
            why = row.get("error") or row.get("busy_error")
            if why:
                what = f", {form(row)}" if "mode" in row else ""
                lines.append(f"- {name}{what}: {why}")
    return lines


def _key(row: Row) -> tuple[Any, ...]:
    return row["resolution"], row["precision"], row["mode"]


def pivot(rows: Sequence[Row]) -> Columns:
    """A column for every batch, then the errors of the group's main batch."""
    batches = sorted({row["batch"] for row in rows})
    columns = {f"batch {b}": number(f"batch {b}") for b in batches}
    return {"px": text("resolution"), "form": form, **columns, **ERRORS}


def pivot_rows(rows: Sequence[Row]) -> list[Row]:
    """One row for every resolution and form."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        merged = found.setdefault(_key(row), dict(row))
        merged.setdefault(f"batch {row['batch']}", row["images_per_s"])
    return list(found.values())
