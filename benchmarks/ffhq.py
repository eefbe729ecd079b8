"""What the walk of docs/ffhq.md costs: `python -m benchmarks.ffhq 256 1024` writes ffhq.md beside
this file; a size that is not named stays as it was measured last.

Each command is a process of its own, on a checkpoint of official layout with random weights and on
photographs of one face, the astronaut's of scikit-image, each moved by another amount.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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
COUNTS = {256: 8, 1024: 4}
"""Photographs by resolution."""
PHOTO_PX = 1536
QUERY = "SELECT sample_key, psnr FROM samples ORDER BY psnr"
INTRODUCTION = """# FFHQ-size work

`python -m benchmarks.ffhq 256 1024` writes this page: the walk of [the guide](../docs/ffhq.md) with
its config, in one worker without Ray (`--engine inline`), on photographs of 1536 x 1536 pixels with
a face each. The weights are random, in files of the official layout; memory and time are those of
trained ones. `perceptual = "refinery"` in place of LPIPS, whose weights are a download.

"A picture" is the mean of the worker's busy time over the run's pictures, start-up left out. Wall
time, CPU time and the largest resident memory are of the whole command, start-up, statistics of the
generator and report included. Learning is one step of two codes with two held-out ones: most of its
time are renders before and after it.
"""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one command."""

    step: str
    wall_s: float
    cpu_s: float
    memory_bytes: int
    run: str | None = None
    """That it made."""


def command(step: str, *arguments: str, run: Path | None = None) -> Cost:
    """Carry out `refinery ...` and measure it; its output goes to our error stream."""
    started = time.perf_counter()
    code = [sys.executable, "-m", "pipeline.cli", *arguments]
    pid = os.posix_spawn(code[0], code, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, 2, 1)])
    _, status, usage = os.wait4(pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{' '.join(arguments)}: exit code {os.waitstatus_to_exitcode(status)}")
    return Cost(
        step=step,
        wall_s=time.perf_counter() - started,
        cpu_s=usage.ru_utime + usage.ru_stime,
        memory_bytes=usage.ru_maxrss * 1024,
        run=None if run is None else str(run),
    )


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
    inline = ["--engine", "inline"]
    flags = ["--config", "ffhq.toml", *inline, "--set", "perceptual=refinery"]
    runs = {name: Path(name) for name in ("faces", "older", "styles")}
    yield command("plan", "plan", photos, "faces", *flags)
    yield command("invert", "invert", photos, "faces", *flags, "--no-flow", run=runs["faces"])
    command("", "directions", "fit", "sefa", "--config", "sefa.toml")
    (direction,) = Path("directions").glob("*.json")
    edit = ["--edit", f"{direction}=2", *inline, "--no-flow"]
    yield command("edit, a direction", "edit", "faces", "older", *edit, run=runs["older"])
    learn = ["--text", "fantasy painting of a face", "--set", f"generator={checkpoint}"]
    learn += ["--set", "steps=1", "--set", "batch=2", "--set", "validation_codes=2"]
    yield command("learn a domain, 1 step", "adapt", "storybook", *learn)
    edit = ["--domain", "storybook", *inline, "--no-flow"]
    yield command("edit, a domain", "edit", "faces", "styles", *edit, run=runs["styles"])
    yield command("query", "query", "faces", QUERY)
    yield command("report", "report", "faces")


def rows(costs: Sequence[Cost], resolution: int) -> Iterator[str]:
    for cost in costs:
        markers = [] if cost.run is None else list(read_markers(cost.run).values())
        count = sum(marker.rows - marker.failed for marker in markers)
        each = sum(sum(m.seconds.values()) for m in markers) / count if count else None
        yield (
            f"| {resolution} | {cost.step} | {'' if each is None else f'{each:.2f}'} | "
            f"{cost.wall_s:.1f} | {cost.cpu_s:.1f} | {cost.memory_bytes / 1e9:.2f} |"
        )


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
        costs = list(rows(list(walk(COUNTS[resolution])), resolution))
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
        "| px | command | a picture, s | wall, s | CPU, s | memory, GB |",
        "|---:|---|---:|---:|---:|---:|",
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
