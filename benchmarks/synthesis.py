"""What a batch of different refined generators costs, beside plain synthesis and the grouped twin.

Run: python -m benchmarks.synthesis [--resolution 256] [--batch 8] [--rank 4] [--rounds 5]

Rounds are interleaved (every form once, then again), after one warm-up; the median is printed.
Peak memory is that of one synthesis in a fresh process, above what the process held before it
(weights and codes are in the latter).
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping

import torch

from models.losses.pixel import mse
from models.stylegan2.generator import Generator, GeneratorArchitecture
from models.stylegan2.residual import LowRank
from tasks.benchmark.machine import describe_machine

WIDTHS_F = {4: 512, 8: 512, 16: 512, 32: 512, 64: 512, 128: 256, 256: 128, 512: 64, 1024: 32}
"""Channels of StyleGAN2 config f (channel multiplier 2)."""


def make_generator(resolution: int) -> Generator:
    """A config-f generator with random weights: speed does not depend on their values."""
    torch.manual_seed(0)
    widths = {res: width for res, width in WIDTHS_F.items() if res <= resolution}
    generator = Generator(GeneratorArchitecture(resolution=resolution, widths=widths))
    return generator.eval().requires_grad_(False)


def make_residual(generator: Generator, batch: int, rank: int) -> dict[int, LowRank]:
    """A different residual for every sample on every 3x3 layer."""
    found = {}
    for index in range(generator.num_convs):
        _, o, i, k, _ = generator.conv(index).conv.weight.shape
        found[index] = LowRank(
            u=torch.randn(batch, o, rank) * 0.1, v=torch.randn(batch, rank, i, k, k) * 0.1
        )
    return found


def interleaved(
    tasks: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each task, over rounds that run every task once."""
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for round_index in range(rounds + 1):
        for name, task in tasks.items():
            started = clock()
            task()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if round_index:
                times[name].append(clock() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def forward_tasks(generator: Generator, batch: int, rank: int) -> dict[str, Callable[[], object]]:
    """Synthesis without residuals, with them, and the materialised twin with them."""
    device = generator.input.input.device
    w_plus = torch.randn(batch, generator.num_ws, generator.w_dim).to(device)
    residual = {k: r.to(device) for k, r in make_residual(generator, batch, rank).items()}

    def run(form: str, part: dict[int, LowRank] | None) -> Callable[[], object]:
        def task() -> object:
            generator.form = form  # type: ignore[assignment]
            with torch.inference_mode():
                return generator.synthesis(w_plus, residual=part)

        return task

    return {
        "plain": run("auto", None),
        "refined": run("auto", residual),
        "grouped twin": run("grouped", residual),
    }


def step_tasks(generator: Generator, batch: int) -> dict[str, Callable[[], object]]:
    """One W+ optimisation step (forward and backward) in the automatic and in the grouped form."""
    w_plus = torch.randn(batch, generator.num_ws, generator.w_dim).requires_grad_()
    target = torch.zeros(batch, 3, generator.resolution, generator.resolution)

    def run(form: str) -> Callable[[], object]:
        def task() -> object:
            generator.form = form  # type: ignore[assignment]
            w_plus.grad = None
            mse(generator.synthesis(w_plus), target).sum().backward()
            return w_plus.grad

        return task

    return {"step": run("auto"), "grouped twin": run("grouped")}


def peak_memory(name: str, resolution: int, batch: int, rank: int) -> float:
    """MiB that one synthesis adds to a fresh process's peak."""
    command = [sys.executable, "-m", "benchmarks.synthesis", "--memory-of", name]
    command += [f"--resolution={resolution}", f"--batch={batch}", f"--rank={rank}"]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _measure_memory(args: argparse.Namespace) -> float:
    generator = make_generator(args.resolution)
    if args.memory_of in ("step", "step grouped"):
        tasks = step_tasks(generator, args.batch)
        task = tasks["step" if args.memory_of == "step" else "grouped twin"]
    else:
        task = forward_tasks(generator, args.batch, args.rank)[args.memory_of]
    # Warm the library up on one small picture, so that its own buffers do not count.
    forward_tasks(make_generator(8), 1, args.rank)["grouped twin"]()
    before = _current_rss_mib()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # reset the peak (Linux)
    task()
    return _peak_rss_mib() - before


def _status_mib(key: str) -> float:
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(key):
                return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _current_rss_mib() -> float:
    return _status_mib("VmRSS")


def _peak_rss_mib() -> float:
    return _status_mib("VmHWM")


def precision_rows(generator: Generator, batch: int, rounds: int) -> list[dict[str, float | str]]:
    """Speed and error of reduced precision against the exact default."""
    w_plus = torch.randn(batch, generator.num_ws, generator.w_dim)
    generator.form = "auto"
    outputs: dict[str, torch.Tensor] = {}

    def run(name: str, dtype: torch.dtype | None) -> Callable[[], object]:
        def task() -> object:
            generator.compute_dtype = dtype
            with torch.inference_mode():
                outputs[name] = generator.synthesis(w_plus)
            return None

        return task

    tasks = {"float32": run("float32", None), "bfloat16": run("bfloat16", torch.bfloat16)}
    if torch.cuda.is_available():
        tasks["float16"] = run("float16", torch.float16)
    seconds = interleaved(tasks, rounds)
    generator.compute_dtype = None
    exact = outputs["float32"]
    return [
        {
            "precision": name,
            "images_per_s": batch / seconds[name],
            "relative_error": float((outputs[name] - exact).norm() / exact.norm()),
        }
        for name in tasks
    ]


def run(resolution: int, batch: int, rank: int, rounds: int) -> dict[str, object]:
    """Every figure of the table, as a JSON-ready dict."""
    generator = make_generator(resolution)
    seconds = interleaved(forward_tasks(generator, batch, rank), rounds)
    memory = {
        name: peak_memory(name, resolution, batch, rank)
        for name in ("plain", "refined", "grouped twin")
    }
    steps = {}
    for size in (1, batch):
        times = interleaved(step_tasks(generator, size), rounds)
        steps[size] = {**times, "ratio": times["step"] / times["grouped twin"]}
    return {
        "machine": describe_machine(),
        "resolution": resolution,
        "batch": batch,
        "rank": rank,
        "seconds": seconds,
        "peak_mib": memory,
        "refined / plain, time": seconds["refined"] / seconds["plain"],
        "refined / grouped, time": seconds["refined"] / seconds["grouped twin"],
        "refined / grouped, peak memory": memory["refined"] / memory["grouped twin"],
        "w_plus_step": steps,
        "precision": precision_rows(generator, batch, rounds),
    }


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        sys.stdout.write(f"{_measure_memory(args):.1f}\n")
        return
    found = run(args.resolution, args.batch, args.rank, args.rounds)
    sys.stdout.write(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
