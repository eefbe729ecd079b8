"""A local Ray that does not start at once, or never (test_ray_dies.py kills a real one)."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from models.errors import ConfigError
from pipeline import ray_session as module
from pipeline.ray_session import ray_on_its_way, ray_session
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
def starting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Any]:
    """No Ray is there, and one that is started fails so many times first."""
    import ray

    def starting(failures: int) -> Any:
        starts = Starts(failures, tmp_path)
        monkeypatch.setattr(module, "_start_local", starts)
        return starts

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(module, "_daemons", list)
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    return starting


@pytest.mark.parametrize("failures", [0, 2, 3])
def test_a_busy_machine_gets_another_try(failures: int, starting: Callable[[int], Any]) -> None:
    starts = starting(failures)
    if failures < 3:
        with ray_session():
            assert starts.tries == failures + 1
    else:
        with pytest.raises(ConfigError, match="a local Ray does not start: The current node timed"):
            ray_session().__enter__()
    for process in starts.left:
        assert process.wait(30) == -9  # what it had started is not left behind


def test_a_session_takes_the_ray_that_is_on_its_way(starting: Callable[[int], Any]) -> None:
    starts = starting(0)
    with ray_on_its_way():
        wait_for(lambda: starts.tries == 1, 30, "Ray, before anybody asks for it")
        with ray_session():
            pass
        with ray_session():  # the first one has ended it: this is another
            assert starts.tries == 2


def test_a_ray_on_its_way_that_nobody_takes_is_ended(
    starting: Callable[[int], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    ends: list[int] = []
    starts = starting(0)
    monkeypatch.setattr(ray, "shutdown", lambda: ends.append(starts.tries))
    with pytest.raises(KeyError), ray_on_its_way():
        raise KeyError
    assert ends == [1]  # once, after it was up
    with ray_on_its_way("ray://cluster:1"):
        pass
    assert starts.tries == 1


def test_a_ray_on_its_way_that_does_not_start_is_an_error_of_the_session(
    starting: Callable[[int], Any],
) -> None:
    starts = starting(3)
    with ray_on_its_way(), pytest.raises(ConfigError, match="a local Ray does not start"):
        ray_session().__enter__()
    for process in starts.left:
        process.wait(30)
