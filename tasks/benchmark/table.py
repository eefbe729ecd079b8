"""The benchmark's result as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from tasks.benchmark.claims import ClaimResult, judge
from tasks.benchmark.costs import TIMED

Heads = tuple[tuple[str, str, str], ...]

HEADS: dict[str, Heads] = {
    "Reconstruction": (
        ("mse", "MSE ↓", "{:.4f}"),
        ("psnr", "PSNR ↑", "{:.2f}"),
        ("ssim", "SSIM ↑", "{:.3f}"),
        ("perceptual", "", "{:.4f}"),
        ("identity", "identity ↑", "{:.3f}"),
        ("identity_judge", "identity, judge ↑", "{:.3f}"),
        ("nscd", "NSCD ↓", "{:.4f}"),
        ("frechet_reconstruction", "Frechet ↓", "{:.4f}"),
    ),
    "Under edit": (
        ("age_change", "age, years ↑", "{:.1f}"),
        ("smile_change", "smile, logits ↑", "{:.2f}"),
        ("identity_edited", "identity ↑", "{:.3f}"),
        ("identity_judge_edited", "identity, judge ↑", "{:.3f}"),
        ("lec", "LEC ↓", "{:.3f}"),
        ("frechet_edited", "Frechet ↓", "{:.4f}"),
        ("drift_edited", "drift ↓", "{:.4f}"),
    ),
    "Cost": (
        ("parameters", "parameters, M", "{:.2f}"),
        ("images_per_s", "images/s", "{:.2f}"),
        ("seconds_per_image", "s/image", "{:.3f}"),
        ("bytes_per_picture", "kB kept", "{:.1f}"),
    ),
}
"""By part of the page: (key of a row, head, form)."""
SCALE = {"parameters": 1e-6, "bytes_per_picture": 1e-3}
LEGEND = """\
MSE on [-1, 1]; PSNR in dB with peak 2 (10 log10(4 / MSE), mean over pictures); SSIM on [0, 1], at
most 1; {perceptual} is {kind}; identity: cosine of face embeddings with the input picture, by
dlib's network, which identity losses may use, and by SFace, the judge, which no loss sees{lacking};
Frechet is the Frechet trunk distance against the input pictures
(not FID; biased by {pictures} pictures, comparable inside this table only). NSCD: codes' distance
from the generator's own styles. LEC: latent editing consistency in units of the spread of W, blank
where the chain begins with an optimisation. Under edit: mean over {edits}; age and smile: change of
the edited attribute in the edit's direction, by the bundled scorer, against the reconstruction;
identity of the edited against the input picture. Drift: perceptual distance outside the edit's
place. images/s per worker with one thread, batch {batch}; s/image: CPU time alone on one thread,
mean of {timed} pictures after a warm-up; ± is the 95 % confidence interval of the mean (Student's
t), over shards for images/s. kB kept: beside the code, per picture."""


def markdown(result: Mapping[str, Any]) -> str:
    """The whole page: head, table, claims, legend."""
    head = [f"# {result['title']}", "", f"`{result['command']}`", ""]
    machine = "; ".join(f"{k}: {v}" for k, v in result["machine"].items())
    about = [
        f"{result['pictures']} pictures of `{result['data']}`, generator "
        f"`{result['generator']}`. {machine}.",
        "",
    ]
    claims = ["", "## Claims", "", *claims_table(judge(result)), ""]
    is_lpips = result["perceptual"].startswith("lpips")
    missing = "".join(f" ({why})" for why in result["missing_faces"].values())
    legend = LEGEND.format(
        perceptual=f"`{result['perceptual']}`",
        kind="LPIPS" if is_lpips else "the distance in the bundled trunk (not LPIPS)",
        lacking=missing,
        pictures=result["pictures"],
        edits=", ".join(result["edits"]) or "no edit (no direction ships for this generator)",
        batch=result["batch"],
        timed=TIMED,
    )
    tables = [
        line for part in HEADS for line in ("", f"## {part}", "", *method_table(result, part))
    ]
    notes = [f"- {name}: {note}" for name, note in result["notes"].items() if note]
    notes = ["", *notes] if notes else []
    return "\n".join([*head, *about, *tables[1:], *notes, *claims, legend, ""])


def method_table(result: Mapping[str, Any], part: str) -> list[str]:
    """One line for each chain; in the first part, those without weights say what to train."""
    rows: Mapping[str, Mapping[str, Any]] = result["rows"]
    columns = [
        h
        for h in HEADS[part]
        if any(_value(row, h[0], result) is not None for row in rows.values())
    ]
    titles = [title or f"`{result['perceptual']}` ↓" for _, title, _ in columns]
    lines = [
        f"| method | {' | '.join(titles)} |",
        f"|---|{'---:|' * len(columns)}",
    ]
    for name in result["order"]:
        if name in rows:
            cells = [_cell(rows[name], key, form, result) for key, _, form in columns]
        elif part == next(iter(HEADS)):
            cells = [result["missing"][name], *[""] * (len(columns) - 1)]
        else:
            continue
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def claims_table(verdicts: Sequence[ClaimResult]) -> list[str]:
    """Claim, wanted, measured, met or not."""
    words = {True: "met", False: "**not met**", None: "open"}
    return [
        "| claim | wanted | measured | |",
        "|---|---|---|---|",
        *(f"| {v.claim} | {v.wanted} | {v.measured} | {words[v.is_met]} |" for v in verdicts),
    ]


def _value(row: Mapping[str, Any], key: str, result: Mapping[str, Any]) -> float | None:
    value = row.get(result["perceptual"] if key == "perceptual" else key)
    return None if value is None else float(value) * SCALE.get(key, 1.0)


def _cell(row: Mapping[str, Any], key: str, form: str, result: Mapping[str, Any]) -> str:
    value, width = _value(row, key, result), _value(row, f"{key}_ci", result)
    if value is None:
        return ""
    return form.format(value) if width is None else f"{form.format(value)} ± {form.format(width)}"
