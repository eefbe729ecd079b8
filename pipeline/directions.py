"""`refinery directions`: settings from a TOML file to one way of finding directions."""

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from models.errors import ConfigError
from pipeline.config import load_dataclass, nearest
from pipeline.screen import headed


def fit_directions(way: str, path: str | None, sets: Sequence[str]) -> list[Path]:
    """Find directions in one way and write their files.

    Args:
        way: a name of `tasks.directions.ways.WAYS`.
        path: TOML file with the fields of the way's config.

    Returns:
        The files, one JSON for each direction.

    Raises:
        ConfigError: no such way, or a wrong key or value.
        RefineryError: as the way's function.
    """
    from tasks.directions.ways import WAYS, fit

    if way not in WAYS:
        raise ConfigError(f"directions fit {way}: unknown way; {nearest(way, WAYS)}")
    return fit(load_dataclass(WAYS[way][0], path, sets))


def directions_table(generator_name: str) -> Table:
    """What `--edit` knows by name for one generator."""
    from models.checkpoints.load import load_generator
    from models.editing.find import find_direction, known_directions
    from models.errors import AssetError

    generator = load_generator(generator_name)
    columns = ("name", "space", "layers", "accuracy", "what")
    table = headed(columns, ("accuracy",), f"Directions of {generator_name}")
    for name in known_directions(generator):
        try:
            direction = find_direction(name, generator)
        except AssetError as error:
            table.add_row(Text(name), "", "", "", Text(str(error)))
            continue
        layers = "all" if direction.layers is None else ", ".join(map(str, direction.layers))
        accuracy = "" if direction.accuracy is None else f"{direction.accuracy:.3f}"
        what = Text(str(direction.card.get("what", "")))
        table.add_row(Text(name), direction.space, layers, accuracy, what)
    return table
