"""A small run of inversions, and a direction and a domain of its generator on disk."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from models.adaptation.domain import Domain, save_domain
from models.editing.direction import Direction, save_direction
from models.stylegan2.generator import Generator, weights_hash
from models.stylegan2.residual import LowRank
from models.stylegan2.tokens import kernel_channels
from tasks.edit_job import EditJobConfig, StrengthConfig, VariantConfig
from tasks.run.ledger import pending, seal
from tasks.run.manifest import read_shard_spec, write_manifest
from tasks.run.marker import Marker
from tasks.run.run_json import create_run, read_run
from tasks.run.source import plan_source
from tasks.work.edit import Editor
from tasks.work.invert import Inverter
from tasks.work.shard import do_shard
from tests.tasks.small_run import begin, make_job, write_pictures


def make_source(generator: Generator, folder: Path, pictures: list[bytes], **changes: Any) -> str:
    """A sealed run of five good samples and a broken one, in two shards."""
    job = make_job(generator, folder, **changes)
    source = write_pictures(folder / "pictures", pictures[:5])
    run = begin(str(folder / "run"), str(source), job, Inverter(job, "cpu"), shard_size=4)
    run.finish()
    seal(run.uri)
    return run.uri


def write_direction(generator: Generator, path: Path, **changes: Any) -> str:
    """A direction file."""
    vector = torch.randn(generator.w_dim, generator=torch.Generator().manual_seed(1))
    direction = Direction(
        name=path.stem,
        vector=vector / vector.norm(),
        unit=0.5,
        generator_hash=weights_hash(generator),
    )
    return str(save_direction(replace(direction, **changes), path))


def make_domain(generator: Generator, name: str = "style", rank: int = 2) -> Domain:
    """A random low-rank residual on all layers."""
    draw = torch.Generator().manual_seed(len(name))
    residual = {
        layer: LowRank(
            u=torch.randn(1, o, rank, generator=draw).half().float(),
            v=0.3 * torch.randn(1, rank, i, 3, 3, generator=draw).half().float(),
        )
        for layer, (o, i) in enumerate(kernel_channels(generator))
    }
    return Domain(name=name, generator_hash=weights_hash(generator), residual=residual)


def write_domain(generator: Generator, folder: Path) -> str:
    """A domain's folder."""
    return str(save_domain(make_domain(generator, folder.name), folder))


def variant(
    name: str,
    edits: dict[str, float] | None = None,
    domains: dict[str, float] | None = None,
    **rest: Any,
) -> VariantConfig:
    def strengths(found: dict[str, float] | None) -> tuple[StrengthConfig, ...]:
        return tuple(StrengthConfig(name=k, strength=v) for k, v in (found or {}).items())

    return VariantConfig(name=name, edits=strengths(edits), domains=strengths(domains), **rest)


def make_edit_job(source: str, *variants: VariantConfig, **changes: Any) -> EditJobConfig:
    """Edits of a run with neither drift nor attributes."""
    values: dict[str, Any] = {
        "source": source,
        "source_run": read_run(source)["run_id"],
        "generator": read_run(source)["config"]["generator"],
        "method": "wplus",
        "variants": variants,
        "batch": 3,
        "perceptual": "none",
        "attributes": "none",
    }
    return EditJobConfig(**{**values, **changes})


def run_edits(
    run_uri: str,
    job: EditJobConfig,
    limit: int | None = None,
    on_rows: Callable[[int], None] | None = None,
) -> list[Marker]:
    """All stages on one worker."""
    editor = Editor(job, "cpu")
    info = write_manifest(run_uri, plan_source(job.source, limit))
    run = create_run(run_uri, job, info, editor.hashes, "1.2.3", editor.declared)
    return [
        do_shard(read_shard_spec(run_uri, shard), run, editor, on_rows=on_rows)
        for shard in pending(run_uri)
    ]
