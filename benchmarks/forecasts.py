"""What was predicted of runs, and what they took: `python -m benchmarks.forecasts [CASE ...]`
writes the section of reliability.md; a case that is not named stays as it was measured last.

Runs of pictures (64 px faces, `--data DIR`) are predicted by `refinery plan IN OUT`; those over
stored samples by their driver, after the first shards. Each command is a process of its own.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cpu_meter import TICKS, CpuMeter
from benchmarks.pipeline import default_data, prepare_input
from benchmarks.sections import write_section
from tasks.benchmark.machine import describe_machine
from tasks.report.forecast import forecast
from tasks.run.prediction import read_prediction

HERE = Path(__file__).parent
PAGE, FIGURES = HERE / "reliability.md", HERE / "forecasts.json"
INTRODUCTION = """## Predicted and real

`python -m benchmarks.forecasts`: `refinery plan IN OUT`, then `refinery invert IN OUT`, bundled
networks and faces of 64 px; edit and rescore, which are not planned, by what their driver predicts
after the first shards. Start-up is in neither. A cell has what was predicted, what it took, and by
how much that was more; "others" is what other programs had of the machine's cores during plan and
run: a plan is of the machine as it finds it.
"""


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        words: of the command, without its places.
        count: pictures of a run that is planned.
        kind: "edit" and "rescore" start from a run of e4e.
    """

    words: str
    count: int
    kind: str = "invert"


CODES = "--set output.pictures=[]"
OPTIMISED = "--method e4e --method refine_opt --set method.1.steps=10 --set batch=8"
CASES = {
    "e4e, inline": Case("--method e4e --engine inline", 1600),
    "e4e": Case("--method e4e", 2600),
    "e4e, codes alone": Case(f"--method e4e {CODES}", 2600),
    "clcae": Case("--method clcae", 1600),
    "refine, inline": Case("--method refine --engine inline", 600),
    "wplus, 4 steps": Case("--method wplus --set method.0.steps=4", 240),
    "e4e, refine_opt, 10 steps, inline": Case(f"{OPTIMISED} --engine inline", 96),
    "edit": Case("--edit age=2", 2500, "edit"),
    "rescore, inline": Case("--engine inline", 2500, "rescore"),
}


def refinery(*words: str) -> float:
    """Carry out one command; what it says goes to our error stream.

    Returns:
        The share of the machine's cores that others had meanwhile.
    """
    command = [sys.executable, "-m", "pipeline.cli", *words]
    with CpuMeter(os.getpid()) as meter:
        busy, own, began = busy_s(), meter.seconds(), time.monotonic()
        subprocess.run(command, check=True, stdout=sys.stderr)
        others_s = busy_s() - busy - (meter.seconds() - own)
    return max(others_s, 0.0) / (time.monotonic() - began) / (os.cpu_count() or 1)


def busy_s() -> float:
    """CPU seconds of the machine (Linux)."""
    _name, *ticks = Path("/proc/stat").read_text().partition("\n")[0].split()[:9]
    return sum(int(spent) for at, spent in enumerate(ticks) if at not in (3, 4)) / TICKS  # idle


def measure(case: Case, source: str, folder: Path) -> dict[str, Any]:
    """The figures of one case."""
    out, limit = str(folder / "run"), ["--limit", str(case.count)]
    words, others = case.words.split(), list[float]()
    if case.kind == "invert":
        others.append(refinery("plan", source, out, *words, *limit))
    else:
        base = str(folder / "base")
        refinery("invert", source, base, "--method", "e4e", "--no-flow", *limit)
        source, limit = base, []
    others.append(refinery(case.kind, source, out, *words, "--no-flow", *limit))
    said = read_prediction(out)
    assert said is not None
    found = {each.name: [each.predicted, each.took, each.difference] for each in forecast(out)}
    return {
        "rows": said.rows,
        "workers": said.workers,
        "figures": found,
        "others": others,
        "machine": describe_machine(),
    }


def section(found: dict[str, Any]) -> Iterator[str]:
    """The table, as markdown."""
    yield INTRODUCTION
    machines = {(m["chip"], m["torch"], m["date"]) for m in (f["machine"] for f in found.values())}
    yield from (f"{chip}, torch {torch}, {date}." for chip, torch, date in sorted(machines))
    yield ""
    yield "| run | pictures, workers | time | disk | memory of a worker | others |"
    yield "|---|---|---|---|---|---|"
    for name in (name for name in CASES if name in found):
        case = found[name]
        cells = [f"{a}, {b} ({change})" for a, b, change in case["figures"].values()]
        sizes = f"{case['rows']}, {case['workers']}"
        others = ", ".join(f"{share:.0%}" for share in case["others"])
        yield f"| {name} | {sizes} | {' | '.join(cells)} | {others} |"
    near = {
        figure: sum(
            abs(int(case["figures"][figure][2].split()[0])) <= 10 for case in found.values()
        )
        for figure in ("time", "disk", "memory of a worker")
    }
    yield ""
    yield f"Within 10 %, of {len(found)}: " + ", ".join(f"{k} {n}" for k, n in near.items()) + "."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}")
    parser.add_argument("--data", type=Path, default=default_data())
    asked = parser.parse_args()
    found = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        (place := Path(folder) / "in").mkdir()
        source = prepare_input(asked.data, place)
        for number, name in enumerate(asked.case or CASES):
            (own := Path(folder) / str(number)).mkdir()
            found[name] = measure(CASES[name], source, own)
            FIGURES.write_text(json.dumps(found, indent=1) + "\n")
            write_section(PAGE, "\n".join(section(found)) + "\n")


if __name__ == "__main__":
    main()
