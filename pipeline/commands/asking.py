"""Commands that ask runs. Nothing heavy is loaded, and the rest waits inside."""

from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from models.errors import ConfigError
from pipeline.commands.terminal import OK, UNCLEAN, Run, console, say
from pipeline.start import spare_pandas

if TYPE_CHECKING:
    import pyarrow as pa

Root = Annotated[
    str, Parameter(name="RUN", help="A run, or a folder with runs below it: a path or s3:// URL.")
]
Folder = Annotated[
    str, Parameter(name="ROOT", help="A folder with runs below it, a path or s3:// prefix.")
]
Pairs = Annotated[
    list[str] | None, Parameter(name="--param", help="Value of $NAME in the SQL: NAME=VALUE.")
]
Files = Annotated[
    list[str] | None,
    Parameter(name="--table", help="A table of yours, NAME=FILE: .csv, .json, .parquet or .arrow."),
]


def query(
    run: Root,
    sql: str,
    /,
    *,
    out: str | None = None,
    params: Pairs = None,
    tables: Files = None,
    to_dataset: str | None = None,
    to_tensor: str | None = None,
) -> int:
    """SQL over the committed rows (DuckDB): views samples, latents, images, residuals, edits,
    shards, runs. Read-only, works while the run is writing.

    Args:
        sql: one SELECT, e.g. "SELECT sample_key, psnr FROM samples ORDER BY psnr LIMIT 10".
        out: write the answer to a .csv, .json, .parquet or .arrow file instead of printing it.
        to_dataset: write it to a new folder that Hugging Face datasets opens.
        to_tensor: write its codes to a .npy or .safetensors file, the keys beside it.
    """
    spare_pandas()
    from tasks.run import export
    from tasks.run.query import query as ask

    if out is not None:
        export.check_target(out)
    if to_tensor is not None:
        export.check_target(to_tensor, export.TENSOR_FORMATS)
    if to_dataset is not None:
        export.check_target(to_dataset, ())
    found = ask(run, sql, _parameters(params or []), _tables(tables or []))
    if out is not None:
        export.export(found, out)
        say(f"{found.num_rows} rows written to {out}")
    if to_tensor is not None:
        keys = export.export_tensor(found, to_tensor)
        say(f"{found.num_rows} rows written to {to_tensor} and {keys}")
    if to_dataset is not None:
        files = export.export_dataset(found, to_dataset)
        say(f"{found.num_rows} rows written to {to_dataset} ({len(files)} files)")
    if out is to_tensor is to_dataset is None:
        from pipeline.screen import query_table

        console.print(query_table(found, console.width))
    return OK


def runs(root: Folder, /, *, out: str | None = None) -> int:
    """The runs below a folder: what they are, how far they are, what they cost.

    Args:
        out: write all columns to a .csv, .json, .parquet or .arrow file.
    """
    spare_pandas()
    from tasks.run.export import check_target, export
    from tasks.run.query import query as ask

    if out is not None:
        check_target(out)
        export(ask(root, "SELECT * FROM runs ORDER BY run"), out)
        return OK
    from pipeline.screen import runs_table

    console.print(runs_table(ask(root, "SELECT * FROM runs ORDER BY created_at, run")))
    return OK


def diff(
    before: Annotated[str, Parameter(name="A")],
    after: Annotated[str, Parameter(name="B")],
    /,
    *,
    strip: str | None = None,
    out: str | None = None,
    top: int = 8,
) -> int:
    """What changed from run A to run B: rows, and how every metric and the codes drifted.

    Args:
        strip: write the pictures that changed most to a .png file.
        out: write the rows that changed to a .csv, .json, .parquet or .arrow file.
        top: rows in the strip.
    """
    spare_pandas()
    from pipeline.screen import show_diff
    from tasks.catalogue.diff import compare, write_strip
    from tasks.run.export import check_target, export

    for path, formats in ((strip, (".png",)), (out, None)):
        if path is not None:
            check_target(path, *([formats] if formats else []))
    found = compare(before, after)
    show_diff(console, found)
    if out is not None:
        export(found.rows, out)
        say(f"{found.rows.num_rows} rows written to {out}")
    if strip is not None:
        say(f"{write_strip(found, strip, top)} rows of pictures written to {strip}")
    return OK


def reproduce(run: Run, key: str, /) -> int:
    """Where a row comes from; it is made again from its input and compared byte by byte.

    Args:
        key: sample_key of the row.
    """
    from pipeline.screen import pairs
    from tasks.catalogue.reproduce import reproduce as draw_again

    found = draw_again(run, key)
    console.print(pairs("", found.provenance))
    console.print(pairs("", found.found))
    return OK if found.is_same else UNCLEAN


def _split(pairs: list[str], option: str) -> dict[str, str]:
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigError(f"{option} {pair}: expected NAME=VALUE, a name of letters and digits")
        found[name] = value
    return found


def _parameters(pairs: list[str]) -> dict[str, Any]:
    """Numbers where they read as such; in single quotes what shall stay text."""
    return {name: _value(text) for name, text in _split(pairs, "--param").items()}


def _value(text: str) -> str | int | float:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    is_quoted = len(text) > 1 and text[0] == text[-1] == "'"
    return text[1:-1] if is_quoted else text


def _tables(files: list[str]) -> "dict[str, pa.Table]":
    from tasks.run.user_table import read_table

    return {name: read_table(uri, name) for name, uri in _split(files, "--table").items()}
