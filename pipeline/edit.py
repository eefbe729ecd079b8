"""Edit runs from the command line or a TOML file: what to make of every stored sample.

refinery edit runs/faces runs/older --edit age=+2 --domain impasto --strength 0.7

[[variant]]
name = "older"
edits = { age = 2.0 }
domains = { impasto = 0.7 }
"""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from models.checkpoints.bundled import ASSETS
from models.errors import ConfigError
from pipeline.config import (
    RunConfig,
    apply_sets,
    read_toml,
    run_config,
    stored_defaults,
    stored_job,
    validated,
)
from tasks.edit_job import EditJobConfig, StrengthConfig, VariantConfig
from tasks.run.run_json import read_run
from tasks.run.source import check_has_codes

MAX_VARIANTS = 64
"""Pictures of one sample; more is a mistyped sweep rather than a wish."""
MAX_SWEEP = 1000


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What the command line asks for.

    Attributes:
        edits: "age=+2", or a sweep "age=-3:3:1".
        domains: "impasto", "impasto=0.7", or a sweep.
        blends: "SAMPLE=0.5", or with rows of w+ "SAMPLE=1@8-9".
        assigned: a table with each sample's own domain.
        strength: factor of every domain.
        is_each: a picture for each wish, instead of one with all of them together.
    """

    edits: Sequence[str] = ()
    domains: Sequence[str] = ()
    blends: Sequence[str] = ()
    assigned: str | None = None
    strength: float = 1.0
    is_each: bool = False


def load_edit_config(
    source: str,
    path: str | None = None,
    sets: Sequence[str] = (),
    wishes: Wishes | None = None,
) -> RunConfig[EditJobConfig]:
    """Read, override and validate the config of an edit run; wishes add to the file's variants.

    Args:
        source: the run to be edited.

    Raises:
        LedgerError: there is no such run.
        ConfigError: the file cannot be read, a key or value is wrong, a wish is malformed, there is
            nothing to make; the run's codes are those of another, or it has no input pictures
            although they are asked for; an unknown direction or domain.
    """
    tables = apply_sets(read_toml(path), sets)
    listed = tables.pop("variant", [])
    if not isinstance(listed, list) or not all(isinstance(table, dict) for table in listed):
        raise ConfigError(f"variant: expected [[variant]] tables, found {listed!r}")
    listed = [*listed, *_variants(wishes or Wishes())]
    if not listed:
        raise ConfigError(
            "nothing to make: give --edit NAME=STRENGTH, --domain NAME, --assigned TABLE, --blend "
            "SAMPLE=SHARE, or [[variant]] tables in a config file"
        )
    if len(listed) > MAX_VARIANTS:
        raise ConfigError(
            f"{len(listed)} pictures of every sample; expected at most {MAX_VARIANTS}: use "
            "coarser sweeps, or several runs"
        )
    variants = tuple(_parsed(table, f"variant.{index}") for index, table in enumerate(listed))
    check_has_codes(source)
    given = stored_job(source) | {
        "variants": _resolved(variants, read_run(source)["config"]["generator"]),
        "domain_folders": (_place_of("domains"),) if any(v.assigned for v in variants) else (),
    }
    tables = {**stored_defaults(source), **tables, "output": _output(source, tables.get("output"))}
    return run_config(EditJobConfig, tables, given, names=("variant",))


def _parsed(table: dict[str, Any], where: str) -> VariantConfig:
    """A [[variant]] table, in which edits and domains are strengths by name."""
    table = dict(table)
    for kind in ("edits", "domains"):
        if isinstance(strengths := table.get(kind), dict):
            table[kind] = [{"name": k, "strength": v} for k, v in strengths.items()]
    return validated(VariantConfig, table, where)


def _output(source: str, table: Any) -> Any:
    """As asked for, or else the pictures and the format that the source has stored, and the
    inversion."""
    stored = read_run(source)["config"]["output"]
    if table is None:
        pictures = dict.fromkeys([*stored["pictures"], "inversion"])
        return {"pictures": list(pictures), "picture_format": stored["picture_format"]}
    wanted = table.get("pictures", ("input",)) if isinstance(table, dict) else ()
    if "input" in wanted and "input" not in stored["pictures"]:
        raise ConfigError(
            f"output.pictures: {source} has stored no input pictures, only "
            f'{", ".join(stored["pictures"]) or "codes"}; leave "input" out'
        )
    return table


# ---------------------------------------------------------------------------- wishes


def _variants(wishes: Wishes) -> list[dict[str, Any]]:
    """Tables of the pictures: of each wish alone, or of every combination of their values."""
    if wishes.strength != 1.0 and not wishes.domains:
        raise ConfigError("--strength: it is the strength of --domain, and there is none")
    axes = [
        *(_edit_axis(text) for text in wishes.edits),
        *(_domain_axis(text, wishes.strength) for text in wishes.domains),
        *(_blend_axis(text) for text in wishes.blends),
    ]
    if wishes.assigned is not None:
        axes.append([{"name": "assigned", "assigned": wishes.assigned}])
    if not axes:
        return []
    chosen = ([c] for axis in axes for c in axis) if wishes.is_each else itertools.product(*axes)
    return [_joined(parts) for parts in itertools.islice(chosen, MAX_SWEEP)]


def _joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {"name": "_".join(part["name"] for part in parts)}
    for kind in ("edits", "domains"):
        names = [name for part in parts for name in part.get(kind, {})]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ConfigError(f"{twice[0]} is asked for twice in one picture; give it once")
        table[kind] = {k: v for part in parts for k, v in part.get(kind, {}).items()}
    table["assigned"] = next((p["assigned"] for p in parts if "assigned" in p), None)
    table["blends"] = [blend for part in parts for blend in part.get("blends", [])]
    return table


def _edit_axis(text: str) -> list[dict[str, Any]]:
    name, equals, values = text.rpartition("=")
    if not equals or not name:
        raise ConfigError(
            f"--edit {text}: expected NAME=STRENGTH or a sweep NAME=FROM:TO:STEP, e.g. age=+2 or "
            "age=-3:3:1"
        )
    label = _label(Path(name).stem)
    return [
        {"name": f"{label}{value:+g}", "edits": {name: value}}
        for value in _values(values, f"--edit {text}")
    ]


def _domain_axis(text: str, factor: float) -> list[dict[str, Any]]:
    name, equals, values = text.rpartition("=")
    if not equals:
        name, values = text, "1"
    label = _label(Path(name.rstrip("/")).name)
    found = []
    for value in _values(values, f"--domain {text}"):
        strength = value * factor
        found.append(
            {
                "name": label if strength == 1 else f"{label}~{strength:.4g}",
                "domains": {name: strength},
            }
        )
    return found


def _blend_axis(text: str) -> list[dict[str, Any]]:
    key, equals, rest = text.rpartition("=")
    share, _, rows = rest.partition("@")
    if not equals or not key:
        raise ConfigError(
            f"--blend {text}: expected SAMPLE=SHARE, e.g. a.png=0.5, or with rows of w+ a.png=1@8-9"
        )
    label = _label(key)
    return [
        {
            "name": f"{label}~{value:g}" + (f"~{rows}" if rows else ""),
            "blends": [{"sample_key": key, "share": value, "rows": _rows(rows, text)}],
        }
        for value in _values(share, f"--blend {text}")
    ]


def _label(name: str) -> str:
    """A name as a part of a column's name."""
    return re.sub(r"[^\w.-]+", "-", name)


