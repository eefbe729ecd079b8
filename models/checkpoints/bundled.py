"""Weights that ship inside the package, by name: `models/assets/<name>/`."""

import json
from pathlib import Path

from models.errors import AssetError

ASSETS = Path(__file__).resolve().parent.parent / "assets"
GENERATOR_FILE = "generator.safetensors"


def bundled_names(file: str = GENERATOR_FILE) -> list[str]:
    """Names whose folder holds `file`; by default those of the generators."""
    return sorted(path.parent.name for path in ASSETS.glob(f"*/{file}"))


def asset_path(name: str, file: str) -> Path:
    """The path of a bundled file.

    Raises:
        AssetError: there is none; the message lists the names that have such a file.
    """
    path = ASSETS / name / file
    if name in ("", ".", "..") or "/" in name or not path.is_file():
        known = ", ".join(bundled_names(file)) or "(none)"
        raise AssetError(f"no bundled {file} under the name {name!r}; known names: {known}")
    return path


def find_for_generator(generator_hash: str, file: str) -> Path | None:
    """The bundled `file` that was made for a generator, found by the hash in a card beside it.

    Both the card of the file itself (`e4e.json` for `e4e.safetensors`) and the generator's card in
    the same folder may name the hash, under `generator_hash`.
    """
    for name in bundled_names(file):
        folder = ASSETS / name
        for card in (folder / f"{Path(file).stem}.json", folder / "generator.json"):
            if (
                card.is_file()
                and json.loads(card.read_text()).get("generator_hash") == generator_hash
            ):
                return folder / file
    return None
