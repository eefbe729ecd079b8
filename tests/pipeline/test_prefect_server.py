"""Whose Prefect server a flow talks to, and what becomes of a night while it is away."""

import asyncio
import os
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from prefect.server.concurrency.lease_storage import filesystem
from prefect.settings import PREFECT_API_URL, temporary_settings

from models.errors import RefineryError
from pipeline import flows, prefect_leases, prefect_server
from pipeline.prefect_server import PrivateServer, has_server, start_server


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("PREFECT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    # What a test sets in passing is put back too.
    for name in (*prefect_server.PRIVATE, "PREFECT_API_URL"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return tmp_path


def test_nobody_named_one() -> None:
    assert not has_server()


def test_the_variable_names_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:4200/api")
    assert has_server()
    assert start_server() is None
    assert os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('active = "a"\n[profiles.a]\nPREFECT_API_URL = "http://host/api"\n', True),
        ('active = "b"\n[profiles.a]\nPREFECT_API_URL = "x"\n[profiles.b]\n', False),
        ("active = \n", False),
    ],
)
def test_a_profile_may_name_one(home: Path, text: str, expected: bool) -> None:
    (home / "profiles.toml").write_text(text)
    assert has_server() is expected


def test_a_server_that_does_not_start_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefect_server, "BOOTSTRAP", "raise SystemExit('port taken')")
    server = PrivateServer()
    assert os.environ["PREFECT_API_URL"] == server.api_url
    with pytest.raises(RefineryError, match=r"did not start on .*port taken; run with --no-flow"):
        server.wait()
    assert not server.home.exists()
    assert "PREFECT_API_URL" not in os.environ


def test_a_bar_does_without_its_server(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(flows, "create_progress_artifact", lambda *_, **__: uuid4())
    bar = flows.ProgressBar("Shards done")
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:1/api"}):  # nobody listens
        bar(1, 1)
    assert "the Prefect server does not answer, the run goes on" in caplog.text

    def broken(*_: Any, **__: Any) -> None:
        raise TypeError("ours")

    monkeypatch.setattr(flows, "update_progress_artifact", broken)
    with pytest.raises(TypeError, match="ours"):
        bar(1, 1)


def test_no_lease_is_over_before_its_holder_can_renew_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ended while the server was away."""
    storage = prefect_leases.ConcurrencyLeaseStorage(tmp_path)
    lease = asyncio.run(storage.create_lease([uuid4()], timedelta(seconds=-60)))
    plain = filesystem.ConcurrencyLeaseStorage(tmp_path)
    assert asyncio.run(plain.read_expired_lease_ids()) == [lease.id]

    now = prefect_leases.time.monotonic()
    monkeypatch.setattr(prefect_leases, "_started_at", now)
    assert asyncio.run(storage.read_expired_lease_ids()) == []
    monkeypatch.setattr(prefect_leases, "_started_at", now - prefect_leases.COME_BACK_S)
    assert asyncio.run(storage.read_expired_lease_ids()) == [lease.id]

    # In those moments the holder comes back, and keeps its slot.
    assert asyncio.run(storage.renew_lease(lease.id, timedelta(seconds=300)))
    assert asyncio.run(storage.read_expired_lease_ids()) == []
