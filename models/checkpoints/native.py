"""Our own format: weights in safetensors, everything else in a JSON card beside them.

`NAME.safetensors` + `NAME.json`. The card says the architecture, the sha256 of the weights file,
the generator's hash, where the weights came from and on what terms. A discriminator that belongs
to a generator lies beside it as `NAME.discriminator.safetensors` + `NAME.discriminator.json`.

Weights may be stored in half precision; they are always float32 after loading, and hashes are taken
over those values, so that loading, saving and loading again keeps the hash.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from models.checkpoints.state_dict import (
    DiscriminatorArchitecture,
    build_discriminator,
    build_generator,
    settle_latent_avg,
)
from models.errors import AssetError
from models.files import atomically, file_sha256
from models.stylegan2.discriminator import Discriminator
from models.stylegan2.generator import Generator, GeneratorArchitecture, weights_hash

FORMAT = "style-refinery 1"
Kind = Literal["generator", "discriminator"]
T = TypeVar("T")


def save_generator(
    generator: Generator,
    path: str | Path,
    card: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write weights and card.

    Args:
        path: with or without `.safetensors`; the card gets `.json`.
        card: what the reader should know, stored as it is: `terms`, `provenance`, training data ...
            Where it says nothing of the two, the generator's own provenance is kept.
        dtype: precision of matrices, kernels and noise maps in the file; vectors stay float32.

    Returns:
        The path of the weights file.

    Raises:
        AssetError: a weight does not fit into `dtype`, or the file cannot be written.
    """
    known = generator.provenance
    origin = {k: v for k, v in known.items() if k not in ("terms", "card")}
    full = {
        "terms": known.get("terms", "unknown"),
        "provenance": origin,
        **card,
        "architecture": generator.architecture.to_dict(),
    }
    return _save("generator", generator, weights_path(path), full, dtype)


