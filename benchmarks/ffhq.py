"""What the walk of docs/ffhq.md costs: `python -m benchmarks.ffhq 256 1024` writes ffhq.md beside
this file; a size that is not named stays as it was measured last.

Each command is a process of its own, on a checkpoint of official layout with random weights and on
photographs of one face, the astronaut's of scikit-image, each moved by another amount.
"""

import argparse
import contextlib
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from skimage.data import astronaut

from benchmarks.official import write_e4e
from tasks.benchmark.machine import describe_machine
from tasks.report.forecast import compared
from tasks.run.ledger import read_markers
from tasks.run.prediction import read_prediction

PAGE, FIGURES = (Path(__file__).with_name(f"ffhq.{suffix}") for suffix in ("md", "json"))
GUIDE = Path(__file__).parents[1] / "docs/ffhq.md"
COUNTS = {256: 5, 1024: 3}
"""Photographs by resolution."""
PHOTO_PX = 1536
POLL_S = 0.02
QUERY = "SELECT sample_key, psnr FROM samples ORDER BY psnr"
INTRODUCTION = """# FFHQ-size work

`python -m benchmarks.ffhq 256 1024` writes this page: the walk of [the guide](../docs/ffhq.md) with
its config, in one worker without Ray (`--engine inline`), on photographs of 1536 x 1536 pixels with
a face each. The weights are random, in files of the official layout; memory and time are those of
trained ones. `perceptual = "refinery"` in place of LPIPS, whose weights are a download.

All times are CPU seconds of one core. "A picture" is what each picture beyond the first adds to a
run. "All" and the largest resident memory are of the whole command: start-up, weights read twice
(1.0 and 1.2 GB), the report, and in `plan`, which comes first, the statistics of the generator.
Learning is one step of two codes with two held-out ones: most of it are renders before and after.
What `plan` says of time is wall time, and goes with all else that the machine does; see the load.
"""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one command.

    Attributes:
        each_s: CPU seconds that one picture more takes; None of a command that is not a run.
    """

    step: str
    cpu_s: float
    memory_bytes: int
    each_s: float | None = None


def command(step: str, *arguments: str) -> Cost:
    """Carry out `refinery ...` and measure it; its output goes to our error stream."""
    code = [sys.executable, "-m", "pipeline.cli", *arguments]
    pid = os.posix_spawn(code[0], code, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, 2, 1)])
    peak = 0
    while True:  # what `wait4` calls the largest memory begins with this process's own
        peak = max(peak, resident_peak(pid))
        time.sleep(POLL_S)
        ended, status, usage = os.wait4(pid, os.WNOHANG)
        if ended:
            break
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{' '.join(arguments)}: exit code {os.waitstatus_to_exitcode(status)}")
    return Cost(step=step, cpu_s=usage.ru_utime + usage.ru_stime, memory_bytes=peak)


def resident_peak(pid: int) -> int:
    """Bytes; 0 of a process that has ended."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) * 1024 if found else 0


def run(step: str, count: int, kind: str, source: str, out: str, *flags: str) -> Cost:
    """A run of one picture, then one of all: the difference is what pictures take."""
    flags = (*flags, "--engine", "inline", "--no-flow")
    one = command(step, kind, source, f"{out}-one", *flags, "--limit", "1")
    whole = command(step, kind, source, out, *flags)
    return replace(whole, each_s=(whole.cpu_s - one.cpu_s) / (count - 1))


def write_photos(folder: Path, count: int) -> Path:
    folder.mkdir()
    large = Image.fromarray(astronaut()).resize((PHOTO_PX, PHOTO_PX), Image.Resampling.LANCZOS)
    for number in range(count):
        moved = np.roll(np.asarray(large), 16 * number, axis=1)
        Image.fromarray(moved).save(folder / f"{number}.jpg", quality=95)
    return folder


def walk(count: int) -> Iterator[Cost]:
    """The page's commands, in the current folder."""
    photos, checkpoint = str(write_photos(Path("photos"), count)), "e4e_ffhq_encode.pt"
    Path("ffhq.toml").write_text(GUIDE.read_text().partition("```toml\n")[2].partition("```")[0])
    Path("sefa.toml").write_text(f'generator = "{checkpoint}"\ncount = 1\nlayers = [2, 3]\n')
    flags = ["--config", "ffhq.toml", "--set", "perceptual=refinery"]
    yield command("plan", "plan", photos, "faces", *flags, "--engine", "inline")
    yield run("invert", count, "invert", photos, "faces", *flags)
    command("", "directions", "fit", "sefa", "--config", "sefa.toml")
    (direction,) = Path("directions").glob("*.json")
    yield run("edit, a direction", count, "edit", "faces", "older", "--edit", f"{direction}=2")
    learn = ["--text", "fantasy painting of a face", "--set", f"generator={checkpoint}"]
    learn += ["--set", "steps=1", "--set", "batch=2", "--set", "validation_codes=2"]
    yield command("learn a domain, 1 step", "adapt", "storybook", *learn)
    yield run("edit, a domain", count, "edit", "faces", "styles", "--domain", "storybook")
    yield command("query", "query", "faces", QUERY)
    yield command("report", "report", "faces")


def rows(costs: Iterable[Cost], resolution: int) -> Iterator[str]:
    for cost in costs:
        each = "" if cost.each_s is None else f"{cost.each_s:.2f}"
        memory = f"{cost.memory_bytes / 1e9:.2f}"
        yield f"| {resolution} | {cost.step} | {each} | {cost.cpu_s:.1f} | {memory} |"


def predicted(resolution: int) -> Iterator[str]:
    """What `plan` said of the run in this folder, beside what it took."""
    said = read_prediction("faces")
    assert said is not None
    for found in compared(said, list(read_markers("faces").values())):
        yield (
            f"| {resolution} | {found.name} | {found.predicted} | {found.took} "
            f"| {found.difference} |"
        )


def measure(resolution: int) -> dict[str, Any]:
    """The rows of one size, and what they were measured on."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        write_e4e(Path("e4e_ffhq_encode.pt"), resolution)
        costs = list(rows(walk(COUNTS[resolution]), resolution))
        forecasts = list(predicted(resolution))
    machine = describe_machine() | {"load": " ".join(f"{each:.1f}" for each in os.getloadavg())}
    return {"machine": machine, "costs": costs, "forecasts": forecasts}


def page(found: Mapping[str, Mapping[str, Any]]) -> str:
    """All sizes that were measured, as markdown."""
    sizes = [found[key] for key in sorted(found, key=int)]
    lines = [INTRODUCTION]
    for key in sorted(found, key=int):
        machine = found[key]["machine"]
        lines.append(
            f"{key} px: {COUNTS[int(key)]} photographs, {machine['chip']}, torch "
            f"{machine['torch']}, {machine['date']}, load {machine['load']} at the end.\n"
        )
    lines += [
        "| px | command | a picture, CPU s | all, CPU s | memory, GB |",
        "|---:|---|---:|---:|---:|",
        *(line for size in sizes for line in size["costs"]),
        "",
        "What `refinery plan` said of the inversion, and what it took:",
        "",
        "| px | | plan | run | difference |",
        "|---:|---|---|---|---|",
        *(line for size in sizes for line in size["forecasts"]),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("resolution", type=int, nargs="+", choices=sorted(COUNTS))
    found = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    for resolution in parser.parse_args().resolution:
        found[str(resolution)] = measure(resolution)
        FIGURES.write_text(json.dumps(found, indent=1) + "\n")
        PAGE.write_text(page(found))


if __name__ == "__main__":
    main()
