"""`make bench`: every figure of the README, measured here and printed as one table.

Writes benchmarks/results.json and benchmarks/results.md beside this file. `--only PART` measures
one part and keeps the others as they were last measured. `--peers FOLDER` adds other people's
programs; `benchmarks.peers` says their names.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks import domains, peers, pipeline, synthesis

HERE = Path(__file__).parent
PARTS = ("pipeline", "synthesis", "domains", "peers")
WANTED_S = {"inline": 6, "ray": 10}
"""Wall time of a small run, on an idle machine."""


def table(found: dict[str, Any]) -> str:
    """The figures as markdown, each part with the machine and the date it was measured on."""
    text = "# Benchmarks\n\n`make bench` measures all of this and writes it here.\n"
    tables = (_pipeline_table, _synthesis_table, _domains_table, _peers_table)
    parts = zip(PARTS, tables, strict=True)
    return text + "".join(show(found[part]) for part, show in parts if found.get(part))


def _heading(title: str, machine: dict[str, str]) -> list[str]:
    where = f"{machine['date']}, {machine['chip']}, torch {machine['torch']}."
    return ["", f"## {title}", "", where, ""]


def _pipeline_table(p: dict[str, Any]) -> str:
    lines = [
        *_heading("Pipeline", p["machine"]),
        f"{p['images']} pictures, e4e, {p['rounds']} rounds; the bare loops have one thread each.",
        "",
        "| what | measured | wanted |",
        "|---|---|---|",
    ]
    notes = []
    for engine, found in p["engines"].items():
        what = f"pipeline, {engine} / {found['workers']} bare loops"
        rates = f"{found['pipeline_images_per_s']:.0f} / {found['bare_images_per_s']:.0f}"
        start = found["start_up"]
        lines += [
            f"| {what}, images a second of CPU | {found['pipeline / bare, CPU']:.2f} | >= 0.95 |",
            f"| the same, images/s | {found['pipeline / bare']:.2f} ({rates}) | >= 0.95 |",
            f"| `refinery invert` of {pipeline.STARTED} pictures, {engine}, wall (CPU) | "
            f"{start['wall_s']:.1f} s ({start['cpu_s']:.1f} s) | < {WANTED_S[engine]} s |",
        ]
        last = found["last_round"]
        stages = ", ".join(f"{name} {value} s" for name, value in last["stage_seconds"].items())
        notes.append(
            f"Stages of the last round, {engine}, summed over workers: {stages}; start-up "
            f"{last['startup_s']:.1f} s, outside the clock."
        )
    return "\n".join([*lines, "", *notes]) + "\n"


def _synthesis_table(s: dict[str, Any]) -> str:
    what = f"synthesis {s['resolution']} px, batch {s['batch']}, rank-{s['rank']} residuals"
    rows = [
        ("refined / plain, time", s["refined / plain, time"], "<= 1.20"),
        ("refined / grouped twin, time", s["refined / grouped, time"], "<= 0.65"),
        ("refined / grouped twin, peak memory", s["refined / grouped, peak memory"], "<= 0.35"),
    ]
    lines = _heading("Synthesis, config-f widths", s["machine"])
    lines += ["| what | measured | wanted |", "|---|---|---|"]
    lines += [f"| {what}: {name} | {value:.2f} | {wanted} |" for name, value, wanted in rows]
    lines += [
        f"| W+ step, {s['resolution']} px, batch {size}: frozen / grouped twin, time | "
        f"{step['ratio']:.2f} | <= 0.70 |"
        for size, step in s["w_plus_step"].items()
    ]
    seconds = ", ".join(f"{name} {value:.2f} s" for name, value in s["seconds"].items())
    memory = ", ".join(f"{name} {value:.0f} MiB" for name, value in s["peak_mib"].items())
    lines += ["", f"Seconds a batch: {seconds}. Peak memory: {memory}.", ""]
    lines += ["| precision | images/s | relative error |", "|---|---|---|"]
    lines += [
        f"| {row['precision']} | {row['images_per_s']:.2f} | {row['relative_error']:.1e} |"
        for row in s["precision"]
    ]
    return "\n".join(lines) + "\n"


def _domains_table(d: dict[str, Any]) -> str:
    count, step = len(domains.TEXTS), d["steps"]
    lines = [*_heading("Domains", d["machine"]), "| what | measured | wanted |", "|---|---|---|"]
    lines += [
        f"| rendering at 64 px, batch {row['batch']}: plain / {what}, CPU time | "
        f"{row['plain'] / row[key]:.2f} ({row['plain']:.1f} / {row[key]:.1f} ms) | {goal} |"
        for row in d["renders"]
        for what, key, goal in (
            ("one domain for all", "one", ">= 0.95"),
            ("each picture its own", "each", "-"),
        )
    ]
    lines.append(
        f"| a step of {count} domains / of one, {domains.CODES} codes each, CPU time | "
        f"{step[str(count)] / step['1']:.2f} ({step['1']:.0f} ms for one) | <= 1.6 on a GPU |"
    )
    return "\n".join(lines) + "\n"


def _peers_table(p: dict[str, Any]) -> str:
    commits = ", ".join(f"{name} {commit}" for name, commit in p["commits"].items())
    lines = [
        *_heading("Beside other programs", p["machine"]),
        f"The same weights in both, CPU milliseconds in turn, {p['rounds']} rounds, one thread; "
        "their CUDA extensions give way to their own fallbacks. The difference is the largest of "
        "the outputs (of the gradient of the codes for a W+ step) over the largest value; of PTI, "
        f"what it is of the change by tuning. {commits}.",
        "",
        "| what | ours | theirs | ms | ms | theirs / ours | wanted | difference |",
        "|---|---|---|---:|---:|---:|---|---:|",
    ]
    lines += [
        f"| {row['what']} | {row['form']} | {row['peer']} | {row['ours_ms']:.0f} | "
        f"{row['theirs_ms']:.0f} | {row['ratio']:.2f} | > 1 | {row['difference']:.0e} |"
        for row in p["rows"]
    ]
    return "\n".join(lines) + "\n"


def measure(
    part: str, rounds: int, resolution: int, checkouts: Path | None
) -> dict[str, Any] | None:
    """One part's figures; None where its data is absent."""
    if part == "domains":
        return domains.run(domains.BATCHES, domains.ROUNDS)
    if part == "peers":
        return checkouts and peers.compare(checkouts, resolution, peers.BATCHES, rounds)
    if part == "synthesis":
        return synthesis.run(resolution, 8, 4, rounds)
    if not any(pipeline.default_data().glob("train64-*.parquet")):
        sys.stderr.write(
            f"no faces in {pipeline.default_data()}: the pipeline is not measured; "
            "set REFINERY_SHARED to the shared data\n"
        )
        return None
    return pipeline.compare(pipeline.default_data(), pipeline.IMAGES, rounds)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--only", choices=PARTS)
    parser.add_argument("--peers", type=Path, help="folder of checkouts (see benchmarks.peers)")
    args = parser.parse_args()
    path = HERE / "results.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for part in [args.only] if args.only else PARTS:
        found[part] = measure(part, args.rounds, args.resolution, args.peers) or found.get(part)
        path.write_text(json.dumps(found, indent=2) + "\n")
    text = table(found)
    (HERE / "results.md").write_text(text)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
