"""A direction from what a user calls it: a file, a name in a folder, or a bundled name."""

import difflib
from collections.abc import Sequence
from pathlib import Path

from models.editing.direction import Direction, bundled_directions, load_direction
from models.editing.files import RAW_SUFFIXES, import_direction
from models.errors import ConfigError
from models.stylegan2.generator import Generator


def find_direction(
    name_or_path: str, generator: Generator, folders: Sequence[str | Path] = ("directions",)
) -> Direction:
    """The direction behind a name or a path, checked against the generator.

    A path ends in .json (this project's file) or in .npy, .pt or .pth (a raw vector, see
    `import_direction`). A name is `<folder>/<name>.json` in the first of `folders` that has it,
    else a direction that ships for this generator.

    Raises:
        ConfigError: nothing of that name; the message says what is known.
        AssetError: the file cannot be read, or belongs to another generator.
    """
    path = Path(name_or_path)
    if path.suffix in (".json", *RAW_SUFFIXES):
        if not path.is_file():
            raise ConfigError(
                f"direction {name_or_path}: no such file; {_what_is_known(generator, folders)}"
            )
        if path.suffix in RAW_SUFFIXES:
            return import_direction(path, generator)
        return _checked(load_direction(path), generator)
    if "/" not in name_or_path:
        for folder in folders:
            path = Path(folder) / f"{name_or_path}.json"
            if path.is_file():
                return _checked(load_direction(path), generator)
    bundled = bundled_directions(generator)
    if name_or_path in bundled:
        return bundled[name_or_path]
    near = difflib.get_close_matches(name_or_path, known_directions(generator, folders), n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(
        f"direction {name_or_path!r} is unknown; {hint}{_what_is_known(generator, folders)}"
    )


def known_directions(
    generator: Generator, folders: Sequence[str | Path] = ("directions",)
) -> list[str]:
    """Names that `find_direction` finds without a path, sorted; those in folders may belong to
    another generator."""
    files = [path.stem for folder in folders for path in Path(folder).glob("*.json")]
    return sorted({*files, *bundled_directions(generator)})


def _checked(direction: Direction, generator: Generator) -> Direction:
    direction.check_generator(generator)
    return direction


def _what_is_known(generator: Generator, folders: Sequence[str | Path]) -> str:
    places = ", ".join(str(folder) for folder in folders) or "no folder"
    known = ", ".join(known_directions(generator, folders)) or "(none)"
    return (
        f"known in {places} and for this generator: {known}; make one with `refinery directions "
        "fit`, or give the path of a .json, .npy or .pt file"
    )