def save_discriminator(
    discriminator: Discriminator,
    path: str | Path,
    card: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a discriminator; see `save_generator`."""
    architecture = DiscriminatorArchitecture.of(discriminator).to_dict()
    full = {"terms": "unknown", **card, "architecture": architecture}
    return _save("discriminator", discriminator, weights_path(path), full, dtype)


def load_native_generator(path: Path) -> Generator:
    """Load a generator written by `save_generator`.

    Raises:
        AssetError: weights or card are missing, broken, or do not belong together.
    """
    card, state = _load("generator", path)
    architecture = _architecture(GeneratorArchitecture, card, path)
    generator = build_generator(architecture, state, path.name)
    latent_avg = settle_latent_avg(generator, path.name)
    found, expected = weights_hash(generator), card.get("generator_hash")
    if latent_avg == "stored" and expected != found:
        raise AssetError(
            f"{card_path(path)}: the card names generator {str(expected)[:12]}, the weights are "
            f"{found[:12]}; card and weights do not belong together: fetch both again"
        )
    generator.provenance = {
        "format": "native",
        "source": path.name,
        "terms": card.get("terms", "unknown"),
        "latent_avg": latent_avg,
        "notes": [],
        "card": card,
    }
    return generator


def load_native_discriminator(path: Path) -> Discriminator:
    """Load a discriminator: its own file, or the one that lies beside a generator's.

    Raises:
        AssetError: weights or card are missing, broken, or do not belong together.
    """
    if read_card(path).get("kind") == "generator":
        beside = discriminator_path(path)
        if not beside.is_file():
            raise AssetError(
                f"{path}: this generator came without a discriminator (no {beside.name} beside "
                f"it); convert a checkpoint that holds one"
            )
        path = beside
    card, state = _load("discriminator", path)
    architecture = _architecture(DiscriminatorArchitecture, card, path)
    return build_discriminator(architecture, state, path.name)


def read_card(path: Path) -> dict[str, Any]:
    """The JSON card that belongs to a weights file.

    Raises:
        AssetError: no card, or not one of ours.
    """
    beside = card_path(path)
    try:
        card = json.loads(beside.read_text())
    except FileNotFoundError:
        raise AssetError(
            f"{path}: no card {beside.name} beside it; our format is two files, the weights and "
            f"their JSON card: copy both, or convert the original checkpoint again"
        ) from None
    except (OSError, ValueError) as error:
        raise AssetError(f"{beside}: the card cannot be read as JSON: {error}") from error
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        found = card.get("format") if isinstance(card, dict) else type(card).__name__
        raise AssetError(
            f"{beside}: not a card of this format: found {found!r}, expected {FORMAT!r}; a newer "
            f"file needs a newer version of this program"
        )
    return card


def weights_path(path: str | Path) -> Path:
    """`NAME` or `NAME.safetensors` to `NAME.safetensors`."""
    path = Path(path)
    return path if path.suffix == ".safetensors" else path.with_name(path.name + ".safetensors")


def card_path(path: Path) -> Path:
    """The card of a weights file."""
    return path.with_name(path.name.removesuffix(".safetensors") + ".json")


def discriminator_path(path: Path) -> Path:
    """Where the discriminator of a generator's weights file lies."""
    return path.with_name(path.name.removesuffix(".safetensors") + ".discriminator.safetensors")


# ---------------------------------------------------------------------- inside


def _save(
    kind: Kind, module: nn.Module, path: Path, card: dict[str, Any], dtype: torch.dtype
) -> Path:
    stored = {name: _stored(name, value, dtype) for name, value in module.state_dict().items()}
    rounded = _Values({name: value.float() for name, value in stored.items()})
    try:
        # One entry only: several would be written in random order, and change the sha256.
        weights = save(stored, metadata={"format": f"{FORMAT} {kind}"})
        card = {
            "format": FORMAT,
            "kind": kind,
            **card,
            "dtype": str(dtype).removeprefix("torch."),
            "sha256": hashlib.sha256(weights).hexdigest(),
            f"{kind}_hash": weights_hash(rounded),
        }
        card |= {"format": FORMAT, "kind": kind}
        with atomically(card_path(path)) as card_file, atomically(path) as file:
            card_file.write((json.dumps(card, indent=2) + "\n").encode())
            file.write(weights)
    except (OSError, SafetensorError) as error:
        raise AssetError(
            f"{path}: cannot write the {kind}: {error}; check folder and space"
        ) from error
    return path


class _Values(nn.Module):
    """Holds tensors so that `weights_hash` can be taken over what a file will give back."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._values = dict(values)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return self._values


def _stored(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    value = value.detach().to("cpu", torch.float32).contiguous()
    if value.ndim < 2:
        return value.clone()
    cast = value.to(dtype)
    if torch.isfinite(value).all() and not torch.isfinite(cast).all():
        raise AssetError(
            f"{name}: values up to {value.abs().max():.3g} do not fit into {dtype}; "
            f"store this network in bfloat16 or float32"
        )
    return cast.clone()


def _architecture(kind: Callable[..., T], card: Mapping[str, Any], path: Path) -> T:
    """What the card says of the sizes; the keys of widths are texts there."""
    try:
        values = card["architecture"]
        widths = {int(resolution): int(width) for resolution, width in values["widths"].items()}
        return kind(**{**values, "widths": widths})
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise AssetError(f"{card_path(path)}: bad architecture in the card: {error}") from error


def _load(kind: Kind, path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    card = read_card(path)
    if card["kind"] != kind:
        raise AssetError(f"{path}: found a {card['kind']}, expected a {kind}: choose another file")
    try:
        digest = file_sha256(path)
    except OSError as error:
        raise AssetError(f"{path}: cannot be read: {error}") from error
    if digest != card.get("sha256"):
        raise AssetError(
            f"{path}: sha256 {digest[:12]} of the weights, {str(card.get('sha256'))[:12]} in the "
            f"card; one of the two was changed or cut short: fetch both again"
        )
    try:
        return card, load_file(path)
    except (SafetensorError, OSError) as error:
        raise AssetError(f"{path}: not a readable safetensors file: {error}") from error
