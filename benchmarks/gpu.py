"""`make bench-gpu`: the speed of synthesis, searches and encoders on a GPU, each with its error.

Needs torch, numpy, safetensors and jaxtyping alone. Without a GPU the same code measures smaller
sizes on the CPU. Writes a JSON file after every group of rows, and the same as a Markdown page
beside it. A group that the time does not allow is left out and says so.

Run: python -m benchmarks.gpu [--seconds 240] [--out benchmarks/gpu.json] [--quick]
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_page, gpu_rows
from benchmarks.gpu_rows import Bench, Row
from tasks.machine import describe_machine

HERE = Path(__file__).parent
Group = tuple[str, float, Callable[[], list[Row]]]
"""Its name, the seconds that must be left to begin it, and what measures it."""


def groups(bench: Bench) -> list[Group]:
    """Every group, the most wanted first; graphs before the profiler, compilation last."""
    sizes, cuda = bench.sizes, bench.is_cuda
    exact = bench.precisions
    searched = [p for p in ("fp32", "tf32", "bf16", "bf16 + tf32") if cuda or "tf32" not in p]
    graph = ["graph"] if cuda else []
    orders = ["eager", "eager, contiguous"]
    graphs = ["graph", "graph, contiguous"] if cuda else []
    cudnn = ["eager, deterministic"] if cuda else []
    some = [p for p in exact if p in ("fp32", "bf16")]
    middle = sizes.step_batches[1]
    found: list[Group] = [("ceilings", 0, lambda: gpu_rows.ceilings(bench))]

    def add(name: str, needs: float, measure: Callable[..., list[Row]], *arguments: Any) -> None:
        found.append((name, needs, lambda: measure(bench, *arguments)))

    def add_synthesis(resolution: int, batch: int, modes: list[str]) -> None:
        name = f"synthesis, {resolution} px, batch {batch}"
        add(name, 5, gpu_rows.synthesis, resolution, batch, modes, exact)

    first, *others = sizes.batches
    for batch in sizes.batches[first][:2]:
        add_synthesis(first, batch, orders + graphs + cudnn)
    add("wplus", 5, gpu_rows.search_step, "wplus", middle, ["eager", *graph], searched)
    large, small = sizes.encoder_batches
    all_orders = ["eager, contiguous", "eager", *graph]
    add("e4e, published sizes", 5, gpu_rows.encoder, "published", large[0], all_orders)
    add("e4e, faces64", 5, gpu_rows.encoder, "faces64", small[0], all_orders)
    for resolution in reversed(others):
        for batch in sizes.batches[resolution][:2]:
            add_synthesis(resolution, batch, orders + graphs)
    add("residuals", 5, gpu_rows.residuals, first, sizes.batches[first][0])
    for batch in (sizes.step_batches[0], sizes.step_batches[2]):
        name = f"wplus, batch {batch}"
        add(name, 5, gpu_rows.search_step, "wplus", batch, ["eager", *graph], searched)
    batch = sizes.refine_batch
    add("refine_opt", 5, gpu_rows.search_step, "refine_opt", batch, ["eager", *graph], searched)
    add("pti", 5, gpu_rows.pti_step)
    for resolution, batches in sizes.batches.items():
        for batch in batches[2:]:
            add_synthesis(resolution, batch, orders)
    for which, sequence in (("published", large[1:]), ("faces64", small[1:])):
        for batch in sequence:
            add(f"e4e, {which}, batch {batch}", 5, gpu_rows.encoder, which, batch, all_orders)
    if cuda:
        batch = sizes.batches[first][0]
        for name, arguments in {
            "synthesis": (gpu_rows.synthesis, first, batch, orders, some),
            "synthesis, batch 1": (gpu_rows.synthesis, first, 1, ["eager"], some),
            "wplus": (gpu_rows.search_step, "wplus", middle, ["eager"], some),
            "e4e": (gpu_rows.encoder, "published", large[0], ["eager"]),
        }.items():
            add(f"busy: {name}", 8, *arguments, True)
    for precision in some:
        name = f"compile: synthesis, {precision}"
        batch = sizes.batches[first][0]
        modes = ["eager", "compile"]
        add(name, 40, gpu_rows.synthesis, first, batch, modes, [precision])
    add(
        "compile: wplus", 60, gpu_rows.search_step, "wplus", middle, ["eager", "compile"], some[-1:]
    )
    return found


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
    parser.add_argument("--seconds", type=float, default=240.0, help="begin no group after these")
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
        full = gpu_rows.GPU if device.type == "cuda" else gpu_rows.CPU
        bench = Bench(device, gpu_rows.QUICK if args.quick else full)
        left = args.seconds - state.get("seconds", 0.0)
        if not measure(bench, state, left, save):
            # An error that the device does not recover from ends with the process: a new one.
            command = [sys.executable, "-m", "benchmarks.gpu", *sys.argv[1:]]
            os.execv(sys.executable, [*command, *([] if args.resume else ["--resume"])])
    save()
    sys.stdout.write(page.read_text())


if __name__ == "__main__":
    main()
