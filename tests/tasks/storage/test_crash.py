"""Crash points: armed by an environment variable, once with a token file."""

import os
from pathlib import Path

import pytest

from models.errors import ConfigError
from tasks.storage.crash import EXIT_CODE, POINTS, VARIABLE, crash_point


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    return codes


def test_names_are_those_of_the_documentation() -> None:
    named = "before_read in_decode in_work between_parts before_marker after_marker"
    assert " ".join(POINTS) == named
    assert EXIT_CODE == 137


def test_unset_does_nothing(exits: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    for name in POINTS:
        crash_point(name, 0)
    monkeypatch.setenv(VARIABLE, "")
    crash_point("in_work", 0)
    assert exits == []


def test_only_the_named_point_and_shard(exits: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "in_work:12")
    for name in POINTS:
        for shard in (1, 2, 12, 120):
            crash_point(name, shard)
    assert exits == [137]
    crash_point("in_work", 12)
    assert exits == [137, 137]


def test_a_token_lets_it_fire_once(
    exits: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = tmp_path / "a:b"
    monkeypatch.setenv(VARIABLE, f"before_marker:0:{token}")
    crash_point("after_marker", 0)
    assert not token.exists()
    for _ in range(3):
        crash_point("before_marker", 0)
    assert exits == [137]
    assert token.exists()


@pytest.mark.parametrize("value", ["in_work", "in_work:", "in_work:x", "nowhere:1", ":3"])
def test_malformed_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(ConfigError, match=r"expected point:shard .* before_read, in_decode"):
        crash_point("in_work", 1)
