"""Read NVIDIA's network pickles as data: nothing in the file is imported or run.

stylegan2-ada-pytorch and stylegan3 pickle every network together with its Python source and run
that source when it is loaded. Here the pickle machine may call a short list of constructors, all
of them ours or harmless, and a network becomes a `PersistentObject`: its class name and its state.
"""

import io
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.errors import AssetError


@dataclass(frozen=True, slots=True)
class PersistentObject:
    """One object of NVIDIA's `persistence` scheme, inert: its embedded source is dropped unread.

    Attributes:
        class_name: the class it was, e.g. "Generator".
        state: its `__dict__`: settings, `_init_kwargs`, `_parameters`, `_buffers`, `_modules`.
    """

    class_name: str
    state: Mapping[str, Any]

    def child(self, name: str) -> "PersistentObject | None":
        """The submodule `name`, or None."""
        found = self.children().get(name)
        return found if isinstance(found, PersistentObject) else None

    def children(self) -> dict[str, "PersistentObject"]:
        """Submodules by name."""
        modules = self.state.get("_modules") or {}
        return {k: m for k, m in modules.items() if isinstance(m, PersistentObject)}

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Every parameter and buffer below, by its dotted name."""
        found: dict[str, Tensor] = {}
        for kind in ("_parameters", "_buffers"):
            for name, value in (self.state.get(kind) or {}).items():
                if isinstance(value, Tensor):
                    found[prefix + name] = value
        for name, module in self.children().items():
            found |= module.tensors(f"{prefix}{name}.")
        return found


def read_network_pickle(path: Path) -> Any:
    """Unpickle with the allow-list; networks come back as `PersistentObject`.

    Raises:
        AssetError: the file is broken, or asks for a global outside the list (the message names
            it).
    """
    try:
        with path.open("rb") as file:
            return _InertUnpickler(file, path).load()
    except AssetError:
        raise
    except Exception as error:  # a hostile or broken pickle can raise anything
        raise AssetError(
            f"{path}: not a readable network pickle ({type(error).__name__}: {error}); it is "
            f"broken, cut short or of another kind: download it again"
        ) from error


class _InertUnpickler(pickle.Unpickler):
    """A pickle machine that can reach the allow-list and nothing else."""

    def __init__(self, file: io.BufferedIOBase, path: Path) -> None:
        super().__init__(file)
        self._path = path
        # Made anew for each file: a pickle may set attributes on what it is handed.
        self._allowed = _constructors()

    def find_class(self, module: str, name: str) -> Any:
        found = self._allowed.get((module, name))
        if found is None:
            hint = "take the file from another source"
            if module.startswith(("dnnlib.tflib", "tfutil")):
                hint = (
                    "this is a TensorFlow network: convert it first with legacy.py of NVIDIA's "
                    "stylegan3 repository"
                )
            raise AssetError(
                f"{self._path}: refused to load: the pickle wants to use {module}.{name}, and "
                f"loading it could run code; expected a network of stylegan2-ada-pytorch or "
                f"stylegan3: {hint}"
            )
        return found


def _constructors() -> dict[tuple[str, str], Callable[..., Any]]:
    """The allow-list: what a network pickle may name, and what it gets instead."""

    class EasyDict(dict):  # type: ignore[type-arg]
        __slots__ = ()

        def __setstate__(self, state: Any) -> None:
            del state  # attributes of NVIDIA's EasyDict are its items

    def reconstruct(meta: Mapping[str, Any], *_: Any) -> PersistentObject:
        return PersistentObject(str(meta["class_name"]), dict(meta["state"]))

    def parameter(data: Tensor, *_: Any) -> Tensor:
        return data

    def load_from_bytes(data: bytes) -> Any:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)

    return {
        ("torch_utils.persistence", "_reconstruct_persistent_obj"): reconstruct,
        ("dnnlib.util", "EasyDict"): EasyDict,
        ("collections", "OrderedDict"): OrderedDict,
        ("torch._utils", "_rebuild_parameter"): parameter,
        ("torch._utils", "_rebuild_tensor_v2"): lambda *args: _rebuild_tensor(*args),
        ("torch.storage", "_load_from_bytes"): load_from_bytes,
        ("numpy._core.multiarray", "scalar"): lambda *args: _scalar(*args),
        ("numpy.core.multiarray", "scalar"): lambda *args: _scalar(*args),
        ("numpy", "dtype"): lambda *args: _InertDtype(*args),
        # How protocol 3 (Python 3.7, NVIDIA's own files) writes the empty set of a module's state.
        ("builtins", "set"): lambda *args: set(*args),
    }


def _rebuild_tensor(
    storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> Tensor:
    """A tensor over a storage, after a look at its bounds (torch would grow the storage "
    "silently)."""
    flat = torch.tensor([], dtype=storage.dtype)
    untyped = getattr(storage, "_untyped_storage", storage)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    available = untyped.nbytes() // flat.element_size()
    if min((offset, *size, *stride)) < 0 or (0 not in size and last >= available):
        raise ValueError(f"tensor of shape {tuple(size)} reaches outside its storage")
    return flat.set_(untyped, offset, tuple(size), tuple(stride)).clone()


class _InertDtype:
    """Stands for `numpy.dtype(spec)`; only plain numbers are let through."""

    def __init__(self, spec: str, *_: Any) -> None:
        if not re.fullmatch(r"[<>|=]?([fiu][1248]|b1)", spec):
            raise ValueError(f"numpy type {spec!r} is not a plain number")
        self.spec, self.order = spec.lstrip("<>|="), "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = ">" if state[1] == ">" else "<"


def _scalar(dtype: _InertDtype, data: bytes) -> float | int | bool:
    """`numpy.core.multiarray.scalar` as a Python number."""
    return np.frombuffer(data, dtype.order + dtype.spec)[0].item()
