"""Numbers in a file as a vector of an index; nothing heavy is loaded for it.

Legend: E values of a vector.
"""

import io
import json
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32

from models.errors import ConfigError
from tasks.similar.index import Index
from tasks.storage.files import read_bytes


def of_file(index: Index, path: str) -> Float32[np.ndarray, "1 E"]:
    """The numbers in a .npy or .json file, in any shape: a vector of the index's space.

    Raises:
        ConfigError: it cannot be read, or has another number of values.
    """
    data = read_bytes(path, ConfigError)
    try:
        values: Sequence[float] | np.ndarray = (
            json.loads(data)
            if path.endswith(".json")
            else np.load(io.BytesIO(data), allow_pickle=False)
        )
        with np.errstate(over="ignore"):  # not finite is refused later
            found = np.asarray(values, np.float32).reshape(1, -1)
    except (ValueError, TypeError, EOFError) as error:
        raise ConfigError(
            f"vector {path}: cannot be read ({error}); expected numbers, .npy or .json"
        ) from error
    if found.shape[1] != index.size:
        raise ConfigError(
            f"vector {path}: it has {found.shape[1]} values, {index.uri} holds vectors of "
            f"{index.size} (space {index.space})"
        )
    return found
