"""Commands over the index of a run. Heavy imports wait inside."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from models.errors import ConfigError
from pipeline.commands.jobs import run_job
from pipeline.commands.terminal import DEFAULTS, OK, JobOptions, Run, console, say
from pipeline.start import spare_pandas

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from pipeline.config import RunConfig
    from pipeline.run import Summary
    from tasks.similar import Index

Space = Annotated[
    Literal["w", "w_plus", "style", "clip", "identity", "perceptual"] | None,
    Parameter(name="--space", help="What is compared: codes, or embeddings of the pictures."),
]
IndexOf = Annotated[
    str | None, Parameter(name="--index", help="The index; RUN-index[-SPACE] without it.")
]
IndexOut = Annotated[
    str | None, Parameter(name="OUT", help="Of the index; RUN-index[-SPACE] without it.")
]
File = Annotated[
    str | None, Parameter(name="--out", help="Write a .csv, .json or .parquet file instead.")
]


def index(
    run: Run,
    output: IndexOut = None,
    /,
    *,
    space: Space = None,
    options: JobOptions = DEFAULTS,
) -> int:
    """Index the samples of RUN for `similar` and `duplicates`. Run the same command again to
    resume."""
    from tasks.run.vectors import default_index

    sets = [*options.overrides, *([f"space={space}"] if space else [])]
    place = output or default_index(run, space or "w_plus")

    def load() -> "RunConfig[Any]":
        from pipeline.config import load_stored_config

        return load_stored_config("index", run, options.config, sets)

    def in_flow() -> "Summary":
        from pipeline.flows import run_over_run

        return run_over_run("index", run, place, options.config, sets, options.limit)

    return run_job(run, place, options, load, in_flow)


def similar(  # noqa: PLR0913 - a command's options are its arguments
    run: Run,
    /,
    *,
    image: str | None = None,
    key: str | None = None,
    text: str | None = None,
    vector: str | None = None,
    k: Annotated[int, Parameter(name=["--count", "-k"])] = 20,
    where: str | None = None,
    table: str | None = None,
    space: Space = None,
    index: IndexOf = None,
    out: File = None,
) -> int:
    """The samples of RUN that are nearest to a picture, a sample, words or a vector.

    Args:
        image: picture, read and inverted as those of the run.
        key: of a sample of the run, which is left out of the answer.
        text: words, for an index of the space clip.
        vector: .npy or .json file with one vector of the index's space.
        k: how many.
        where: SQL condition on scores, e.g. "psnr > 22 AND nscd < 0.03"; only what it keeps is
            compared.
        table: .csv or .parquet file with a column sample_key, whose other columns --where knows
            too and the answer shows.
    """
    asked = {"--image": image, "--key": key, "--text": text, "--vector": vector}
    given = {name: value for name, value in asked.items() if value is not None}
    if len(given) != 1:
        raise ConfigError(
            f"similar: expected one of {', '.join(asked)}, found {' and '.join(given) or 'none'}"
        )
    found_index = _open(run, index, space or ("clip" if text is not None else None))
    if table is not None:
        from tasks.run.user_table import read_table

        found_index.label(read_table(table, "labels"))
    ((option, value),) = given.items()
    leave_out = [value] if option == "--key" else []
    (found,) = found_index.search(_asked(found_index, option, value), k, where, leave_out=leave_out)
    return _show(found, out)


def duplicates(
    run: Run,
    /,
    *,
    threshold: float | None = None,
    space: Space = None,
    index: IndexOf = None,
    out: File = None,
) -> int:
    """Groups of near-duplicates among the samples of RUN.

    Args:
        threshold: two samples are duplicates below this share of the median distance of two
            samples; 0.3, or 0.15 in the spaces clip and perceptual, without it.
    """
    found = _open(run, index, space)
    from tasks.similar.duplicates import duplicates as find

    return _show(find(found, threshold), out)


def _open(run: str, index: str | None, space: str | None) -> "Index":
    """The index that is meant; RUN may be one itself."""
    spare_pandas()
    from tasks.run.run_json import read_declared
    from tasks.run.vectors import default_index
    from tasks.similar import open_index

    if index is None and read_declared(run).kind == "index":
        return open_index(run)
    found = open_index(index or default_index(run, space or "w_plus"), run)
    if space is not None and found.space != space:
        raise ConfigError(f"{found.uri} is of the space {found.space}, not {space}")
    return found


def _asked(index: "Index", option: str, value: str) -> "np.ndarray":
    if option == "--key":
        return index.vectors([value])
    if option == "--vector":
        from tasks.similar.vector_file import of_file

        return of_file(index, value)
    from tasks.similar import question

    ask = {"--image": question.of_picture, "--text": question.of_text}
    return ask[option](index, value)


def _show(found: "pa.Table", out: str | None) -> int:
    if out is not None:
        from tasks.run.export import export

        export(found, out)
        say(f"{found.num_rows} rows written to {out}")
        return OK
    from pipeline.screen import query_table

    console.print(query_table(found, console.width))
    return OK
