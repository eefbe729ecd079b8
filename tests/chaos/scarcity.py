"""The kernel's out-of-memory killer, for chosen processes: a memory group without room."""

import os
from contextlib import suppress
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
ROOM_BYTES = 2**16


class Scarcity:
    """A group below this process's own; whoever is put into it dies of its next allocations.

    Raises:
        OSError: no such group can be made here.
    """

    def __init__(self, name: str) -> None:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        own = {kinds: path.lstrip("/") for _, kinds, path in (line.split(":", 2) for line in lines)}
        is_first = "memory" in own
        base = ROOT / "memory" / own["memory"] if is_first else ROOT / own.get("", "")
        limit, self._told = (
            ("memory.limit_in_bytes", "memory.oom_control")
            if is_first
            else ("memory.max", "memory.events")
        )
        self.folder = base / name
        self.folder.mkdir()
        try:
            (self.folder / limit).write_text(str(ROOM_BYTES))
        except OSError:
            self.folder.rmdir()
            raise

    def __enter__(self) -> "Scarcity":
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # somebody in it has not ended yet
            self.folder.rmdir()

    def put(self, *pids: int) -> None:
        """From now on what these processes allocate counts."""
        for pid in pids:
            with suppress(ProcessLookupError):
                (self.folder / "cgroup.procs").write_text(str(pid))

    @property
    def kills(self) -> int:
        """Processes that the kernel has killed here."""
        lines = (self.folder / self._told).read_text().splitlines()
        return int(dict(line.split() for line in lines)["oom_kill"])


def can_be_scarce() -> bool:
    """Whether this user may make such a group."""
    try:
        with Scarcity(f"refinery-{os.getpid()}"):
            return True
    except OSError:
        return False
