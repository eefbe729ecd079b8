"""A local Ray that does not start at once, or never (test_ray_dies.py kills a real one)."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from models.errors import ConfigError
from pipeline import ray_session as module
from pipeline.ray_session import ray_session
from tests.processes import command_line, wait_for


class Starts:
    """Ray's start-up, which fails so many times as a busy machine makes it fail."""

    def __init__(self, failures: int, folder: Path) -> None:
        self.failures, self.tries, self.left = failures, 0, list[subprocess.Popen[bytes]]()
        self.program = folder / "gcs_server"
        self.program.symlink_to(sys.executable)

    def __call__(self, num_cpus: int | None) -> None:
        self.tries += 1
        if self.tries <= self.failures:
            command = [str(self.program), "-c", "import time; time.sleep(600)"]
            self.left.append(subprocess.Popen(command))
            wait_for(lambda: command_line(self.left[-1].pid), 30, "a half-started daemon")
            raise Exception("The current node timed out during startup.")


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(module, "_daemons", list)
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("no_ray")
@pytest.mark.parametrize("failures", [0, 2, 3])
def test_a_busy_machine_gets_another_try(
    failures: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: Any = Starts(failures, tmp_path)
    monkeypatch.setattr(module, "_start_local", starts)
    if failures < 3:
        with ray_session():
            assert starts.tries == failures + 1
    else:
        with pytest.raises(ConfigError, match="a local Ray does not start: The current node timed"):
            ray_session().__enter__()
    for process in starts.left:
        assert process.wait(30) == -9  # what it had started is not left behind