def _values(text: str, where: str) -> list[float]:
    """One number, or all of FROM:TO:STEP with both ends."""
    try:
        numbers = [float(part) for part in text.split(":")]
    except ValueError:
        numbers = []
    if len(numbers) == 1:
        return numbers
    if len(numbers) in (2, 3):
        start, stop, step = (*numbers, 1.0)[:3]
        count = (stop - start) / step if step else -1.0
        if 0 <= count < MAX_SWEEP:
            return [round(start + i * step, 10) for i in range(int(count + 1e-9) + 1)]
    raise ConfigError(
        f"{where}: expected a number or a sweep FROM:TO:STEP that reaches TO, found {text!r}"
    )


def _rows(text: str, where: str) -> list[int]:
    """ "8-9,12" to [8, 9, 12]."""
    found: list[int] = []
    for part in filter(None, text.split(",")):
        first, dash, last = part.partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ConfigError(f"--blend {where}: expected rows such as 8-9 or 3,5, found {text!r}")
        found += range(int(first), int(last or first) + 1)
    return found


# ---------------------------------------------------------------------------- names to places


def _resolved(variants: Sequence[VariantConfig], generator_name: str) -> tuple[VariantConfig, ...]:
    """Names become places that every worker finds, whatever its working directory. Names of what
    ships stay: the station checks them, and everything else, against its generator."""

    def direction(name: str) -> str:
        return place(name, [Path("directions", f"{name}.json"), Path(name)], "directions")

    def domain(name: str) -> str:
        return place(name, [Path(name), Path("domains", name)], "domains")

    def place(name: str, candidates: Sequence[Path], kind: str) -> str:
        there = next((str(path) for path in candidates if path.exists()), None)
        if there is None and "://" not in name and not any(ASSETS.glob(f"*/{kind}/{name}*")):
            _refuse(name, kind, generator_name)
        return name if there is None else _place_of(there)

    def placed(
        wanted: Sequence[StrengthConfig], found: Callable[[str], str]
    ) -> tuple[StrengthConfig, ...]:
        return tuple(replace(each, name=found(each.name)) for each in wanted)

    return tuple(
        replace(
            variant,
            edits=placed(variant.edits, direction),
            domains=placed(variant.domains, domain),
            assigned=None if variant.assigned is None else _place_of(variant.assigned),
        )
        for variant in variants
    )


def _refuse(name: str, kind: str, generator_name: str) -> None:
    """Say what is known instead: only for that is a generator loaded here."""
    from models.adaptation.domain import find_domain
    from models.checkpoints.load import load_generator
    from models.editing.find import find_direction
    from tasks.work.device import local_copy

    find: Callable[..., object] = {"directions": find_direction, "domains": find_domain}[kind]
    find(name, load_generator(local_copy(generator_name)))


def _place_of(path: str) -> str:
    return path if "://" in path else str(Path(path).resolve())
