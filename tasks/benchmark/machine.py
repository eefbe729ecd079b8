"""The machine that a figure was measured on, in words."""

import datetime
import os
import platform
import shlex
import sys
from pathlib import Path

import torch


def describe_machine() -> dict[str, str]:
    """Chip, cores used, torch version and date."""
    chip = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        chip = names[0].split(":")[1].strip() if names else chip
    if torch.cuda.is_available():
        chip = f"{torch.cuda.get_device_name()}, host {chip}"
    return {
        "chip": f"{chip}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads",
        "torch": torch.__version__,
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
    }


def command_line() -> str:
    """What the user typed, as a page repeats it."""
    return shlex.join(["refinery", *sys.argv[1:]])
