"""Every setting is listed, by its right name, default and bounds, and the page is current."""

import tomllib
from pathlib import Path

import pytest

from pipeline.cli import run_app
from pipeline.config import EngineConfig, load_config
from pipeline.settings import TABLES, page, settings

ROOT = Path(__file__).resolve().parents[2]
ALL = [each for table in TABLES for each in settings(table)]


def test_the_page_is_current() -> None:
    """`refinery settings --page > docs/settings.md` writes it."""
    assert (ROOT / "docs" / "settings.md").read_text() == page()


@pytest.mark.parametrize("setting", ALL, ids=lambda setting: setting.key)
def test_each_is_a_setting_with_its_default(setting: object) -> None:
    key, default = setting.key, setting.default  # type: ignore[attr-defined]
    assert setting.meaning  # type: ignore[attr-defined]
    assert default == "not set" or load_config(None, [f"{key}={default}"]) == load_config()


def test_none_is_missing() -> None:
    tables = tomllib.loads(load_config().to_toml())
    given = {name for name in tables if name not in ("method", *TABLES)}
    for table in TABLES:
        given |= {f"{table}.{name}" for name in tables.get(table, {})}
    listed = {each.key for each in ALL}
    assert given <= listed
    assert listed >= {f"engine.{name}" for name in EngineConfig.model_fields}


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(["settings"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "input.max_pixels = 100000000" in out
    assert "whole number, at least 1" in out
    assert run_app(["settings", "--page"]) == 0
    assert capsys.readouterr().out == page()


def test_bounds_are_told() -> None:
    values = {each.key: each.values for each in ALL}
    assert values["engine.shards_in_flight"] == "whole number, at least 1, at most 8"
    assert values["batch"] == '"auto" or whole number, at least 1'
    assert values["engine.patience_s"] == "number, more than 0"
