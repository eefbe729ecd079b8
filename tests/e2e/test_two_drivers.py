"""Two drivers on one run, as two processes of the command: one works, the other is told."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tasks.run.ledger import PART_KINDS, committed, remove_orphans
from tasks.verify.run import verify
from tests.e2e.small_dataset import Dataset, fingerprint
from tests.e2e.test_resume import wait_until


class Driver:
    """A command at work; what it says goes to a file."""

    def __init__(self, command: list[str], log: Path) -> None:
        self._log = log
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT")}
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *command], env=environment, stdout=file, stderr=file
            )

    @property
    def said(self) -> str:
        return self._log.read_text()

    def ended(self, code: int) -> str:
        """What it said, once it has ended as expected."""
        assert self.process.wait(timeout=240) == code, self.said
        assert "Traceback" not in self.said
        return self.said


class Drivers:
    """Commands over one run."""

    def __init__(self, dataset: Dataset, folder: Path) -> None:
        self.run, self.gate, self._folder = str(folder / "run"), folder / "gate", folder
        self._command = ["invert", dataset.source, self.run, "--config", dataset.config]
        self._command += ["--engine", "inline"]

    def start(self, *options: str) -> Driver:
        return Driver(["pipeline.cli", *self._command, *options], self._folder / "second.log")

    @contextmanager
    def at_work(self) -> Iterator[Driver]:
        """A driver that has committed two shards and is held up in the third."""
        command = ["tests.e2e.slow_driver", str(self.gate), *self._command]
        driver = Driver(command, self._folder / "first.log")
        try:
            wait_until(lambda: Path(self.run).is_dir() and committed(self.run) == {0, 1})
            yield driver
        finally:
            driver.process.kill()
            driver.process.wait()

    def parts(self) -> list[str]:
        return [path.name for kind in PART_KINDS for path in (Path(self.run) / kind).glob("*")]


@pytest.fixture
def drivers(dataset: Dataset, tmp_path: Path) -> Drivers:
    return Drivers(dataset, tmp_path)


def check(drivers: Drivers, undisturbed: str) -> None:
    assert fingerprint(drivers.run) == fingerprint(undisturbed)
    assert verify(drivers.run).problems == []
    assert len(drivers.parts()) == sum(len(kinds) for kinds in fingerprint(undisturbed).values())


def test_the_second_is_refused_and_told_who(drivers: Drivers, undisturbed: str) -> None:
    with drivers.at_work() as first:
        said = drivers.start().ended(2)
        assert f"another driver is at work on this run ({os.uname().nodename}, process" in said
        assert f"process {first.process.pid}, since 20" in said
        assert committed(drivers.run) == {0, 1}
        drivers.gate.touch()
        assert "12 in 6 shards, 1 failed" in first.ended(0)
    check(drivers, undisturbed)


def test_the_run_of_a_killed_one_is_taken_over(drivers: Drivers, undisturbed: str) -> None:
    with drivers.at_work() as first:
        first.process.kill()
        first.process.wait()
        said = drivers.start().ended(0)
        assert f"process {first.process.pid}, since 20" in said.partition("taken over from")[2]
    check(drivers, undisturbed)


def test_force_takes_it_from_a_living_one(drivers: Drivers, undisturbed: str) -> None:
    with drivers.at_work() as first:
        second = drivers.start("--force")
        second.ended(0)
        wait_until(lambda: "taken over by" in first.said)
        drivers.gate.touch()
        assert f"process {second.process.pid}, since 20" in first.ended(2)
        assert "what is committed stays" in first.said
    # The shard that both did is committed once; no marker names what the other attempt wrote, where
    # it came so far.
    assert len(remove_orphans(drivers.run)) in (0, 2)
    check(drivers, undisturbed)


def test_the_second_waits_where_it_is_asked_to(drivers: Drivers, undisturbed: str) -> None:
    with drivers.at_work() as first:
        second = drivers.start("--set", "engine.if_busy=wait")
        drivers.gate.touch()
        first.ended(0)
        assert "12 in 6 shards" in second.ended(0)
    check(drivers, undisturbed)
