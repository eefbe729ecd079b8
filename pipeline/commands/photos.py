"""Commands that bring results out of runs. Heavy imports wait inside."""

from typing import Annotated

from cyclopts import Parameter

from models.errors import ConfigError
from pipeline.commands.terminal import OK, Run, say

Pictures = Annotated[
    list[str] | None,
    Parameter(name="--picture", help="Column of images/: input, inversion, an edit's name."),
]


def export(
    run: Run,
    folder: str,
    /,
    *,
    pictures: Pictures = None,
    webdataset: bool = False,
    hf: bool = False,
    delta: bool = False,
    iceberg: bool = False,
    lance: bool = False,
) -> int:
    """Write the pictures of RUN as files below FOLDER, named as its samples; or all its rows as a
    table of another tool. Run the same command again to go on.

    Args:
        folder: a path or s3:// prefix; of a table a path.
        pictures: default: the edits, of a run without edits the inversions. Of several each has
            its own folder.
        webdataset: a tar for each shard.
        hf: Parquet files that `datasets.load_dataset` opens.
        delta: a Delta Lake table; half precision becomes single, which Delta has.
        iceberg: the Iceberg table runs.samples, with a catalogue in FOLDER/catalog.db; the same.
        lance: the LanceDB table samples; failed rows are left out.
    """
    flags = {"webdataset": webdataset, "hf": hf, "delta": delta, "iceberg": iceberg, "lance": lance}
    forms = [name for name, is_wanted in flags.items() if is_wanted]
    if len(forms) > 1 or (forms and pictures):
        raise ConfigError(
            f"export: --{' and --'.join([*forms, *(['picture'] if pictures else [])])} do not go "
            "together; give one"
        )
    if forms:
        from tasks.export.tables import export_table

        rows = export_table(run, folder, forms[0])
        say(f"{rows} rows in {folder}")
        return OK
    from tasks.export.pictures import export_pictures

    found = export_pictures(run, folder, pictures or ())
    kept = f", {found.kept} were there already" if found.kept else ""
    say(f"{found.written} files written to {folder}{kept}")
    return OK
