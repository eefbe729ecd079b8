"""The law of settings: each field of each job, as a user gives it, is what the workers get.

The values are made from the dataclasses, so a new field is under the law without a word here.
"""

import dataclasses
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest

from models.stylegan2.generator import Generator
from pipeline.config import load_config, load_stored_config, validate
from pipeline.edit import load_edit_config
from tasks.edit_job import EditJobConfig, VariantConfig
from tasks.job import InputConfig, Job, JobConfig, MethodConfig, OutputConfig
from tasks.run import run_json
from tasks.run.manifest import ManifestInfo
from tasks.work.kinds import KINDS, job_class, load_job
from tasks.work.paste import PasteConfig
from tests.tasks.small_edit import make_source, write_direction, write_domain
from tests.tasks.small_run import DECLARED

INFO = ManifestInfo(num_shards=1, num_samples=1, num_bytes=1, sha256="m" * 64)


def another(kind: Any, default: Any) -> Any:
    """A valid value that is not the default."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return next((value for value in inner if value != default), default)
    if origin in (Union, UnionType):
        return another(next(part for part in reversed(inner) if part is not NoneType), default)
    if origin is tuple:
        return [get_args(inner[0])[-1]] if get_args(inner[0]) else ["other"]
    if kind is int:
        return default + 1 if isinstance(default, int) else 7
    if kind is float:
        return (default or 1.5) / 2
    return {str: f"other-{default}", bool: not default}[kind]


def scalars(cls: type, default: object) -> Iterator[tuple[str, Any]]:
    """Name and another value of each field that holds plain values."""
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind, found = hints[field.name], getattr(default, field.name)
        is_table = dataclasses.is_dataclass(kind) or (
            get_origin(kind) is tuple and dataclasses.is_dataclass(get_args(kind)[0])
        )
        if not is_table:
            yield field.name, another(kind, found)


def sets(prefix: str, values: Mapping[str, Any]) -> list[str]:
    return [f"{prefix}{name}={value!r}" for name, value in values.items()]


def kept(job: Job, folder: Path) -> Job:
    """The job as a worker reads it."""
    declared = replace(DECLARED, kind=job.kind)
    return load_job(run_json.create_run(str(folder), job, INFO, {}, "1", declared).uri)


def plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def check(found: object, wanted: Mapping[str, Any]) -> None:
    assert {name: plain(getattr(found, name)) for name in wanted} == dict(wanted)


def test_every_field_of_an_inversion_job_arrives(tmp_path: Path) -> None:
    default = load_config().job
    own = dict(scalars(JobConfig, default))
    tables = {"input": default.input, "output": default.output}
    inner = {name: dict(scalars(type(table), table)) for name, table in tables.items()}
    fields = {field.name for field in dataclasses.fields(JobConfig)}
    assert fields == own.keys() | inner.keys() | {"methods"}
    flags = sets("", own)
    for name, values in inner.items():
        flags += sets(f"{name}.", values)
    config = load_config(None, [*flags, "method.1.steps=7"], ["e4e", "wplus"])
    assert validate(tomllib.loads(config.to_toml())) == config
    job = kept(config.job, tmp_path)
    assert job == config.job
    assert isinstance(job, JobConfig)
    check(job, own)
    check(job.input, inner["input"])
    check(job.output, inner["output"])
    assert [method.name for method in job.methods] == ["e4e", "wplus"]
    assert job.methods[1].settings["steps"] == 7


@pytest.fixture
def source(tmp_path: Path, tiny_generator: Generator, face_bytes: list[bytes]) -> str:
    return make_source(tiny_generator, tmp_path, face_bytes)


def test_every_field_of_an_edit_job_arrives(
    source: str, tmp_path: Path, tiny_generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    turn = write_direction(tiny_generator, tmp_path / "turn.json")
    oil = write_domain(tiny_generator, tmp_path / "oil")
    default = load_edit_config(source, None, ["variant=[{name='a'}]"]).job
    from_source = {"source", "source_run", "generator", "method", "domain_folders"}
    own = {k: v for k, v in scalars(EditJobConfig, default) if k not in from_source}
    output = dict(scalars(OutputConfig, default.output))
    fields = {field.name for field in dataclasses.fields(EditJobConfig)}
    assert fields == own.keys() | from_source | {"variants", "output"}
    variant = dict(scalars(VariantConfig, VariantConfig(name="a")))
    named = {"edits", "domains", "blends"}
    assert {field.name for field in dataclasses.fields(VariantConfig)} == variant.keys() | named
    (tmp_path / variant["assigned"]).write_text("sample_key,domain\na,oil\n")
    path = tmp_path / "edit.toml"
    path.write_text(
        "[[variant]]\n"
        + "".join(f"{line.replace('=', ' = ', 1)}\n" for line in sets("", variant))
        + f'edits = {{ "{turn}" = 2.5 }}\ndomains = {{ "{oil}" = 0.25 }}\n'
        + 'blends = [{ sample_key = "x", share = 0.125, rows = [3, 4] }]\n'
    )
    config = load_edit_config(source, str(path), [*sets("", own), *sets("output.", output)])
    job = kept(config.job, tmp_path / "out")
    assert job == config.job
    assert isinstance(job, EditJobConfig)
    check(job, own)
    check(job.output, output)
    (found,) = job.variants
    check(found, {**variant, "assigned": str(tmp_path / variant["assigned"])})
    assert [(e.name, e.strength) for e in found.edits] == [(turn, 2.5)]
    assert [(d.name, d.strength) for d in found.domains] == [(oil, 0.25)]
    assert [(b.sample_key, b.share, b.rows) for b in found.blends] == [("x", 0.125, (3, 4))]
    assert job.domain_folders == (str(tmp_path / "domains"),)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("invert", "edit")])
def test_every_field_of_other_jobs_arrives(kind: str, source: str, tmp_path: Path) -> None:
    default = load_stored_config(kind, source).job
    from_source = {"source", "source_run", "generator", "method"}
    own = {k: v for k, v in scalars(type(default), default) if k not in from_source}
    fields = {field.name: getattr(default, field.name) for field in dataclasses.fields(default)}
    tables = {name: table for name, table in fields.items() if dataclasses.is_dataclass(table)}
    inner = {name: dict(scalars(type(table), table)) for name, table in tables.items()}
    assert fields.keys() == own.keys() | from_source | inner.keys()
    flags = [flag for name, values in inner.items() for flag in sets(f"{name}.", values)]
    config = load_stored_config(kind, source, None, [*sets("", own), *flags])
    job = kept(config.job, tmp_path / "out")
    assert job == config.job
    check(job, own)
    for name, values in inner.items():
        check(getattr(job, name), values)
    assert (job.source, job.source_run) == (source, run_json.read_run(source)["run_id"])


def test_the_law_sees_each_table() -> None:
    """Every dataclass inside the jobs is compared above."""
    tables: set[type] = set()
    waiting: list[Any] = [job_class(kind) for kind in KINDS]
    while waiting:
        kind = waiting.pop()
        waiting += get_args(kind)
        if dataclasses.is_dataclass(kind) and kind not in tables:
            assert isinstance(kind, type)
            tables.add(kind)
            waiting += get_type_hints(kind).values()
    named = {"StrengthConfig", "BlendConfig"}
    seen = {*map(job_class, KINDS), VariantConfig, InputConfig, OutputConfig, MethodConfig}
    seen |= {PasteConfig}
    assert {kind.__name__ for kind in tables} == {kind.__name__ for kind in seen} | named
