"""Files of torch, read without running anything in them."""

import argparse
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from models.errors import AssetError


def read_torch_file(path: Path, name: str = "") -> Any:
    """Tensors on the CPU, plain containers and Namespace; of a zip, only what is used is read.

    Args:
        name: what messages call it; its path without one.

    Raises:
        AssetError: the file is broken, or names a global that is not allowed (the message says
            which).
    """
    name = name or str(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except Exception as error:  # a hostile or broken file can raise anything
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused:
            raise AssetError(
                f"{name}: refused to load: the file wants to use {refused[1]}, and loading it "
                f"could run code; expected tensors, plain containers and argparse.Namespace only: "
                f"take the file from another source, or save its state dict alone"
            ) from error
        # torch's own advice is to switch the safety off: not repeated here.
        found = re.search(r"WeightsUnpickler error: (.*)", str(error))
        reason = found[1] if found else str(error).partition("\n")[0]
        if not reason or reason.startswith("Weights only load failed"):
            reason = "unexpected content"
        raise AssetError(
            f"{name}: not a readable torch checkpoint ({type(error).__name__}: {reason}); it is "
            f"another kind of file, broken or cut short: take another, or download it again"
        ) from error


def read_state_dict(path: Path, name: str = "") -> dict[str, Any]:
    """The same of a file that holds a dict.

    Raises:
        AssetError: as `read_torch_file`, or it holds something else.
    """
    found = read_torch_file(path, name)
    if not isinstance(found, dict):
        raise AssetError(f"{name or path}: expected a state dict, found {type(found).__name__}")
    return found
