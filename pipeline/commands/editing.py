"""Commands that edit stored samples and make what edits need. Heavy imports wait inside."""

import logging
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from models.errors import ConfigError
from pipeline.commands.jobs import run_job
from pipeline.commands.terminal import (
    DEFAULTS,
    OK,
    Config,
    JobOptions,
    Out,
    Run,
    Sets,
    console,
    error_console,
    say,
)

if TYPE_CHECKING:
    from pipeline.config import RunConfig
    from pipeline.edit import Wishes
    from pipeline.run import Summary

directions = App(name="directions", help="Directions of the latent space: fit them, list them.")

Edits = Annotated[
    list[str] | None,
    Parameter(name="--edit", help="Direction and strength, age=+2, or a sweep, age=-3:3:1."),
]
Domains = Annotated[
    list[str] | None,
    Parameter(
        name="--domain", help="Domain, impasto, or with a strength, impasto=0.7, or a sweep."
    ),
]
Blends = Annotated[
    list[str] | None,
    Parameter(
        name="--blend",
        help="Another sample of the run and its share, a.png=0.5; rows of w+ a.png=1@8-9.",
    ),
]


def edit(  # noqa: PLR0913 - a command's options are its arguments
    run: Run,
    output: Out,
    /,
    *,
    edits: Edits = None,
    domains: Domains = None,
    blends: Blends = None,
    assigned: str | None = None,
    strength: float = 1.0,
    each: bool = False,
    options: JobOptions = DEFAULTS,
) -> int:
    """Edit every stored sample of RUN into the run OUT, without its original pictures. Run the same
    command again to resume.

    Args:
        assigned: .csv or .parquet table with the columns sample_key, domain and, if wanted,
            strength: each sample's own domain.
        strength: of every --domain; 0 is the plain generator, between them lies the morph.
        each: one picture for each --edit, --domain and --blend, instead of one with all together.
    """
    config, sets = options.config, options.overrides

    def wishes() -> "Wishes":
        from pipeline.edit import Wishes

        return Wishes(
            edits=edits or (),
            domains=domains or (),
            blends=blends or (),
            assigned=assigned,
            strength=strength,
            is_each=each,
        )

    def load() -> "RunConfig[Any]":
        from pipeline.edit import load_edit_config

        return load_edit_config(run, config, sets, wishes())

    def in_flow() -> "Summary":
        from pipeline.edit_flows import edit_dataset

        return edit_dataset(run, output, config, sets, wishes(), options.limit)

    return run_job(run, output, options, load, in_flow)


def adapt(
    name: str | None = None,
    /,
    *,
    text: str | None = None,
    source_text: str | None = None,
    image: str | None = None,
    images: str | None = None,
    out: str | None = None,
    config: Config = None,
    sets: Sets = None,
) -> int:
    """Learn a domain: kernel tokens that turn the generator's pictures into another style. Run the
    same command again to resume. Several at once: [[domain]] tables in a config file.

    Args:
        name: of the domain, the folder below OUT; what another job left there is replaced.
        text: what the generator shall make, "impasto painting of a face".
        source_text: what it makes now, "photo of a face".
        image: one reference picture.
        images: reference pictures, a folder, Parquet or tar: 10 to 500.
        out: folder of the domains' folders; domains/ without it.
    """
    from pipeline.adapt import load_adapt_config
    from pipeline.progress import adaptation_line
    from pipeline.screen import domains_table
    from tasks.adapt.job import adapt as adapt_domains

    wished = _wished_domain(name, text, source_text, image, images)
    sets = [*(sets or []), *([f"out={out}"] if out else [])]
    settings = load_adapt_config(config, sets, domains=[wished] if wished else [])
    with adaptation_line(error_console) as on_progress:
        folders = adapt_domains(settings, on_progress)
    console.print(domains_table(folders))
    return OK


def move(domain: str, name: str, /, *, generator: str, out: str = "domains") -> int:
    """Move a DOMAIN of a generator to one that was fine-tuned from it, as OUT/NAME; nothing is
    learned.

    Args:
        domain: a folder, a name below OUT or a bundled one.
        generator: the fine-tuned one, a bundled name or a checkpoint.
        out: folder of the domains' folders.
    """
    from pipeline.adapt import move as move_domain
    from pipeline.screen import domains_table

    console.print(domains_table([move_domain(name, domain, generator, out)]))
    return OK


def _wished_domain(
    name: str | None,
    text: str | None,
    source_text: str | None,
    image: str | None,
    images: str | None,
) -> dict[str, str] | None:
    """The [[domain]] table that the options mean; None where there are none."""
    given = [option for option in (text, image, images) if option is not None]
    if name is None and not given and source_text is None:
        return None
    if name is None or len(given) != 1 or (source_text is not None and text is None):
        raise ConfigError(
            "adapt: expected a NAME and one of --text, --image and --images (--source-text goes "
            "with --text), or a config file with [[domain]] tables"
        )
    if text is not None:
        source = {} if source_text is None else {"source_text": source_text}
        return {"name": name, "guidance": "text", "target_text": text, **source}
    if image is not None:
        return {"name": name, "guidance": "image", "references": image}
    return {"name": name, "guidance": "images", "references": images or ""}


@directions.command
def fit(way: str, /, *, config: Config = None, sets: Sets = None) -> int:
    """Find directions and write them to directions/NAME.json.

    Args:
        way: boundary (from the codes and labels of a run), ganspace or sefa (from the generator
            alone), text (from a pair of texts, by CLIP), file (a raw vector of the field).
    """
    from pipeline.directions import fit_directions

    logging.getLogger("tasks.directions").setLevel(logging.INFO)
    for path in fit_directions(way, config, sets or []):
        say(path)
    return OK


@directions.command(name="list")
def list_directions(*, generator: str = "faces64") -> int:
    """Directions that --edit knows by name: those in directions/ and those that ship.

    Args:
        generator: a bundled name or a checkpoint.
    """
    from pipeline.directions import directions_table

    console.print(directions_table(generator))
    return OK
