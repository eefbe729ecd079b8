"""Commands over methods, checkpoints and training. Heavy imports wait inside."""

import logging
from typing import Literal

from cyclopts import App

from models.errors import ConfigError
from pipeline.commands.terminal import OK, Config, Sets, console, error_console, say

benchmark = App(name="benchmark", help="Measure on pictures of your own: one command, one page.")


def methods() -> int:
    """List the inversion methods and their settings."""
    from pipeline.method_table import method_table

    console.print(method_table())
    return OK


def settings(*, page: bool = False) -> int:
    """List every setting of a run of inversions: key, default, values, meaning.

    Args:
        page: as Markdown, the page docs/settings.md.
    """
    from pipeline.settings import TABLES, settings
    from pipeline.settings import page as settings_page

    if page:
        console.print(settings_page(), highlight=False, markup=False, soft_wrap=True, end="")
        return OK
    from pipeline.screen import pairs

    for table, (_, title) in TABLES.items():
        found = {
            f"{each.key} = {each.default}": f"{each.meaning} ({each.values})"
            for each in settings(table)
        }
        console.print(pairs(title, found))
    return OK


def convert(source: str, target: str, /, *, half: bool = False, terms: str | None = None) -> int:
    """Convert a checkpoint. The target's ending decides: .safetensors is ours, .pt is rosinality's.

    Args:
        source: rosinality .pt, NVIDIA .pkl (nothing in it is executed), ours, or a bundled name.
        target: file to write.
        half: store half precision (.safetensors).
        terms: licence line for the card.
    """
    import torch

    from models.checkpoints.convert import convert as convert_checkpoint

    card = {} if terms is None else {"terms": terms}
    dtype = torch.float16 if half else torch.float32
    for path in convert_checkpoint(source, target, dtype=dtype, card=card):
        say(path)
    return OK


def statistics(generator: str, target: str, /, *, samples: int = 10_000, seed: int = 0) -> int:
    """Compute what methods need to know of a generator: latent average, PCA, style statistics.

    Args:
        generator: a bundled name or a checkpoint.
        target: .safetensors file to write.
        samples: draws of z.
        seed: of the draws.
    """
    from models.checkpoints.load import load_generator
    from models.statistics import compute_statistics, save_statistics

    save_statistics(compute_statistics(load_generator(generator), samples, seed), target)
    say(target)
    return OK


def train(
    what: str,
    /,
    *,
    config: Config = None,
    sets: Sets = None,
    workers: int = 1,
) -> int:
    """Train a network from a TOML config; run the same command again to resume.

    Args:
        what: generator, trunk, clip, attributes, a method's network (e4e, psp, w-encoder, lsap,
            cycle, clcae-align, clcae, refine), or release: the bundle of a trained generator; or
            all: a recipe, every stage of it that is missing.
        workers: GPUs (or CPU processes) to train on, by Ray Train; 1 trains in this process.
    """
    from pipeline.recipe import run_recipe
    from pipeline.train import train as train_network

    if what == "all":
        if config is None:
            raise ConfigError("train all: expected --config RECIPE.toml")
        logging.getLogger("pipeline.recipe").setLevel(logging.INFO)
        say(run_recipe(config, sets or []))
        return OK
    logging.getLogger("tasks.training").setLevel(logging.INFO)
    found = train_network(what, config, sets or [], workers)
    say(found)
    return OK


@benchmark.command
def inversion(
    out: str = "runs/benchmark",
    /,
    *,
    data: str,
    limit: int | None = None,
    methods: str | None = None,
    weights: str | None = None,
    generator: str = "faces64",
    engine: Literal["ray", "inline"] = "ray",
) -> int:
    """Compare all inversion methods on the same pictures: a table, a plot, a grid. Run the same
    command again to resume; finished runs are not computed again.

    Args:
        out: folder for the table and one run for each chain.
        data: pictures at the generator's size, e.g. a Parquet file.
        limit: only the first pictures.
        methods: rows of the table, separated by commas; all without it.
        weights: folder of trained networks, <method>.safetensors; the bundled ones without it.
        generator: a bundled name or a checkpoint.
        engine: where the runs are computed; inline is a loop in this process.
    """
    from pipeline.benchmark import benchmark_inversion

    page = benchmark_inversion(
        out,
        data=data,
        limit=limit,
        methods=methods.split(",") if methods else None,
        weights=weights,
        generator_name=generator,
        engine=engine,
        console=error_console,
    )
    say(page)
    return OK


@benchmark.command
def adaptation(
    out: str = "runs/adaptation",
    /,
    *,
    portraits: str,
    squeezenet: str | None = None,
    identity: str | None = None,
    styles: str | None = None,
    steps: int = 120,
    run: str | None = None,
    generator: str = "faces64",
) -> int:
    """Compare domains by style, guidance, rank and form: a table and a grid. Run the same command
    again to resume; finished domains are not learnt again.

    Args:
        out: folder for the table and the domains.
        portraits: Parquet file with the columns id, image and style.
        squeezenet: SqueezeNet v1.1 weights, for scores by a network that no loss sees.
        identity: a face recognition network for a column of identity: "sface", which no loss sees,
            "dlib" or a file.
        styles: separated by commas; all of the file without it.
        steps: of every adaptation; 0 scores the bundled domains alone.
        run: an inversion run on whose codes the bundled directions are measured too.
        generator: a bundled name or a checkpoint.
    """
    from pipeline.run import local_device
    from tasks.benchmark.domains import benchmark_adaptation

    logging.getLogger("tasks.benchmark").setLevel(logging.INFO)
    page = benchmark_adaptation(
        out,
        portraits=portraits,
        generator_name=generator,
        networks={"squeezenet": squeezenet, "identity": identity},
        steps=steps,
        styles=styles.split(",") if styles else None,
        run=run,
        device=local_device(),
    )
    say(page)
    return OK
