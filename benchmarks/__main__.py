"""`make bench`: every figure of the README, measured here and printed as one table.

Writes benchmarks/results.json and benchmarks/results.md beside this file.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks import pipeline, synthesis

HERE = Path(__file__).parent


def table(found: dict[str, Any]) -> str:
    """The figures as markdown."""
    s, p = found["synthesis"], found["pipeline"]
    lines = [
        "# Benchmarks",
        "",
        f"`make bench`, {s['machine']['date']}, {s['machine']['chip']}, "
        f"torch {s['machine']['torch']}.",
        "",
        "| what | measured | wanted |",
        "|---|---|---|",
    ]
    if p is not None:
        lines += [
            f"| pipeline / bare loop, images/s ({p['images']} pictures, e4e) | "
            f"{p['pipeline / bare']:.2f} ({p['pipeline_images_per_s']:.0f} / "
            f"{p['bare_images_per_s']:.0f}) | >= 0.90 |",
        ]
    b, r, px = s["batch"], s["rank"], s["resolution"]
    rows = [
        ("refined / plain, time", s["refined / plain, time"], "<= 1.20"),
        ("refined / grouped twin, time", s["refined / grouped, time"], "<= 0.65"),
        ("refined / grouped twin, peak memory", s["refined / grouped, peak memory"], "<= 0.35"),
    ]
    lines += [
        f"| synthesis {px} px, batch {b}, {b} different rank-{r} residuals: {name} | {value:.2f} "
        f"| {wanted} |"
        for name, value, wanted in rows
    ]
    lines += [
        f"| W+ step, {px} px, batch {size}: frozen / grouped twin, time | {step['ratio']:.2f} "
        "| <= 0.70 |"
        for size, step in s["w_plus_step"].items()
    ]
    lines += ["", "| precision | images/s | relative error |", "|---|---|---|"]
    lines += [
        f"| {row['precision']} | {row['images_per_s']:.2f} | {row['relative_error']:.1e} |"
        for row in s["precision"]
    ]
    if p is not None:
        stages = ", ".join(f"{k} {v} s" for k, v in p["last_round"]["stage_seconds"].items())
        lines += [
            "",
            f"Stages of the last pipeline round, summed over workers: {stages}; start-up "
            f"{p['last_round']['startup_s']:.1f} s, outside the clock.",
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--resolution", type=int, default=256)
    args = parser.parse_args()
    found: dict[str, Any] = {"pipeline": None}
    if any(pipeline.default_data().glob("train64-*.parquet")):
        found["pipeline"] = pipeline.compare(pipeline.default_data(), 4990, args.rounds)
    else:
        sys.stderr.write(
            f"no faces in {pipeline.default_data()}: the pipeline is not measured; "
            "set REFINERY_SHARED to the shared data\n"
        )
    found["synthesis"] = synthesis.run(args.resolution, 8, 4, args.rounds)
    text = table(found)
    (HERE / "results.json").write_text(json.dumps(found, indent=2) + "\n")
    (HERE / "results.md").write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
