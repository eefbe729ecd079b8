"""Adaptation jobs from a TOML file with one or several [[domain]] tables, or from a few names.

generator = "faces64"
steps = 200

[[domain]]
name = "impasto"
guidance = "images"
references = "photos/impasto"

`references` beside the tables is that of every table of pictures without its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from models.adaptation.domain import move_domain, save_domain
from models.checkpoints.load import load_generator
from models.errors import ConfigError
from pipeline.config import apply_sets, read_method, read_toml, validated
from pipeline.run import local_device
from tasks.adapt.config import AdaptConfig, ClipConfig, DomainConfig
from tasks.job import InputConfig


def load_adapt_config(
    path: str | None = None,
    sets: Sequence[str] = (),
    *,
    domains: Sequence[Mapping[str, Any]] = (),
) -> AdaptConfig:
    """Read, override and validate the config of a job.

    Args:
        path: TOML file with the fields of `AdaptConfig`; None for the defaults.
        sets: overrides `a.b=value`, e.g. `steps=300`, `domain.0.weights.content=0.5`.
        domains: [[domain]] tables that replace the file's: what the command line names.

    Raises:
        ConfigError: the file cannot be read, there is no domain, or a key or value is wrong.
    """
    tables = read_toml(path)
    if domains:
        tables["domain"] = [dict(table) for table in domains]
    tables.setdefault("clips", [{"source": "refinery"}])  # so that clips.0.source can be set
    apply_sets(tables, sets)
    common = tables.pop("references", None)
    tables.setdefault("device", local_device())
    if not tables.get("domain"):
        raise ConfigError(
            "domain: there is none; write a [[domain]] table with a name and `references` or "
            "`target_text`, or name one on the command line"
        )
    for _, table in _tables(tables, "domain"):
        if common is not None and table.get("guidance") != "text":
            table.setdefault("references", common)
    # Each table by itself, so that a wrong key is named with its place and its neighbours.
    for name, cls in (("domain", DomainConfig), ("clips", ClipConfig)):
        if name in tables:
            tables[name] = [validated(cls, t, f"{name}.{i}") for i, t in _tables(tables, name)]
    if "invert" in tables:
        tables["invert"] = [_link(table, index) for index, table in _tables(tables, "invert")]
    if "input" in tables:
        tables["input"] = validated(InputConfig, tables["input"], "input")
    return validated(AdaptConfig, tables, "")


def move(name: str, domain: str, generator: str, out: str = "domains") -> Path:
    """A domain of a parent generator as a domain of its fine-tuned child: `<out>/<name>`.

    Args:
        domain: a folder, a name below `out`, or a bundled one.
        generator: the child.

    Raises:
        ConfigError, AssetError: as `models.adaptation.domain.move_domain`.
    """
    moved = move_domain(domain, load_generator(generator), (out,))
    return save_domain(replace(moved, name=name), Path(out) / name)


def _tables(tables: Mapping[str, Any], name: str) -> list[tuple[int, dict[str, Any]]]:
    found = tables[name]
    if not isinstance(found, list) or not all(isinstance(table, dict) for table in found):
        raise ConfigError(f"{name}: expected [[{name}]] tables, found {found!r}")
    return list(enumerate(found))


def _link(table: dict[str, Any], index: int) -> dict[str, Any]:
    """One [[invert]] table, as a [[method]] table of an inversion is written."""
    name = read_method(table, f"invert.{index}").name
    return {"name": name, "settings": {k: v for k, v in table.items() if k != "name"}}
