"""`make bench-gpu`: the speed of synthesis, searches and encoders on a GPU, each with its error.

Needs torch, numpy, safetensors and jaxtyping alone. Without a GPU the same code measures smaller
sizes on the CPU. Writes a JSON file after every group of rows, and the same as a Markdown page
beside it. A group that the time does not allow is left out and says so.

Run: python -m benchmarks.gpu [--seconds N] [--out benchmarks/gpu.json] [--quick]
"""

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_page, gpu_rows
from benchmarks.gpu_rows import BASIC, SEARCHED, Bench, Row
from tasks.benchmark.machine import describe_machine

HERE = Path(__file__).parent
Group = tuple[str, float, Callable[[], list[Row]]]
"""Its name, the seconds that must be left to begin it, and what measures it."""


class GroupsToCome:
    """The groups to come, in order."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.groups: list[Group] = []

    def add(
        self, name: str, needs: float, measure: Callable[..., list[Row]], *arguments: Any
    ) -> None:
        self.groups.append((name, needs, partial(measure, self.bench, *arguments)))

    def synthesis(self, resolution: int, batch: int, modes: Sequence[str]) -> None:
        name = f"synthesis, {resolution} px, batch {batch}"
        self.add(name, 5, gpu_rows.synthesis, resolution, batch, modes, BASIC)

    def step(self, method: str, batch: int, modes: Sequence[str]) -> None:
        name = f"{method}, batch {batch}"
        self.add(name, 5, gpu_rows.search_step, method, batch, modes, SEARCHED)

    def encoder(self, which: str, batch: int) -> None:
        modes = ("eager, contiguous", "eager", "graph")
        self.add(f"e4e, {which}, batch {batch}", 5, gpu_rows.encoder, which, batch, modes)

    def compiled(self, name: str, measure: Callable[..., list[Row]], *arguments: Any) -> None:
        if self.bench.sizes.is_compiled:
            self.add(f"compile: {name}", 40, measure, *arguments)

    def busy(self, name: str, measure: Callable[..., list[Row]], *arguments: Any) -> None:
        if self.bench.is_cuda:  # the profiler watches a GPU's kernels
            self.add(f"busy: {name}", 8, measure, *arguments, True)


def groups(bench: Bench) -> list[Group]:
    """Every group, the most wanted first; most graphs before the profiler, long ones last."""
    plan, sizes = GroupsToCome(bench), bench.sizes
    first, *others = sizes.batches
    main, single = sizes.batches[first][:2]
    small, middle, large = sizes.step_batches
    (published, *larger), (bundled, *largest) = sizes.encoder_batches
    orders = ("eager", "eager, contiguous")
    graphs = (*orders, "graph", "graph, contiguous")
    pair, some = ("eager", "compile"), ("fp32", "bf16")

    plan.add("ceilings", 0, gpu_rows.ceilings)
    plan.synthesis(first, main, (*graphs, "eager, deterministic"))
    plan.synthesis(first, single, (*graphs, "eager, deterministic"))
    plan.step("wplus", middle, ("eager", "graph"))
    plan.encoder("published", published)
    plan.add("residuals", 5, gpu_rows.residuals, first, main)
    for resolution in others[-1:]:
        plan.synthesis(resolution, single, graphs)
        plan.synthesis(resolution, main, orders)
    plan.step("wplus", small, ("eager", "graph"))
    plan.step("wplus", large, ("eager",))  # the graphs of this size would fill the memory
    plan.step("refine_opt", sizes.refine_batch, ("eager",))
    plan.add("pti", 5, gpu_rows.pti_step)
    plan.encoder("faces64", bundled)
    plan.busy("synthesis", gpu_rows.synthesis, first, main, orders, some)
    plan.busy("wplus", gpu_rows.search_step, "wplus", middle, ("eager",), some)
    plan.busy("e4e", gpu_rows.encoder, "published", published, ("eager",))
    plan.busy("synthesis, batch 1", gpu_rows.synthesis, first, single, ("eager",), some)
    plan.compiled("synthesis, bf16", gpu_rows.synthesis, first, main, pair, ("bf16",))
    for resolution in others[:-1]:
        plan.synthesis(resolution, main, orders)
        plan.synthesis(resolution, single, orders)
    plan.compiled("synthesis, fp32", gpu_rows.synthesis, first, main, pair, ("fp32",))
    for resolution in (first, *others):
        for batch in sizes.batches[resolution][2:]:
            plan.synthesis(resolution, batch, orders)
    for batch in larger:
        plan.encoder("published", batch)
    for batch in largest:
        plan.encoder("faces64", batch)
    plan.compiled("wplus", gpu_rows.search_step, "wplus", middle, pair, ("bf16",))
    return plan.groups


def machine(device: torch.device) -> dict[str, str]:
    """Chip, versions, date and the command."""
    found = describe_machine() | {
        "device": device.type,
        "python": platform.python_version(),
        "command": "python -m benchmarks.gpu " + " ".join(sys.argv[1:]),
    }
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
            found["driver"] = answer.stdout.split()[0]
        except (OSError, subprocess.SubprocessError, IndexError) as error:
            found["driver"] = f"unknown ({type(error).__name__})"
        found["cuda"] = str(torch.version.cuda)
        found["cudnn"] = str(torch.backends.cudnn.version())
    return found


def measure(bench: Bench, state: dict[str, Any], seconds: float, save: Callable[[], None]) -> bool:
    """Run the groups that `state` does not have yet; False where the device stopped answering."""
    started = time.perf_counter()
    for name, needs, rows in groups(bench):
        if name in state["groups"]:
            continue
        left = seconds - (time.perf_counter() - started)
        began, is_broken = time.perf_counter(), False
        if left < needs or left <= 0:
            found: list[Row] = [{"error": f"not measured: {max(left, 0):.0f} s were left"}]
        else:
            try:
                found = rows()
            except Exception as error:
                found = [{"error": gpu_rows.message(error)}]
            try:
                bench.sync()
                gc.collect()
                bench.release()
            except RuntimeError:
                is_broken = True
        took = time.perf_counter() - began
        state["groups"][name] = {"seconds": took, "rows": found}
        state["seconds"] = state.get("seconds", 0.0) + took
        failed = [row["error"] for row in found if "error" in row]
        sys.stderr.write(f"{name}: {took:.1f} s{''.join(f'; {text}' for text in failed)}\n")
        save()
        if is_broken:
            return False
    return True


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "gpu.json")
    parser.add_argument(
        "--seconds", type=float, help="begin no group after these (240 on a GPU, else 900)"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="tiny networks: does it run?")
    parser.add_argument("--page-only", action="store_true", help="write the page from the JSON")
    parser.add_argument("--resume", action="store_true", help="keep the groups that the JSON has")
    args = parser.parse_args()
    page = args.out.with_suffix(".md")
    device = torch.device(args.device)
    state: dict[str, Any] = {}
    if args.page_only or args.resume:
        state = json.loads(args.out.read_text())
    else:
        state = {"machine": machine(device), "is_quick": args.quick, "groups": {}}

    def save() -> None:
        args.out.write_text(json.dumps(state, indent=1) + "\n")
        page.write_text(gpu_page.page(state))

    if not args.page_only:
        # CUDA graphs and a profiler that comes back do not go together (CUPTI).
        os.environ.setdefault("DISABLE_CUPTI_LAZY_REINIT", "1")
        full = gpu_rows.GPU if device.type == "cuda" else gpu_rows.CPU
        bench = Bench(device, gpu_rows.QUICK if args.quick else full)
        seconds = args.seconds or (240.0 if bench.is_cuda else 900.0)
        left = seconds - state.get("seconds", 0.0)
        if not measure(bench, state, left, save):
            # An error that the device does not recover from ends with the process: a new one.
            command = [sys.executable, "-m", "benchmarks.gpu", *sys.argv[1:]]
            os.execv(sys.executable, [*command, *([] if args.resume else ["--resume"])])
    save()
    sys.stdout.write(page.read_text())


if __name__ == "__main__":
    main()
