"""`refinery benchmark inversion`: every chain as an ordinary run, then one table of all."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from models.errors import AssetError, RefineryError
from pipeline.config import EngineConfig, RunConfig, validate
from pipeline.progress import progress_line
from pipeline.run import plan, run, seal
from tasks.benchmark.chains import Chain, chosen_chains
from tasks.benchmark.inversion import InversionTable
from tasks.job import JobConfig

BATCH, ACTORS = 16, 2


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
    table, chains = InversionTable(generator_name), chosen_chains(methods)
    with _ray(engine), progress_line(console) as on_progress:
        for chain in chains:
            config = _config(chain, table, weights, engine)
            if config is None:
                continue
            console.print(f"{chain.name} ...", highlight=False)
            place = str(Path(out) / chain.name)
            try:
                plan(data, place, config, limit=limit)
                run(place, config.engine, on_progress)
                seal(place)
                table.measure(chain, place, config.job, config.engine.threads)
            except AssetError as error:
                table.lacks(chain, str(error))
    return table.write(Path(out), chains, {"data": Path(data).name, "batch": BATCH})


def _config(
    chain: Chain, table: InversionTable, weights: str | None, engine: str
) -> RunConfig[JobConfig] | None:
    """The run of a chain; None, and a line of the table, where it cannot be."""
    methods = []
    for link in chain.links:
        method, lacking = link.resolved(weights, table.generator_hash)
        if lacking:
            return table.lacks(chain, lacking)
        methods.append(method)
    settings = EngineConfig(kind=engine, actors=ACTORS, shard_size=BATCH)  # type: ignore[arg-type]
    try:
        return validate(
            {
                "generator": table.generator_name,
                "batch": BATCH,
                "method": methods,
                "engine": settings.model_dump(),
            }
        )
    except RefineryError as error:
        return table.lacks(chain, str(error))


def _ray(engine: str) -> Any:
    """One Ray for all chains: starting one takes as long as a fast chain."""
    if engine != "ray":
        return nullcontext()
    from pipeline.ray_session import ray_session

    return ray_session()
