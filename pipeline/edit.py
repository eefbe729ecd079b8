"""Edit runs from the command line or a TOML file: what to make of every stored sample.

    refinery edit runs/faces runs/older --edit age=+2 --domain impasto --strength 0.7

    [[variant]]
    name = "older"
    edits = { age = 2.0 }
    domains = { impasto = 0.7 }

Plain functions, as in `pipeline.run`; the command line, the Prefect flow and a notebook call them.
"""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from models.errors import ConfigError
from pipeline import run as stages
from pipeline.config import EngineConfig, apply_set, read_toml, validated
from pipeline.run import Plan, Summary
from pipeline.tally import OnProgress, ignore_progress
from tasks.edit_job import BlendConfig, EditJobConfig, StrengthConfig, VariantConfig
from tasks.job import OutputConfig
from tasks.run import ledger
from tasks.run.source import check_has_codes

MAX_VARIANTS = 64
"""Pictures of one sample; more is a mistyped sweep rather than a wish."""
MAX_SWEEP = 1000


class VariantTable(BaseModel):
    """A `[[variant]]` table: one picture to make of every stored sample."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """Column of its picture, and the end of its metrics' columns ("age_change@older")."""
    edits: dict[str, float] = {}
    """Strength by direction: a bundled name, a name in directions/, or a file."""
    domains: dict[str, float] = {}
    """Strength by domain: a bundled name, a name in domains/, or a folder."""
    assigned: str | None = None
    """A .csv or .parquet table: sample_key, domain and, if wanted, strength."""
    blends: tuple[BlendConfig, ...] = ()
    """Codes drawn towards those of other samples: sample_key, share and rows."""
    residual: float = Field(default=1.0, ge=0)
    """Strength of the sample's own kernel residual."""


class EditRunConfig(BaseModel):
    """One edit run: the job (what decides the bytes) and the engine (what does not)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    variant: tuple[VariantTable, ...] = ()
    batch: int = Field(default=16, ge=1)
    precision: Literal["float32", "bfloat16", "float16"] | None = None
    """None: that of the edited run."""
    perceptual: str = "auto"
    """Perceptual distance of the drift, as for `invert`; "none" for no drift."""
    identity: str | None = None
    """Path or URL of ArcFace IR-SE50 weights; adds the drift of identity."""
    attributes: str = "auto"
    """Attribute scorer: "auto" (the bundled one where it fits the generator), a path, "none"."""
    output: OutputConfig | None = None
    """None: the pictures and the format that the edited run has stored, and the inversion."""
    engine: EngineConfig = EngineConfig()

    def job(self, source: str) -> EditJobConfig:
        """The part that travels to the workers and is hashed into the run's id.

        Args:
            source: the run to be edited.

        Raises:
            LedgerError: there is no such run.
            ConfigError: it holds edits itself, or has no input pictures although they are asked
                for; an unknown direction or domain.
        """
        check_has_codes(source)
        record = ledger.read_run(source)
        made = record["config"]
        stored = made["output"]["pictures"]
        pictures = stored if "inversion" in stored else (*stored, "inversion")
        output = self.output or OutputConfig(
            pictures=tuple(pictures), picture_format=made["output"]["picture_format"]
        )
        if "input" in output.pictures and "input" not in stored:
            raise ConfigError(
                f"output.pictures: {source} has stored no input pictures, only "
                f'{", ".join(stored) or "codes"}; leave "input" out'
            )
        return EditJobConfig(
            source=source,
            source_run=record["run_id"],
            generator=made["generator"],
            method=ledger.read_declared(source).method,
            variants=_resolved(self.variant, made["generator"]),
            output=output,
            batch=self.batch,
            precision=self.precision or made["precision"],
            perceptual=self.perceptual,
            identity=self.identity,
            attributes=self.attributes,
            domain_folders=(_place_of("domains"),) if any(v.assigned for v in self.variant) else (),
        )


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
    path: str | None = None, sets: Sequence[str] = (), wishes: Wishes | None = None
) -> EditRunConfig:
    """Read, override and validate the config of an edit run; wishes add to the file's variants.

    Raises:
        ConfigError: the file cannot be read, a key or value is wrong, a wish is malformed, or there
            is nothing to make.
    """
    tables = read_toml(path) if path else {}
    for item in sets:
        apply_set(tables, item)
    listed = tables.get("variant", [])
    if isinstance(listed, list) and wishes is not None:
        tables["variant"] = [*listed, *_variants(wishes)]
    config = validated(EditRunConfig, tables)
    if not config.variant:
        raise ConfigError(
            "nothing to make: give --edit NAME=STRENGTH, --domain NAME, --assigned TABLE, --blend "
            "SAMPLE=SHARE, or [[variant]] tables in a config file"
        )
    if len(config.variant) > MAX_VARIANTS:
        raise ConfigError(
            f"{len(config.variant)} pictures of every sample; expected at most {MAX_VARIANTS}: use "
            "coarser sweeps, or several runs"
        )
    return config


def plan(source: str, run_uri: str, config: EditRunConfig, *, limit: int | None = None) -> Plan:
    """Cut the source into shards, write manifest and run.json, or recognise what is there.

    Raises:
        AssetError, ConfigError: a direction, domain or weight file is missing or wrong.
        LedgerError: no such source, one that is not finished, or OUT holds another run.
    """
    return stages.plan_job(config.job(source), source, run_uri, config.engine.shard_size, limit)


def edit(
    source: str,
    run_uri: str,
    config: EditRunConfig,
    *,
    limit: int | None = None,
    on_progress: OnProgress = ignore_progress,
) -> Summary:
    """All stages in this process, without Prefect.

    Raises:
        RefineryError: as the stages.
    """
    plan(source, run_uri, config, limit=limit)
    return stages.finish(run_uri, config.engine, on_progress)


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


def _resolved(tables: Sequence[VariantTable], generator_name: str) -> tuple[VariantConfig, ...]:
    """Names become places that every worker finds, whatever its working directory."""
    from models.adaptation.domain import find_domain
    from models.checkpoints.load import load_generator
    from models.editing.find import find_direction
    from tasks.work.device import local_copy

    generator = load_generator(local_copy(generator_name))

    def place(name: str, candidates: Sequence[Path], find: Any) -> str:
        if "://" in name:
            return name
        find(name, generator)  # an unknown name fails here, and says what is known
        return next((_place_of(str(path)) for path in candidates if path.exists()), name)

    def direction(name: str) -> str:
        return place(name, [Path("directions", f"{name}.json"), Path(name)], find_direction)

    def domain(name: str) -> str:
        return place(name, [Path(name), Path("domains", name)], find_domain)

    def strengths(
        wanted: Mapping[str, float], found: Callable[[str], str]
    ) -> tuple[StrengthConfig, ...]:
        return tuple(StrengthConfig(name=found(k), strength=v) for k, v in wanted.items())

    return tuple(
        VariantConfig(
            name=table.name,
            edits=strengths(table.edits, direction),
            domains=strengths(table.domains, domain),
            blends=table.blends,
            assigned=None if table.assigned is None else _place_of(table.assigned),
            residual=table.residual,
        )
        for table in tables
    )


def _place_of(path: str) -> str:
    return path if "://" in path else str(Path(path).resolve())
