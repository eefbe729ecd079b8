"""`refinery train all`: everything that belongs to a generator, made by one resumable command.

A recipe is a TOML file of stages, each an ordinary `refinery` command with its settings. "@name" in
a setting or an argument stands for what the stage `name` made, and decides the order. A stage that
is done is not run again; one that was interrupted goes on where its command goes on. An argument
may hold one behind a "=", as in --set generator=@release.
"""

import dataclasses
import hashlib
import importlib
import json
import logging
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import tomlkit

from models.errors import ConfigError, RefineryError
from pipeline.config import load_dataclass
from pipeline.train import FITS

logger = logging.getLogger(__name__)

REFERENCE = re.compile(r"(?:(?<==)|^)@([\w-]+)$")
"""A whole value, or what follows the last "=" of an argument like generator=@release."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One command of a recipe."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    run: tuple[str, ...]
    """Arguments of `refinery`, for example ("train", "e4e")."""
    result: str = ""
    """What other stages mean by "@name": a path inside the stage's folder, or the folder."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Written to a TOML file and given with --config; none gives none."""
    after: tuple[str, ...] = ()
    """Stages that must be done before, beside those of its references."""
    ship: tuple[str, ...] = ()
    """Patterns of files in the stage's folder that are copied to the bundle."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Stages by name, and what they share."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    out: str
    """Folder of the stages' folders."""
    bundle: str
    """Folder that `ship` copies to, for example models/assets/faces64."""
    stage: dict[str, Stage]
    common: dict[str, Any] = field(default_factory=dict)
    """Settings of every `train` stage whose command has them; a stage's own come first."""
    jobs: int = 1
    """Stages at a time. Several trainings of small networks share a GPU well."""

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise ConfigError(f"jobs must be >= 1, got {self.jobs}")
        for name, stage in self.stage.items():
            for needed in sorted(_needs(stage) - self.stage.keys()):
                raise ConfigError(
                    f"stage {name}: @{needed} is no stage; known: {', '.join(self.stage)}"
                )


def run_recipe(path: str, sets: Sequence[str]) -> Path:
    """Run what is missing of a recipe.

    Returns:
        The bundle's folder.

    Raises:
        ConfigError: a wrong key, stages that need each other in a circle, or a stage that was made
            with other settings or from other files: the message names what differs.
        RefineryError: a stage's command failed; the stages that need it were not run.
    """
    recipe = load_dataclass(Recipe, path, sets)
    waiting, done = dict(recipe.stage), dict[str, Path]()
    running: list[_Running] = []
    failed: list[str] = []
    while running or (waiting and not failed):
        ready = [] if failed else [n for n, s in waiting.items() if _needs(s) <= done.keys()]
        if not running and not ready:
            raise ConfigError(f"stages that need each other in a circle: {', '.join(waiting)}")
        for name in ready[: recipe.jobs - len(running)]:
            work = _Work(name, waiting.pop(name), recipe, done)
            if work.is_done():
                logger.info("%s: done", name)
                done[name] = work.result
            else:
                running.append(_Running(work))
        time.sleep(0.2 if running else 0)
        for job in [job for job in running if job.has_ended()]:
            running.remove(job)
            failed += job.failures()
            done |= {} if job.failures() else job.work.finish()
    if failed:
        raise RefineryError("; ".join(failed))
    return Path(recipe.bundle)


class _Work:
    """One stage with its references filled in."""

    def __init__(self, name: str, stage: Stage, recipe: Recipe, done: Mapping[str, Path]) -> None:
        self.name, self.stage, self.bundle = name, stage, Path(recipe.bundle)
        self.folder = Path(recipe.out) / name
        self.result = self.folder / stage.result
        paths = {needed: str(done[needed]) for needed in _needs(stage)}
        self.arguments = [_filled(argument, paths) for argument in stage.run]
        self.settings = _filled(self._all_settings(recipe), paths)
        self.about = {
            "run": list(stage.run),
            "settings": self.settings,
            "made_from": {needed: _hash(Path(p)) for needed, p in sorted(paths.items())},
        }
        self.marker = Path(recipe.out) / f"{name}.done.json"

    def _all_settings(self, recipe: Recipe) -> dict[str, Any]:
        settings = dict(self.stage.settings)
        if self.stage.run[0] == "train":
            module, config = FITS[self.stage.run[1]]
            known = dataclasses.fields(getattr(importlib.import_module(module), config))
            names = {f.name for f in known}
            settings = {k: v for k, v in recipe.common.items() if k in names} | settings
        return {"out": str(self.folder), **settings} if settings else {}

    def is_done(self) -> bool:
        if not self.marker.is_file() or not self.result.exists():
            return False
        before = json.loads(self.marker.read_text())
        now = json.loads(json.dumps(self.about))
        different = sorted(_differences(before, now))
        if different:
            raise ConfigError(
                f"stage {self.name}: it was made with other {', '.join(different)}; remove "
                f"{self.marker} and {self.folder} to make it anew, or restore what it was made with"
            )
        return True

    def command(self) -> list[str]:
        found = [sys.executable, "-m", "pipeline.cli", *self.arguments]
        if self.settings:
            path = self.marker.with_name(f"{self.name}.toml")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(tomlkit.dumps(self.settings))
            found += ["--config", str(path)]
        return found

    def finish(self) -> dict[str, Path]:
        """Copy what ships, then say that the stage is done; its result by name."""
        if not self.result.exists():
            raise RefineryError(
                f"stage {self.name}: its command ended well but made no {self.result}; "
                "correct `result` in the recipe"
            )
        for pattern in self.stage.ship:
            for path in sorted(self.folder.glob(pattern)):
                target = self.bundle / path.relative_to(self.folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
        self.marker.write_text(json.dumps(self.about, indent=2) + "\n")
        return {self.name: self.result}


class _Running:
    """A stage's process; what it prints goes to a log beside its folder."""

    def __init__(self, work: _Work) -> None:
        command = work.command()
        self.work, self.log = work, work.marker.with_name(f"{work.name}.log")
        self.log.parent.mkdir(parents=True, exist_ok=True)
        logger.info("%s: %s (log: %s)", work.name, " ".join(command[3:]), self.log)
        with self.log.open("ab") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)

    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def failures(self) -> list[str]:
        code = self.process.returncode
        if code == 0:
            return []
        lines = self.log.read_text(errors="replace").strip().splitlines()
        errors = [line for line in lines if "error" in line.lower()]
        said = (errors or lines or ["it printed nothing"])[-1]
        return [f"stage {self.work.name}: status {code}: {said} (all of it: {self.log})"]


def _needs(stage: Stage) -> set[str]:
    return {*_references([*stage.run, stage.settings]), *stage.after}


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield from REFERENCE.findall(value)
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _references(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _references(part)


def _filled(value: Any, paths: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return REFERENCE.sub(lambda found: paths[found[1]], value)
    if isinstance(value, Mapping):
        return {key: _filled(part, paths) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_filled(part, paths) for part in value]
    return value


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for key in before.keys() | now.keys():
        one, other = before.get(key), now.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from (f"{key}.{name}" for name in _differences(one, other))
        elif one != other:
            yield key


def _hash(path: Path) -> str:
    """sha256 of a file; of a folder, of the names and sizes in it: runs verify their own bytes."""
    digest = hashlib.sha256()
    if path.is_dir():
        for part in sorted(path.rglob("*")):
            if part.is_file():
                digest.update(f"{part.relative_to(path)} {part.stat().st_size}\n".encode())
    else:
        with path.open("rb") as file:
            for chunk in iter(lambda: file.read(1 << 20), b""):
                digest.update(chunk)
    return digest.hexdigest()
