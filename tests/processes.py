"""Processes as tests see them: by /proc, and only below one that the test started."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def below(root: int) -> dict[int, str]:
    """Command lines of all living descendants of a process, by pid."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, IndexError):
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                children.setdefault(int(parent), []).append(int(folder.name))
    found: dict[int, str] = {}
    waiting = children.get(root, [])
    while waiting:
        pid = waiting.pop()
        found[pid] = command_line(pid)
        waiting = waiting + children.get(pid, [])
    return found


def command_line(pid: int) -> str:
    """With blanks between the words; empty for a process that has ended."""
    with suppress(OSError):
        if "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]:
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
            return words.replace(b"\0", b" ").decode(errors="replace").strip()
    return ""


def named(root: int, *parts: str) -> list[int]:
    """Descendants whose program is one of the names, e.g. "raylet", "ray::"."""
    return sorted(
        pid
        for pid, line in below(root).items()
        if any(line.split(" ")[0].rpartition("/")[2].startswith(part) for part in parts)
    )


def wait_for(what: Callable[[], object], patience_s: float, why: str) -> None:
    """Return when something is true.

    Raises:
        TimeoutError: it did not become true.
    """
    deadline = time.monotonic() + patience_s
    while not what():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{why}: not within {patience_s:g} s")
        time.sleep(0.1)


def send(pids: list[int], number: signal.Signals) -> None:
    """A signal to each of them that is still there."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
