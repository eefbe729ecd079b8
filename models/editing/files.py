"""Raw vectors as the field publishes them, as directions of this project.

InterFaceGAN boundaries (`.npy`, [1 D] or [D]), one vector for each row ([L D]), e4e's directions
(`.pt`), and GANSpace's components (`.pt`, `.npz`: a mapping of mean, comp, std or of lat_mean,
lat_comp, lat_std). Files are read as data: a pickle that asks for more than tensors is refused.

Legend: L num_ws, D w_dim, K principal components.
"""

import hashlib
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from models.editing.direction import Direction
from models.editing.ganspace import spread_along
from models.errors import AssetError, ConfigError
from models.statistics import statistics_for
from models.stylegan2.generator import Generator, weights_hash

RAW_SUFFIXES = (".npy", ".npz", ".pt", ".pth")


def import_direction(
    path: str | Path,
    generator: Generator,
    name: str | None = None,
    *,
    unit: float | None = None,
    layers: Sequence[int] | None = None,
    component: int | None = None,
    is_set: bool = False,
    terms: str = "unknown",
) -> Direction:
    """A direction from a raw vector. That it was made for this generator cannot be checked.

    Args:
        name: by default the file's name without its ending.
        unit: length of a step of strength 1. By default GANSpace's own standard deviation, else one
            of mapped codes along the vector, so that each row moves by its share of its own. The
            length that the vector has in the file does not matter: 1 gives InterFaceGAN's steps.
        layers: rows of w+ that move, None for all.
        component: which one of a file of GANSpace's components.
        is_set: with `component`, a strength is set instead of added (`Direction.origin`).
        terms: on which the vector may be used, for the card.

    Raises:
        AssetError: missing, unsafe, not such a file, of another size than the generator's W, zero
            or not finite.
        ConfigError: a component is missing, out of range, or asked of a file that has none; the
            unit is not positive.
    """
    path = Path(path)
    if unit is not None and not unit > 0:
        raise ConfigError(f"direction {path}: expected a unit above 0, got {unit}")
    content = _read(path)
    mean: Tensor | None = None
    if isinstance(content, Mapping):
        values, mean, sigma = _component(content, component, path)
        unit = sigma if unit is None else unit
    elif component is not None or is_set:
        raise ConfigError(
            f"direction {path}: it is one vector, not a file of GANSpace's components: leave out "
            "component and is_set"
        )
    else:
        values = content
    vector = _vector(values, generator, path)
    return Direction(
        name=name or path.stem,
        vector=vector,
        unit=_spread(vector, generator) if unit is None else unit,
        generator_hash=weights_hash(generator),
        layers=None if layers is None else tuple(layers),
        origin=float(_flat(mean).double() @ vector.double())
        if is_set and mean is not None
        else None,
        card={
            "what": f"imported from {path.name}"
            + ("" if component is None else f", component {component}"),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "terms": terms,
        },
    )


def _read(path: Path) -> Tensor | Mapping[str, Any]:
    try:
        if path.suffix == ".npy":
            return torch.from_numpy(np.load(path, allow_pickle=False).astype(np.float32))
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                return {k: torch.from_numpy(file[k].astype(np.float32)) for k in file.files}
        if path.suffix in (".pt", ".pth"):
            found = torch.load(path, map_location="cpu", weights_only=True)
            if isinstance(found, Tensor | Mapping):
                return found
            raise ValueError(f"expected a tensor or a mapping of tensors, it holds {type(found)}")
    except (
        OSError,
        ValueError,
        TypeError,
        EOFError,
        RuntimeError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
    ) as error:
        raise AssetError(
            f"direction {path}: cannot read it as plain numbers ({error}); expected one array in a "
            ".npy or .pt file, saved without pickled objects"
        ) from error
    raise AssetError(f"direction {path}: expected a file ending in {', '.join(RAW_SUFFIXES)}")


def _component(
    content: Mapping[str, Any], component: int | None, path: Path
) -> tuple[Tensor, Tensor, float]:
    """Vector, mean and standard deviation of one of GANSpace's components."""
    for prefix in ("", "lat_"):
        parts = [content.get(f"{prefix}{key}") for key in ("comp", "mean", "std")]
        if all(isinstance(part, Tensor) for part in parts):
            break
    else:
        raise AssetError(
            f"direction {path}: expected a tensor, or GANSpace's comp, mean and std (or lat_comp, "
            f"lat_mean, lat_std); it has {', '.join(map(str, content)) or 'nothing'}"
        )
    comp, mean, std = (part.float() for part in parts if part is not None)
    comp = comp.reshape(len(comp), -1)
    if component is None or not 0 <= component < len(comp):
        raise ConfigError(
            f"direction {path}: it holds {len(comp)} components; say which one with component "
            f"(0..{len(comp) - 1}), got {component}"
        )
    return comp[component], mean, float(std.flatten()[component])


def _vector(
    values: Tensor, generator: Generator, path: Path
) -> Float[Tensor, " D"] | Float[Tensor, "L D"]:
    """Of norm 1, all rows together."""
    found = values.detach().float().squeeze()
    rows, dim = generator.num_ws, generator.w_dim
    if list(found.shape) not in ([dim], [rows, dim]):
        raise AssetError(
            f"direction {path}: expected {dim} numbers, or {dim} for each of {rows} rows, for this "
            f"{generator.resolution} px generator; found {list(values.shape)}: it was made for "
            "another generator"
        )
    length = float(found.norm())
    if not found.isfinite().all() or length == 0:
        raise AssetError(f"direction {path}: its numbers are all zero or not finite")
    return found / length


def _spread(vector: Float[Tensor, " D"] | Float[Tensor, "L D"], generator: Generator) -> float:
    """Standard deviation of mapped codes along the vector; of several rows, if all went together:
    sum over rows of |v_l| sigma_l."""
    statistics = statistics_for(generator)
    rows = [row for row in vector.reshape(-1, vector.shape[-1]) if row.any()]
    return sum(float(row.norm()) * spread_along(statistics, row) for row in rows)


def _flat(values: Tensor) -> Float[Tensor, " D"]:
    return values.detach().float().flatten()
