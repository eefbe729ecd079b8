"""One trial of each kind of fault without a Ray of its own (tests/e2e/test_ray_dies.py has those
with one), and that the invariants would notice."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from tasks.run.ledger import read_markers
from tests.chaos.__main__ import planned, run_trial, table
from tests.chaos.faults import QUICK, ROOTS, Trial, can_do
from tests.chaos.invariants import check_exit, check_run
from tests.chaos.site import KINDS, Driver, Site

SEED = 7


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    before = dict(os.environ)
    found = Site.make(tmp_path_factory.mktemp("chaos"))
    yield found
    found.close()
    os.environ.clear()
    os.environ.update(before)


LONG = (
    *("adapt-killed", "adapt-stopped", "adapt-terminated", "driver-stopped"),
    *("s3-503-burst", "s3-lost-acknowledgement", "s3-outage", "s3-reset", "s3-slow"),
    "s3-truncated",
)


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "fault",
    [pytest.param(f, marks=[pytest.mark.slow] * (f in LONG)) for f in (*QUICK, *ROOTS)],
)
def test_a_trial(fault: str, site: Site) -> None:
    if not can_do(fault):
        pytest.skip("this user may not mount a small disk, or make a memory group")
    kind = KINDS[[*QUICK, *ROOTS].index(fault) % len(KINDS)]
    assert run_trial(site, fault, SEED, kind).problems == []


@pytest.mark.timeout(400)
def test_a_driver_may_be_terminated_before_it_can_answer(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trial, "moment_s", lambda _: 0.0)
    assert run_trial(site, "driver-terminated", SEED, "invert").problems == []


class Terminated:
    """What is left of a driver that the system ended."""

    said = ""

    def end(self) -> int:
        return -signal.SIGTERM


def test_a_driver_at_work_answers_sigterm(tmp_path: Path) -> None:
    trial = Trial(cast(Site, None), "driver-terminated", SEED, "invert", tmp_path)
    gone = cast(Driver, Terminated())
    assert trial.expect(gone, 130, may_be_terminated=True) == -signal.SIGTERM
    assert trial.problems == []
    (tmp_path / "run").mkdir()
    trial.expect(gone, 130, may_be_terminated=True)
    assert trial.problems == ["ended by SIGTERM in the midst of it: "]
    trial.expect(gone, 130)
    assert trial.problems[1:] == ["exit code -15: ", "exit code -15, not (130,): "]


SUMMARY = "rows 12 in 6 shards, 1 failed"


@pytest.mark.timeout(300)
def test_the_invariants_notice(site: Site, tmp_path: Path) -> None:
    calm = site.calm["invert"]
    assert check_run(calm, calm, SUMMARY) == []
    assert "the summary does not say" in check_run(calm, calm, "rows 11")[0]
    first = read_markers(calm)[0]

    def tampered(name: str) -> Path:
        return Path(shutil.copytree(calm, tmp_path / name))

    run = tampered("changed")
    with (run / first.parts["images"].path).open("ab") as file:
        file.write(b"x")
    assert len(check_run(str(run), calm, SUMMARY)) == 2  # not its marker's, not the calm run's
    run = tampered("doubled")
    (run / "latents" / "00000-0123456789ab.parquet").write_bytes(b"x")
    assert "nobody names it" in check_run(str(run), calm, SUMMARY)[0]
    run = tampered("lost")
    next((run / "commits").glob("00003*.json")).unlink()
    assert check_run(str(run), calm, SUMMARY)[0].startswith("shards [0, 1, 2, 4, 5] instead of ")


def test_what_a_driver_may_say_of_itself() -> None:
    assert check_exit(0, "verify     clean") == []
    assert check_exit(2, "error: the disk is full") == []
    assert check_exit(0, "verify     1 problem")[0].startswith("exit code 0 without")
    assert check_exit(3, "internal error")[0].startswith("exit code 3")
    assert check_exit(1, "Traceback (most recent call last)")[0].startswith("traceback")


def test_every_kind_of_fault_has_its_turn() -> None:
    plan = [fault for fault, _ in planned(200, 1, [], with_ray=True)]
    assert len(plan) == 200
    assert len(set(plan)) >= len(QUICK) + 8
    assert [seed for _, seed in planned(3, 5, ["s3-reset"], with_ray=False)] == [5, 6, 7]
    assert table([]).endswith("| all | 0 | 0 | 0 |")
