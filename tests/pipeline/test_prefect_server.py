"""Whose Prefect server a flow talks to."""

import os
from pathlib import Path

import pytest

from models.errors import RefineryError
from pipeline import prefect_server
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
