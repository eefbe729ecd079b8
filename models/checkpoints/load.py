"""One door for every checkpoint format: the kind of a file is read from its first bytes."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from models.checkpoints import bundled
from models.checkpoints.native import load_native_discriminator, load_native_generator
from models.checkpoints.nvidia import load_nvidia_discriminator, load_nvidia_generator
from models.checkpoints.rosinality import (
    load_rosinality_discriminator,
    load_rosinality_generator,
)
from models.errors import AssetError
from models.stylegan2.discriminator import Discriminator
from models.stylegan2.generator import Generator

FileKind = Literal["rosinality", "nvidia", "native"]
LOADERS: dict[FileKind, tuple[Callable[[Path], Generator], Callable[[Path], Discriminator]]] = {
    "rosinality": (load_rosinality_generator, load_rosinality_discriminator),
    "nvidia": (load_nvidia_generator, load_nvidia_discriminator),
    "native": (load_native_generator, load_native_discriminator),
}

SUPPORTED = (
    "supported: rosinality .pt (also pSp/e4e files), NVIDIA .pkl (stylegan2-ada-pytorch, stylegan2 "
    "of the stylegan3 repository), our .safetensors with its .json card"
)
# torch.save before 1.6 wrote a pickle that opens with this number.
_LEGACY_TORCH = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"
_KNOWN_STRANGERS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself: run `git lfs pull`"),
    (b"<", "a web page or XML (a download that asked for a login or a confirmation?)"),
    (b"\x89HDF", "an HDF5 file (Keras or TensorFlow)"),
    (b"\x1f\x8b", "a gzip archive: unpack it first"),
    (b"BZh", "a bzip2 archive: unpack it first"),
    (b"{", "a JSON file: name the .safetensors file beside it"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8", "a picture"),
)


def load_generator(path: str | Path) -> Generator:
    """Load a generator: a bundled name such as "faces64", or a checkpoint file.

    The kind of file is told from its content, whatever its suffix. Nothing in a file is ever run.

    Returns:
        The generator in eval mode, frozen, float32, on the CPU. `generator.provenance` holds
        `format`, `source`, `terms`, `latent_avg` ("stored" or how it was estimated), `notes`,
        `card`.

    Raises:
        AssetError: no such name or file, a wrong or unsafe file, an unsupported architecture.
    """
    file = _file_of(path)
    generator = LOADERS[sniff(file)][0](file)
    if str(path) in bundled.bundled_names():
        generator.provenance |= {"format": "bundled", "source": str(path)}
    return generator


def load_discriminator(path: str | Path) -> Discriminator:
    """Load the discriminator that a checkpoint carries; see `load_generator`.

    Raises:
        AssetError: the checkpoint has none, or as for `load_generator`.
    """
    file = _file_of(path)
    return LOADERS[sniff(file)][1](file)


def sniff(path: Path) -> FileKind:
    """The kind of a checkpoint file, from its first bytes.

    Raises:
        AssetError: none of ours; the message says what was found, what is supported, what to do.
    """
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise AssetError(f"{path}: cannot be read: {error}") from error
    # Before the pickles: the length of a safetensors header may begin with a pickle's 0x80.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**27:
        return "native"
    if head.startswith(b"PK\x03\x04"):
        return "rosinality"
    if head.startswith(b"\x80"):
        return "rosinality" if head[2:].startswith(_LEGACY_TORCH) else "nvidia"
    found = f"first bytes {head[:8].hex(' ')}" if head else "an empty file"
    for start, description in _KNOWN_STRANGERS:
        if head.lstrip().startswith(start):
            found = description
            break
    raise AssetError(
        f"{path}: not a checkpoint: found {found}; {SUPPORTED}; check the path or download again"
    )


def _file_of(path: str | Path) -> Path:
    """The file of a bundled name, or the one that was named."""
    if str(path) in bundled.bundled_names():
        return bundled.asset_path(str(path), bundled.GENERATOR_FILE)
    return _existing(path)


def _existing(path: str | Path) -> Path:
    file = Path(path)
    if file.is_file():
        return file
    known = ", ".join(bundled.bundled_names()) or "(none)"
    if file.is_dir():
        raise AssetError(f"{path}: this is a folder; name the checkpoint file in it; {SUPPORTED}")
    if "://" in str(path):
        raise AssetError(f"{path}: expected a local file, found a URL: download it first")
    raise AssetError(
        f"{path}: no such file and no bundled generator of that name (bundled: {known}); "
        f"{SUPPORTED}"
    )
