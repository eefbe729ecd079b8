"""A local Ray that does not start at once, or never (test_ray_dies.py kills a real one)."""

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from models.errors import ConfigError
from pipeline import ray_session as module
from pipeline.ray_session import ray_on_its_way, ray_session
from tests.processes import below, command_line, wait_for


class Starts:
    """Ray's start-up, which fails so many times as a busy machine makes it fail."""

    def __init__(self, failures: int, folder: Path, *, ends_them: bool) -> None:
        self.ends_them = ends_them  # as Ray does sometimes, but not their agents
        self.failures, self.tries, self.left = failures, 0, list[subprocess.Popen[bytes]]()
        self.program, self.agent = folder / "raylet", folder / "ray" / "agent.py"
        self.program.symlink_to(sys.executable)
        self.agent.parent.mkdir()
        self.agent.write_text("import time; time.sleep(600)")
        self.agents = list[int]()

    def __call__(self, num_cpus: int | None) -> None:
        self.tries += 1
        if self.tries <= self.failures:
            daemon = "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]])"
            command = [str(self.program), "-c", daemon, str(self.agent)]
            self.left.append(subprocess.Popen(command))
            wait_for(lambda: below(self.left[-1].pid), 30, "a half-started daemon")
            self.agents += below(self.left[-1].pid)
            wait_for(lambda: "agent" in command_line(self.agents[-1]), 30, "its agent")
            if self.ends_them:
                self.left[-1].kill()
                self.left[-1].wait(30)
            raise Exception("The current node timed out during startup.")


@pytest.fixture
def starting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Any]:
    """No Ray is there, and one that is started fails so many times first."""
    import ray

    def starting(failures: int, ends_them: bool = False) -> Any:
        starts = Starts(failures, tmp_path, ends_them=ends_them)
        monkeypatch.setattr(module, "_start_local", starts)
        return starts

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(module, "_daemons", list)
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        monkeypatch.delenv(name)
    return starting


@pytest.mark.parametrize(("failures", "ends_them"), [(0, False), (2, False), (3, False), (2, True)])
def test_a_busy_machine_gets_another_try(
    failures: int, ends_them: bool, starting: Callable[..., Any]
) -> None:
    starts = starting(failures, ends_them)
    if failures < 3:
        with ray_session():
            assert starts.tries == failures + 1
    else:
        with pytest.raises(ConfigError, match="a local Ray does not start: The current node timed"):
            ray_session().__enter__()
    for process in starts.left:
        assert process.wait(30) == -9  # what it had started is not left behind
    wait_for(lambda: not any(map(command_line, starts.agents)), 30, "the end of their agents")


def test_an_agent_that_is_not_up_yet_does_not_stay(
    starting: Callable[[int], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no name of Ray's then; its raylet was killed."""
    starts = starting(1)
    with suppress(Exception):
        starts(None)
    (raylet,) = starts.left
    monkeypatch.setattr(module, "_raylets", lambda: {raylet.pid})
    with ray_session():
        raylet.kill()
        raylet.wait(30)
        assert command_line(starts.agents[0])
    wait_for(lambda: not command_line(starts.agents[0]), 30, "its end")


def test_a_session_takes_the_ray_that_is_on_its_way(starting: Callable[[int], Any]) -> None:
    starts = starting(0)
    with ray_on_its_way(first=lambda: f"made in start {starts.tries}"):
        wait_for(lambda: starts.tries == 1, 30, "Ray, before anybody asks for it")
        with ray_session() as made:
            assert made == "made in start 1"
        with ray_session() as made:  # the first one has ended it: this is another
            assert (starts.tries, made) == (2, None)


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


@pytest.mark.parametrize(
    ("command", "is_one"),
    [
        ("ray::DashboardAgent", True),
        ("/bin/python\0-u\0/lib/ray/dashboard/agent.py\0--node-ip-address=127.0.0.2", True),
        ("/bin/python\0-u\0/lib/ray/_private/runtime_env/agent/main.py", True),
        ("python\0/home/murray/agent.py", False),
        ("/opt/x-ray/bin/ssh-agent", False),
        ("/srv/ray/bin/tool\0/home/agent.py", False),
    ],
)
def test_nobody_else_is_taken_for_an_agent(command: str, is_one: bool) -> None:
    assert (module.AGENT.search(command) is not None) is is_one
