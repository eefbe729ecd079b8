"""Encoder files: our own format, and official checkpoints, loaded strictly.

Ours is NAME.safetensors beside NAME.json, the card: kind, architecture, generator_hash, sha256,
provenance, terms, scores. Nothing in a file is executed.

Legend: L num_ws, D w_dim.
"""

import argparse
import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from models.encoders.e4e import Encoder4Editing
from models.encoders.psp import EncoderArchitecture, GradualStyleEncoder, PyramidEncoder
from models.encoders.restyle import BackboneEncoder, ProgressiveBackboneEncoder
from models.errors import AssetError
from models.files import atomically, file_sha256
from models.torch_file import read_state_dict

OFFICIAL_KINDS = {
    "Encoder4Editing": "e4e",
    "GradualStyleEncoder": "psp",
    "BackboneEncoder": "restyle-psp",
    "ProgressiveBackboneEncoder": "restyle-e4e",
}
"""`opts.encoder_type` of the official e4e, pSp and ReStyle checkpoints that load here."""


@dataclass(frozen=True, kw_only=True)
class LoadedEncoder:
    """An encoder ready to use, with what its file says about itself.

    Attributes:
        encoder: eval mode, float32, no gradients, on the CPU.
        latent_avg: [D] or [L D] to add to its codes; None where the generator's own is meant.
        generator_hash: the generator that it was trained with, None where the file does not say.
        sha256: of the weight file.
        card: the JSON card of our format; {"source": ...} for an official checkpoint.
    """

    encoder: PyramidEncoder
    sha256: str
    latent_avg: Tensor | None = None
    generator_hash: str | None = None
    card: Mapping[str, Any] = field(default_factory=dict)


def build_encoder(architecture: EncoderArchitecture) -> PyramidEncoder:
    """A freshly initialised encoder of the architecture's kind."""
    return ENCODERS[architecture.kind][1](architecture)


def load_encoder(path: str | Path, num_ws: int, w_dim: int) -> LoadedEncoder:
    """Open an encoder for a generator with `num_ws` rows of `w_dim`.

    Args:
        path: ours (.safetensors with its .json card), or an official e4e, pSp or ReStyle
            checkpoint (.pt).

    Raises:
        AssetError: missing, unreadable, damaged, or another layout; the message names what differs.
    """
    path = Path(path)
    if not path.is_file():
        raise AssetError(f"encoder {path}: no such file; set `checkpoint` to an encoder's file")
    if path.suffix == ".safetensors":
        return _load_native(path, num_ws, w_dim)
    return _load_official(path, num_ws, w_dim)


class Architecture(Protocol):
    """Sizes of a network as its card holds them."""

    @property
    def kind(self) -> str: ...
    def to_dict(self) -> dict[str, Any]: ...


class SizedNetwork(Protocol):
    """A module that knows its sizes."""

    @property
    def architecture(self) -> Architecture: ...
    def state_dict(self) -> dict[str, Tensor]: ...


Kinds = Mapping[str, tuple[Callable[..., Any], Callable[[Any], Any]]]
"""By `kind` of the card: what makes an architecture of the card's sizes, and a module of it."""

ENCODERS: Kinds = {
    "e4e": (EncoderArchitecture, Encoder4Editing),
    "psp": (EncoderArchitecture, GradualStyleEncoder),
    "restyle-e4e": (EncoderArchitecture, ProgressiveBackboneEncoder),
    "restyle-psp": (EncoderArchitecture, BackboneEncoder),
}


