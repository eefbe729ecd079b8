"""docs/operations.md: its commands parse, its links and settings exist."""

import re
import shlex
from pathlib import Path

import pytest

from pipeline.cli import app
from pipeline.config import EngineConfig
from tasks.job import OutputConfig

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "operations.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
COMMANDS = [
    line.split("  #")[0].strip()
    for block in BLOCKS
    for line in block.splitlines()
    if line.startswith("refinery ")
]


@pytest.mark.parametrize("command", COMMANDS)
def test_command_parses(command: str) -> None:
    program, name, *arguments = shlex.split(command)
    found, bound, _ = app.parse_args([name, *arguments], exit_on_error=False, print_error=False)
    assert found.__name__ == name
    assert str(next(iter(bound.arguments.values()))).startswith("s3://")
    assert program == "refinery"


def test_all_commands_of_daily_work_are_shown() -> None:
    assert {c.split()[1] for c in COMMANDS} == {
        *("plan", "invert", "retry", "status", "verify", "query", "report"),
    }


def test_files_that_it_names_exist() -> None:
    named = set(re.findall(r"`((?:deploy|models|tests)/[\w./-]+)`", TEXT))
    named |= {f"docs/{name}" for name in re.findall(r"\]\((\w+\.md)\)", TEXT)}
    assert {"deploy/Dockerfile", "deploy/kuberay/rayjob.yaml", "deploy/prefect.yaml"} <= named
    for name in named:
        assert (ROOT / name).exists(), name


def test_settings_that_it_names_exist() -> None:
    engine = set(re.findall(r"`engine\.(\w+)", TEXT))
    assert {"actors", "max_attempts", "patience_s", "shard_timeout_s"} <= engine
    assert engine <= set(EngineConfig.model_fields)
    assert set(re.findall(r"`output\.(\w+)", TEXT)) <= set(OutputConfig.__dataclass_fields__)


def test_links_within_the_page_lead_somewhere() -> None:
    headings = {
        re.sub(r"[^\w-]", "", h.lower().replace(" ", "-"))
        for h in re.findall(r"^#+ (.*)", TEXT, re.M)
    }
    anchors = set(re.findall(r"\]\(#([\w-]+)\)", TEXT))
    assert anchors == {"quarantined-shards"}
    assert anchors <= headings
