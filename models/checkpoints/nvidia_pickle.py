"""Read NVIDIA's network pickles as data: nothing in the file is imported or run.

stylegan2-ada-pytorch and stylegan3 pickle every network together with its Python source and run
that source when it is loaded. Here the pickle machine may call a short list of constructors, all
of them ours or harmless, and a network becomes a `PersistentObject`: its class name and its state.
The machine is the one written in Python: C's makes room for whatever memo number a file names.
"""

import io
import pickle
import re
import reprlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from models.errors import AssetError

DEEPEST = 32
"""Levels of modules inside modules; NVIDIA's networks have five."""


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

    def walk(self) -> Iterator[tuple[str, "PersistentObject"]]:
        """This object and all below, by dotted name; one before what is inside of it.

        Raises:
            ValueError: an object is in two places, in itself, or too deep inside: a small file can
                make of that a walk without an end.
        """
        waiting: list[tuple[str, PersistentObject]] = [("", self)]
        seen = set[int]()
        while waiting:
            name, found = waiting.pop()
            if id(found) in seen or name.count(".") > DEEPEST:
                raise ValueError(f"{name or 'the network'} is in two places, or too deep inside")
            seen.add(id(found))
            yield name, found
            inside = [(f"{name}.{k}" if name else k, m) for k, m in found.children().items()]
            waiting += inside[::-1]

    def tensors(self) -> dict[str, Tensor]:
        """Every parameter and buffer below, by its dotted name."""
        return {
            f"{place}.{name}" if place else name: value
            for place, module in self.walk()
            for kind in ("_parameters", "_buffers")
            for name, value in (module.state.get(kind) or {}).items()
            if isinstance(value, Tensor)
        }


@contextmanager
def asset_errors(path: Path) -> Iterator[None]:
    """Raise whatever a broken or hostile network raises inside as AssetError."""
    try:
        yield
    except AssetError:
        raise
    except Exception as error:
        raise AssetError(
            f"{path}: not a readable network pickle ({type(error).__name__}: {error}); it is "
            f"broken, cut short or of another kind: download it again"
        ) from error


def read_network_pickle(path: Path) -> Any:
    """Unpickle with the allow-list; networks come back as `PersistentObject`.

    Raises:
        AssetError: the file is broken, or asks for a global outside the list (the message names
            it).
    """
    with asset_errors(path), path.open("rb") as file:
        return _InertUnpickler(file, path).load()


class _InertUnpickler(pickle._Unpickler):
    """A pickle machine that can reach the allow-list and nothing else, and whose keys are plain: a
    few hundred bytes make a tuple of tuples that takes years to hash."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, file: io.BufferedIOBase, path: Path) -> None:
        super().__init__(file)
        self._path = path
        # Made anew for each file: a pickle may set attributes on what it is handed.
        self._allowed = _constructors()

    def load_setitems(self) -> None:
        items = self.pop_mark()
        target = self.stack[-1]
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_plain(key)] = value

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.stack[-1][_plain(key)] = value

    def load_dict(self) -> None:
        items = self.pop_mark()
        pairs = zip(items[::2], items[1::2], strict=True)
        self.stack.append({_plain(key): value for key, value in pairs})

    def load_additems(self) -> None:
        items = self.pop_mark()
        self.stack[-1].update(map(_plain, items))

    def load_frozenset(self) -> None:
        self.stack.append(frozenset(map(_plain, self.pop_mark())))

    dispatch |= {
        pickle.SETITEMS[0]: load_setitems,
        pickle.SETITEM[0]: load_setitem,
        pickle.DICT[0]: load_dict,
        pickle.ADDITEMS[0]: load_additems,
        pickle.FROZENSET[0]: load_frozenset,
    }

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

        def __init__(self, items: Any = ()) -> None:
            super().__init__(_plain_pairs(items))

        def __setstate__(self, state: Any) -> None:
            del state  # attributes of NVIDIA's EasyDict are its items

    def reconstruct(meta: Mapping[str, Any], *_: Any) -> PersistentObject:
        name, state = meta["class_name"], meta["state"]
        if not (isinstance(name, str) and isinstance(state, Mapping)):
            raise ValueError("an object without a class name and a state")
        return PersistentObject(name, dict(state))

    def parameter(data: Tensor, *_: Any) -> Tensor:
        return data

    def load_from_bytes(data: bytes) -> Any:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)

    return {
        ("torch_utils.persistence", "_reconstruct_persistent_obj"): reconstruct,
        ("dnnlib.util", "EasyDict"): EasyDict,
        ("collections", "OrderedDict"): lambda items=(): OrderedDict(_plain_pairs(items)),
        ("torch._utils", "_rebuild_parameter"): parameter,
        ("torch._utils", "_rebuild_tensor_v2"): lambda *args: _rebuild_tensor(*args),
        ("torch.storage", "_load_from_bytes"): load_from_bytes,
        ("numpy._core.multiarray", "scalar"): lambda *args: _scalar(*args),
        ("numpy.core.multiarray", "scalar"): lambda *args: _scalar(*args),
        ("numpy", "dtype"): lambda *args: _InertDtype(*args),
        # How protocol 3 (Python 3.7, NVIDIA's own files) writes the empty set of a module's state.
        ("builtins", "set"): lambda items=(): set(map(_plain, items)),
    }


def _plain(key: Any) -> Any:
    """A key or member, which is text or a number."""
    if not isinstance(key, str | bytes | int | float | None):
        raise ValueError(f"a key of type {type(key).__name__}")
    return key


def _plain_pairs(items: Any) -> dict[Any, Any]:
    pairs = items.items() if isinstance(items, Mapping) else items
    return {_plain(key): value for key, value in pairs}


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
        if not (isinstance(spec, str) and re.fullmatch(r"[<>|=]?([fiu][1248]|b1)", spec)):
            raise ValueError(f"numpy type {reprlib.repr(spec)} is not a plain number")
        self.spec, self.order = spec.lstrip("<>|="), "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = ">" if state[1] == ">" else "<"


def _scalar(dtype: _InertDtype, data: bytes) -> float | int | bool:
    """`numpy.core.multiarray.scalar` as a Python number."""
    return np.frombuffer(data, dtype.order + dtype.spec)[0].item()