def save_encoder(
    encoder: SizedNetwork,
    path: str | Path,
    card: Mapping[str, Any],
    dtype: torch.dtype = torch.float16,
) -> Path:
    """Write NAME.safetensors and its card NAME.json; returns the former's path.

    Kernels and matrices are stored as `dtype`; vectors (biases, batch statistics) stay float32.
    `architecture` and `sha256` are added to the card.
    """
    path = Path(path)
    state = {
        name: (t.to(dtype) if t.ndim > 1 and t.is_floating_point() else t).cpu().contiguous()
        for name, t in encoder.state_dict().items()
    }
    weights = save(state)
    card = {
        "kind": encoder.architecture.kind,
        **card,
        "architecture": encoder.architecture.to_dict(),
        "sha256": hashlib.sha256(weights).hexdigest(),
    }
    text = json.dumps(card, indent=2, sort_keys=True) + "\n"
    with atomically(path.with_suffix(".json")) as card_file, atomically(path) as file:
        card_file.write(text.encode())
        file.write(weights)
    return path


def check_layout(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], complaint: str
) -> None:
    """Compare names and shapes.

    Raises:
        AssetError: `complaint`, then what is missing, unexpected and of another shape.
    """
    missing = [f"{k} {list(v.shape)}" for k, v in expected.items() if k not in found]
    unexpected = [f"{k} {list(v.shape)}" for k, v in found.items() if k not in expected]
    reshaped = [
        f"{k} expected {list(v.shape)} found {list(found[k].shape)}"
        for k, v in expected.items()
        if k in found and found[k].shape != v.shape
    ]
    parts = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", reshaped),
        )
        if names
    ]
    if parts:
        raise AssetError(f"{complaint}: {'; '.join(parts)}")


# ---------------------------------------------------------------------- our format


def differing_sizes(found: Architecture, wanted: Architecture, but: Collection[str] = ()) -> str:
    """In which sizes a file's network differs from a run's, for a message; empty where in none.

    Args:
        but: sizes that may differ.
    """
    its, own = found.to_dict(), wanted.to_dict()
    names = [name for name in own if name not in but and its.get(name) != own[name]]
    return ", ".join(f"its {name} is {its.get(name)}, this run's {own[name]}" for name in names)


def load_network(path: str | Path, kinds: Kinds) -> tuple[Any, str, dict[str, Any]]:
    """Open a network of our format, of any of the given kinds.

    Returns:
        The module (eval mode, float32, no gradients, on the CPU), the file's sha256 and the card.

    Raises:
        AssetError: missing, damaged, of another kind, or not laid out as its card says.
    """
    path = Path(path)
    if not path.is_file():
        raise AssetError(f"network {path}: no such file; set `checkpoint` to a network's file")
    card_path = path.with_suffix(".json")
    card = _read_card(card_path, kinds)
    sha256 = file_sha256(path)
    if card.get("sha256") != sha256:
        raise AssetError(
            f"encoder {path}: sha256 is {sha256}, its card says {card.get('sha256')}: the file is "
            "damaged or the card belongs to another one; fetch both again"
        )
    make_architecture, make = kinds[card["kind"]]
    try:
        architecture = make_architecture(**card["architecture"])
    except (KeyError, TypeError, ValueError) as error:
        raise AssetError(f"encoder card {card_path}: {error!r}") from error
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise AssetError(f"encoder {path}: cannot read the weights: {error}") from error
    module = filled(make, (architecture,), state, f"encoder {path}: not as its card says")
    return module, sha256, card


def check_size(path: Path, architecture: Any, num_ws: int, w_dim: int) -> None:
    """Refuse a network for another shape of w+.

    Raises:
        AssetError: rows or dimension differ.
    """
    if (architecture.num_ws, architecture.w_dim) != (num_ws, w_dim):
        raise AssetError(
            f"encoder {path}: it predicts {architecture.num_ws} rows of {architecture.w_dim}, the "
            f"generator needs {num_ws} rows of {w_dim}: choose the encoder of this generator"
        )


def _load_native(path: Path, num_ws: int, w_dim: int) -> LoadedEncoder:
    encoder, sha256, card = load_network(path, ENCODERS)
    check_size(path, encoder.architecture, num_ws, w_dim)
    if card.get("space") == "w" and isinstance(encoder, Encoder4Editing):
        encoder.stage = 0  # its training ended with w alone: the other heads mean nothing
    return LoadedEncoder(
        encoder=encoder, sha256=sha256, generator_hash=card.get("generator_hash"), card=card
    )


