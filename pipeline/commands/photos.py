"""Commands that bring results out of runs. Heavy imports wait inside."""

from typing import Annotated

from cyclopts import Parameter

from pipeline.commands.terminal import OK, Run, console

Pictures = Annotated[
    list[str] | None,
    Parameter(name="--picture", help="Column of images/: input, inversion, an edit's name."),
]


def export(run: Run, folder: str, /, *, pictures: Pictures = None) -> int:
    """Write the pictures of RUN as files below FOLDER, named as its samples. Run the same command
    again to go on.

    Args:
        folder: a path or s3:// prefix.
        pictures: default: the edits, of a run without edits the inversions. Of several each has
            its own folder.
    """
    from tasks.export.pictures import export_pictures

    found = export_pictures(run, folder, pictures or ())
    kept = f", {found.kept} were there already" if found.kept else ""
    console.print(f"{found.written} files written to {folder}{kept}", highlight=False)
    return OK
