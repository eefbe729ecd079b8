"""Every setting of a run of inversions, read from the code: `refinery settings` and
docs/settings.md."""

import dataclasses
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le
from pydantic import BaseModel

from pipeline.config import DEFAULT_GENERATOR, DEFAULT_PICTURES, EngineConfig
from pipeline.method_table import field_docs
from tasks.job import InputConfig, JobConfig, OutputConfig

TABLES: dict[str, tuple[type, str]] = {
    "": (JobConfig, "The work itself"),
    "input": (InputConfig, "How a picture is read"),
    "output": (OutputConfig, "What is stored of it"),
    "engine": (EngineConfig, "Where and how shards run; not part of a run's id"),
}
"""Tables of the TOML file, the top one first."""
WORDS = {int: "whole number", float: "number", str: "text", bool: "true or false"}
BOUNDS = {Ge: ("ge", "at least"), Gt: ("gt", "more than"), Le: ("le", "at most")}


@dataclasses.dataclass(frozen=True)
class Setting:
    """One key of the TOML file, and of `--set`."""

    key: str
    default: str
    values: str
    meaning: str


def settings(table: str) -> Iterator[Setting]:
    """The settings of a table, in the order of the code."""
    cls, _ = TABLES[table]
    docs, hints = field_docs(cls), get_type_hints(cls, include_extras=True)
    for name, default in _defaults(cls):
        kind = hints[name]
        if table or not (dataclasses.is_dataclass(kind) or name == "methods"):
            key = f"{table}.{name}" if table else name
            if key == "generator":
                default = _toml(DEFAULT_GENERATOR)
            elif key == "output.pictures":
                default = _toml(DEFAULT_PICTURES)
            marks = cls.model_fields[name].metadata if issubclass(cls, BaseModel) else ()
            values = ", ".join([_in_words(kind), *(word for m in marks for word in _bounds(m))])
            yield Setting(key, default, values, docs.get(name, ""))


def _defaults(cls: Any) -> Iterator[tuple[str, str]]:
    if issubclass(cls, BaseModel):
        fields = ((name, field.default) for name, field in cls.model_fields.items())
    else:
        fields = ((field.name, field.default) for field in dataclasses.fields(cls))
    for name, value in fields:
        yield name, _toml(None if value is dataclasses.MISSING else value)


def _toml(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return f'"{value}"' if isinstance(value, str) else str(value).lower()


def _in_words(kind: Any) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        bounds = [word for mark in inner[1:] for word in _bounds(mark)]
        return ", ".join([_in_words(inner[0]), *bounds])
    if origin is Literal:
        return ", ".join(map(_toml, inner))
    if origin in (Union, types.UnionType):
        return " or ".join(_in_words(part) for part in inner if part is not type(None))
    if origin is tuple:
        return f"list of {_in_words(inner[0])}"
    return WORDS[kind]


def _bounds(mark: Any) -> Iterator[str]:
    for each in getattr(mark, "metadata", [mark]):
        for kind, (name, word) in BOUNDS.items():
            if isinstance(each, kind):
                yield f"{word} {getattr(each, name):g}"


def page() -> str:
    """docs/settings.md."""
    parts = [
        "# Settings\n\nEvery key of a run's TOML file (`--config`), each also as `--set "
        "key=value`.\nWritten by `refinery settings --page` from the code. Methods and their "
        "settings: `refinery methods`\nand [methods.md](methods.md).\n"
    ]
    for table, (_, title) in TABLES.items():
        name = f"`[{table}]`: " if table else ""
        parts.append(
            f"\n## {name}{title}\n\n| key | default | values | meaning |\n|---|---|---|---|\n"
        )
        for each in settings(table):
            text = (f"`{each.key}`", f"`{each.default}`", each.values, each.meaning)
            parts.append("| " + " | ".join(cell.replace("|", "\\|") for cell in text) + " |\n")
    return "".join(parts)