def _read_card(path: Path, kinds: Kinds) -> dict[str, Any]:
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise AssetError(
            f"encoder card {path}: no such file; it belongs beside the .safetensors file"
        ) from error
    except (OSError, ValueError) as error:
        raise AssetError(f"encoder card {path}: cannot read: {error}") from error
    if not isinstance(card, dict) or card.get("kind") not in kinds:
        kind = card.get("kind") if isinstance(card, dict) else type(card).__name__
        known = " or ".join(f'"{name}"' for name in kinds)
        raise AssetError(f"encoder card {path}: expected kind {known}, found {kind!r}")
    return card


# ---------------------------------------------------------------------- official checkpoints


def read_official(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], Tensor | None]:
    """A published training checkpoint: its options, the encoder's tensors, and latent_avg.

    Args:
        path: {state_dict, opts, latent_avg}, of which the latter two may be missing, or a state.

    Raises:
        AssetError: unreadable, or not a dict.
    """
    saved = read_state_dict(path)
    options = saved.get("opts") or {}
    options = vars(options) if isinstance(options, argparse.Namespace) else dict(options)
    state = saved.get("state_dict", saved)
    prefix = "encoder."
    if any(key.startswith(prefix) for key in state):
        state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    return (
        options,
        {k: v for k, v in state.items() if isinstance(v, Tensor)},
        saved.get("latent_avg"),
    )


def _load_official(path: Path, num_ws: int, w_dim: int) -> LoadedEncoder:
    options, state, latent_avg = read_official(path)
    name = options.get("encoder_type", "Encoder4Editing")
    if name not in OFFICIAL_KINDS:
        raise AssetError(
            f"{path}: its encoder is a {name}; expected one of {', '.join(OFFICIAL_KINDS)}"
        )
    kind = OFFICIAL_KINDS[name]
    channels = int(options.get("input_nc") or (6 if kind.startswith("restyle") else 3))
    architecture = EncoderArchitecture(
        num_ws=num_ws,
        w_dim=w_dim,
        kind=kind,  # type: ignore[arg-type]
        in_channels=channels,
    )
    complaint = f"{path}: not an official {name} for a generator with {num_ws} rows of {w_dim}"
    encoder = filled(build_encoder, (architecture,), state, complaint)
    if latent_avg is not None:
        latent_avg = latent_avg.float()
        if tuple(latent_avg.shape) not in ((w_dim,), (1, w_dim), (num_ws, w_dim)):
            raise AssetError(
                f"{path}: latent_avg is {list(latent_avg.shape)}, expected [{w_dim}] or "
                f"[{num_ws} {w_dim}]"
            )
    if not options.get("start_from_latent_avg", True):
        latent_avg = torch.zeros(w_dim)  # such a model was trained on absolute codes
    return LoadedEncoder(
        encoder=encoder,
        sha256=file_sha256(path),
        latent_avg=latent_avg,
        card={"source": f"official {name} checkpoint {path.name}"},
    )


def filled(
    make: Any, arguments: tuple[Any, ...], state: Mapping[str, Tensor], complaint: str
) -> Any:
    """Build an empty module, check names and shapes, then adopt the tensors without a copy.

    Raises:
        AssetError: `complaint`, then what differs.
    """
    # The meta device saves a gigabyte for the published encoders, but its first use imports half of
    # torch: a second of start-up that a small encoder need not pay.
    num_values = sum(v.numel() for v in state.values())
    with torch.random.fork_rng(devices=[]), torch.device("meta" if num_values > 2e7 else "cpu"):
        module: nn.Module = make(*arguments)
    check_layout(state, module.state_dict(), complaint)
    module.load_state_dict(
        {k: v.float() if v.is_floating_point() else v for k, v in state.items()}, assign=True
    )
    return module.eval().requires_grad_(False)
