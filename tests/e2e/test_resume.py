"""Killed at any point and run again: the same rows and bytes as if nothing had happened."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from models.errors import LedgerError
from pipeline.cli import run_app
from pipeline.config import load_config
from pipeline.run import carry_out, plan
from tasks.run.ledger import committed
from tests.e2e.small_dataset import (
    Dataset,
    fingerprint,
    rows,
)

MARK = "REFINERY_TEST_MARK"
RAY_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Ray's own watchers outlive a killed raylet by a minute, in which they wait for its server."""


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_driver_of_the_default_command_killed(
    dataset: Dataset, undisturbed: str, tmp_path: Path
) -> None:
    """Ray, Prefect and all: what a killed driver started ends with it, and the next one goes on."""
    run = tmp_path / "run"
    command = [sys.executable, "-m", "pipeline.cli", "invert", dataset.source, str(run)]
    command += ["--config", dataset.config]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT", "RAY"))}
    environment |= {MARK: str(tmp_path), "PREFECT_HOME": str(tmp_path)}
    # Shard 3 kills its worker again and again, so that the driver is at work when it is killed.
    crashing = environment | {"REFINERY_CRASH": "before_marker:3"}
    with (tmp_path / "driver.log").open("wb") as log:
        driver = subprocess.Popen(
            [*command, "--set", "engine.max_attempts=50", "--set", "engine.actors=1"],
            env=crashing,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            wait_until(lambda: run.is_dir() and len(committed(str(run))) > 0)
            assert len(marked(tmp_path)) > 5
        finally:
            driver.send_signal(signal.SIGKILL)
            driver.wait()
    wait_until(lambda: not marked(tmp_path), patience_s=30)

    done = subprocess.run(
        [*command, "--engine", "inline"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "6/6 shards, 12/12 images, 1 failed" in done.stderr
    assert fingerprint(str(run)) == fingerprint(undisturbed)
    assert rows(str(run)).equals(rows(undisturbed))
    assert marked(tmp_path) == []


def wait_until(condition: object, patience_s: float = 200) -> None:
    assert callable(condition)
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def marked(folder: Path) -> list[str]:
    """Living processes that inherited the mark of this test."""
    mark, found = f"{MARK}={folder}".encode(), []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
            if mark in (process / "environ").read_bytes().split(b"\0"):
                found.append(f"{process.name} {command[:80]!r}")
        except OSError:
            continue  # it has just ended
    return [line for line in found if not any(agent in line for agent in RAY_AGENTS)]


def test_running_again_does_nothing_more(
    dataset: Dataset, undisturbed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = fingerprint(undisturbed)
    command = ["invert", dataset.source, undisturbed, "--config", dataset.config, "--no-flow"]
    assert run_app(command) == 0
    assert fingerprint(undisturbed) == before
    assert "0 rows in 0:00:00" in capsys.readouterr().out


def test_a_run_goes_on_in_smaller_batches(
    dataset: Dataset, undisturbed: str, tmp_path: Path
) -> None:
    """The cure for memory that the operations page names is no other run."""
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    for name in ("_SEALED.json", "commits/00003.json"):
        (run / name).unlink()
    flags = ["--config", dataset.config, "--engine", "inline", "--no-flow", "--set", "batch=1"]
    assert run_app(["invert", dataset.source, str(run), *flags]) == 0
    assert fingerprint(str(run)).keys() == fingerprint(undisturbed).keys()
    now, before = (rows(place).to_pandas() for place in (str(run), undisturbed))
    assert list(now["sample_key"]) == list(before["sample_key"])
    np.testing.assert_allclose(now["psnr"], before["psnr"], rtol=1e-4)
    assert run_app(["verify", str(run)]) == 0


def test_another_config_is_refused(dataset: Dataset, undisturbed: str) -> None:
    before = fingerprint(undisturbed)
    config = load_config(dataset.config, ["seed=1", "engine.kind=inline"])
    with pytest.raises(LedgerError, match=r"config\.seed: 0 in the run, 1 now"):
        carry_out(dataset.source, undisturbed, config)
    assert fingerprint(undisturbed) == before


def test_another_input_is_refused(dataset: Dataset, undisturbed: str) -> None:
    config = load_config(dataset.config, ["engine.kind=inline"])
    with pytest.raises(LedgerError, match="begun with another input or shard size"):
        plan(dataset.source, undisturbed, config, limit=4)
