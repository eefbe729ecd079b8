"""`refinery benchmark inversion`: every chain as an ordinary run, then one table of all."""

import json
import logging
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from models.attributes import load_attributes
from models.checkpoints.load import load_generator
from models.editing.direction import bundled_directions
from models.errors import AssetError, RefineryError
from models.losses.frechet import FrechetFeatures
from models.losses.perceptual import load_perceptual
from models.statistics import statistics_for
from models.stylegan2.generator import weights_hash
from pipeline.config import EngineConfig, RunConfig, validate
from pipeline.progress import progress_line
from pipeline.run import plan, run, seal
from tasks.benchmark.chains import Chain, chosen_chains
from tasks.benchmark.faces import face_networks
from tasks.benchmark.figures import grid, scatter
from tasks.benchmark.machine import describe_machine
from tasks.benchmark.scoring import (
    Edit,
    Instruments,
    edited_examples,
    edits_for,
    read_stored,
    score_run,
)
from tasks.benchmark.table import markdown
from tasks.work.device import fixed_threads
from tasks.work.invert import Inverter

BATCH, ACTORS, SHOWN = 16, 2, 6
SHOWN_EDITS = ("age+3", "smile-3")

logger = logging.getLogger(__name__)


def benchmark_inversion(
    out: str,
    *,
    data: str,
    limit: int | None,
    methods: Sequence[str] | None,
    weights: str | None,
    generator_name: str,
    engine: str,
    console: Any,
) -> Path:
    """Run what is not yet run, score everything, write inversion.md, .json, .svg and .png.

    Args:
        weights: folder whose `<method>.safetensors` come before the bundled ones.

    Returns:
        The Markdown file.

    Raises:
        RefineryError: the data or the generator cannot be read. A chain that fails is a line of the
            table, and the others go on.
    """
    started = time.perf_counter()
    generator = load_generator(generator_name)
    digest = weights_hash(generator)
    edits = edits_for(bundled_directions(generator))
    # Directions of age and smile are what tells that a generator makes faces.
    faces, missing_faces = face_networks() if edits else ((), {})
    judges = Instruments(
        generator=generator,
        perceptual=load_perceptual("auto"),
        features=FrechetFeatures(),
        edits=edits,
        w_std=statistics_for(generator).w_std,
        faces=faces,
        attributes=load_attributes() if edits else None,
    )
    chains = chosen_chains(methods)
    rows: dict[str, dict[str, Any]] = {}
    missing: dict[str, str] = {}
    notes: dict[str, str] = {}
    pictures: dict[str, list[torch.Tensor]] = {}
    inputs = None
    with _ray(engine), progress_line(console) as on_progress:
        for chain in chains:
            config, lacking = _config(chain, generator_name, weights, digest, engine)
            if config is None:
                missing[chain.name] = lacking
                continue
            console.print(f"{chain.name} ...", highlight=False)
            place = str(Path(out) / chain.name)
            try:
                plan(data, place, config, limit=limit)
                run(place, config.engine, on_progress)
                seal(place)
                inverter = Inverter(config.job, "cpu")
            except AssetError as error:
                missing[chain.name] = str(error).replace("|", "/")
                continue
            with fixed_threads(config.engine.threads):
                has_reencoder = chain.reencoder is not None
                rows[chain.name] = score_run(place, judges, inverter, has_reencoder, chain.kept)
                notes[chain.name] = _note(chain, config)
                stored = read_stored(place, generator, chain.kept)
                inputs = stored.inputs[:SHOWN]
                shown = [edit for edit in edits if edit.name in SHOWN_EDITS]
                pictures[chain.name] = edited_examples(stored, judges, shown, SHOWN)
    result = {
        "title": "Inversion methods on the same pictures",
        "command": shlex.join(["refinery", *sys.argv[1:]]),
        "machine": describe_machine(),
        "data": Path(data).name,
        "generator": generator_name,
        "generator_bytes": 2 * sum(p.numel() for p in generator.parameters()),
        "pictures": max((row["pictures"] for row in rows.values()), default=0),
        "batch": BATCH,
        "perceptual": judges.perceptual.name,
        "faces": {face.name: face.hash for face in faces},
        "missing_faces": missing_faces,
        "edits": [edit.name for edit in edits],
        "order": [chain.name for chain in chains],
        "rows": rows,
        "missing": missing,
        "notes": notes,
        "seconds": round(time.perf_counter() - started, 1),
    }
    return _write(Path(out), result, inputs, pictures, edits)


def _config(
    chain: Chain, generator: str, weights: str | None, digest: str, engine: str
) -> tuple[RunConfig | None, str]:
    tables = []
    for link in chain.links:
        table, lacking = link.resolved(weights, digest)
        if lacking:
            return None, lacking
        tables.append(table)
    settings = EngineConfig(kind=engine, actors=ACTORS, shard_size=BATCH)  # type: ignore[arg-type]
    try:
        return validate(
            {
                "generator": generator,
                "batch": BATCH,
                "method": tables,
                "engine": settings.model_dump(),
            }
        ), ""
    except RefineryError as error:
        return None, str(error)


def _ray(engine: str) -> Any:
    """One Ray for all chains: starting one takes as long as a fast chain."""
    if engine != "ray":
        return nullcontext()
    from pipeline.ray_session import ray_session

    return ray_session()


def _note(chain: Chain, config: RunConfig) -> str:
    settings = [f"{link.method} {dict(link.settings)}" for link in chain.links if link.settings]
    losses = [_identity_loss(str(m.settings.get("checkpoint") or "")) for m in config.job.methods]
    return "; ".join(filter(None, [chain.note, *settings, *losses]))


def _identity_loss(checkpoint: str) -> str:
    """Whether a network was trained with an identity loss, as its card says."""
    if not checkpoint:
        return ""
    card = Path(checkpoint).with_suffix(".json")
    if not card.is_file():
        return ""
    used = json.loads(card.read_text())["provenance"].get("settings", {}).get("identity")
    return f"{card.stem} was trained with an identity loss ({used})" if used else ""


def _write(
    out: Path,
    result: dict[str, Any],
    inputs: torch.Tensor | None,
    pictures: dict[str, list[torch.Tensor]],
    edits: Sequence[Edit],
) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    (out / "inversion.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "inversion.svg").write_text(scatter(result))
    if inputs is not None:
        shown = [edit.name for edit in edits if edit.name in SHOWN_EDITS]
        grid(inputs, pictures, shown).save(out / "inversion.png")
    page = out / "inversion.md"
    page.write_text(markdown(result))
    return page
