"""`refinery` whose shard 2 waits until a file is there: python -m tests.e2e.slow_driver GATE ..."""

import sys
import time
from pathlib import Path

from pipeline.cli import main
from tasks.work import shard


def wait_for(gate: Path) -> None:
    """Make shard 2 wait before its work."""
    passed = shard.crash_point

    def crash_point(name: str, number: int) -> None:
        while (name, number) == ("in_work", 2) and not gate.exists():
            time.sleep(0.05)
        passed(name, number)

    shard.crash_point = crash_point


if __name__ == "__main__":
    wait_for(Path(sys.argv.pop(1)))
    main()
