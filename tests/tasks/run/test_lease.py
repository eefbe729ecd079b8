"""One driver at a time: who is refused, who takes over, what stays behind."""

import dataclasses
import json
import os
import time
from pathlib import Path

import pytest

from models.errors import LedgerError
from tasks.run import lease
from tasks.run.lease import Driver, hold, read_driver
from tasks.run.records import NewerError
from tasks.storage.files import join, list_files, read_bytes, write_bytes

ELSEWHERE = Driver(
    host="elsewhere", pid=7, machine="elsewhere", born=3, since="2026-01-01T00:00:00+00:00"
)


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.05)
    monkeypatch.setattr(lease, "STALE_S", 1.0)
    monkeypatch.setattr(lease, "POLL_S", 0.02)


@pytest.fixture(params=["local", "s3"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A run that has begun."""
    if request.param == "local":
        uri = str(tmp_path / "run")
    else:
        uri = f"{request.getfixturevalue('s3')}/run"
    write_bytes(join(uri, "run.json"), b"{}")
    return uri


def put(run: str, number: int, driver: Driver) -> None:
    text = json.dumps(dataclasses.asdict(driver))
    write_bytes(join(run, "drivers", f"{number:04d}.json"), text.encode())


def files(run: str) -> list[str]:
    return [name for name, _, _ in list_files(run)]


def other_driver(run: str, **options: str) -> None:
    """Another driver than the one whose block this is."""
    token = lease._held.set(None)
    try:
        with hold(run, **options):  # type: ignore[arg-type]
            pass
    finally:
        lease._held.reset(token)


def test_held_and_released(run: str) -> None:
    with hold(run) as mine:
        driver = read_driver(run)
        assert driver is not None
        assert (driver.pid, driver.ended, driver.state) == (os.getpid(), "", "at work")
        with hold(run) as inner:
            assert inner is mine
        mine.check()
    driver = read_driver(run)
    assert driver is not None
    assert driver.state == "ended"
    with hold(run):
        assert files(run) == ["drivers/0001.json", "drivers/0002.json", "run.json"]


def test_another_is_refused_and_told_who(run: str) -> None:
    with hold(run) as mine:
        with pytest.raises(LedgerError) as caught:
            other_driver(run)
        assert f"process {os.getpid()}, since 20" in str(caught.value)
        assert "--force" in str(caught.value)
        mine.check()


def test_one_that_ends_while_it_is_watched_refuses_nobody(
    run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "STALE_S", 1e9)
    put(run, 1, ELSEWHERE)
    looks = iter([ELSEWHERE, dataclasses.replace(ELSEWHERE, ended=ELSEWHERE.since)])
    monkeypatch.setattr(lease, "_last", lambda _: (1, next(looks)))
    assert lease._take(run, "refuse")[0] == 2


def test_force_takes_it_and_the_first_notices(run: str) -> None:
    with hold(run) as mine:
        other_driver(run, if_busy="take")
        deadline = time.monotonic() + 60
        while mine._lost_to is None and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(LedgerError, match="taken over by another driver"):
            mine.check()
    assert "drivers/0002.json" in files(run)
    assert json.loads(read_bytes(join(run, "drivers/0001.json")))["ended"] == ""


def test_a_silent_driver_elsewhere_is_taken_over(
    run: str, caplog: pytest.LogCaptureFixture
) -> None:
    put(run, 1, ELSEWHERE)
    started = time.monotonic()
    with hold(run):
        assert time.monotonic() - started >= lease.STALE_S
    assert "taken over from elsewhere, process 7, since 2026-01-01" in caplog.text


def test_a_dead_process_here_is_taken_over_at_once(
    run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "STALE_S", 1e9)
    me = lease._myself()
    # The number of the process is in use again, by a process that began later.
    put(run, 1, dataclasses.replace(me, born=me.born - 1))
    with hold(run):
        assert "drivers/0002.json" in files(run)


def test_a_damaged_file_is_no_driver_and_a_newer_one_is(run: str) -> None:
    write_bytes(join(run, "drivers/0001.json"), b"{}")
    with hold(run):
        assert "drivers/0002.json" in files(run)
    put(run, 3, dataclasses.replace(ELSEWHERE, version=2))
    with pytest.raises(NewerError, match=r"drivers/0003\.json: of format 2"):
        other_driver(run)


def test_nothing_stays_where_no_run_came_of_it(tmp_path: Path, s3: str) -> None:
    for uri in (str(tmp_path / "out"), f"{s3}/out"):
        with hold(uri):
            assert files(uri) == ["drivers/0001.json"]
        assert files(uri) == []
    assert not (tmp_path / "out").exists()
