"""Convert any checkpoint to our own format or to rosinality's."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from models.checkpoints.load import load_discriminator, load_generator
from models.checkpoints.native import discriminator_path, save_discriminator, save_generator
from models.checkpoints.rosinality import save_rosinality
from models.errors import AssetError, ConfigError
from models.stylegan2.discriminator import Discriminator

logger = logging.getLogger(__name__)

TARGETS = (".safetensors", ".pt", ".pth")


def convert(
    source: str | Path,
    target: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    card: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write the networks of `source` to `target`, in the format that the target's suffix names.

    A discriminator in the source is kept: inside a `.pt`, or as `NAME.discriminator.safetensors`.
    One that is not supported (NVIDIA's cifar variant) is left out with a warning.

    Args:
        source: whatever `load_generator` takes.
        target: `.safetensors` for our format (a JSON card is written beside it), `.pt` or `.pth`
            for rosinality's.
        dtype: precision of the weights in a `.safetensors` target.
        card: more lines for the card, such as `terms`.

    Returns:
        The files that were written, weights first.

    Raises:
        ConfigError: unknown suffix, or the target is the source.
        AssetError: the source cannot be loaded, or the target cannot be written.
    """
    target = Path(target)
    if target.suffix not in TARGETS:
        raise ConfigError(
            f"convert: target {target.name!r} has suffix {target.suffix!r}; expected .safetensors "
            f"(our format) or .pt (rosinality)"
        )
    if target.exists() and Path(source).exists() and target.samefile(source):
        raise ConfigError(f"convert: target {target} is the source itself; choose another name")
    if not target.parent.is_dir():
        raise AssetError(f"convert: no folder {target.parent}; make it first")
    generator = load_generator(source)
    discriminator = _discriminator_or_none(source)
    if target.suffix != ".safetensors":
        save_rosinality(generator, discriminator, target)
        return [target]
    written = [save_generator(generator, target, card or {}, dtype)]
    written.append(target.with_suffix(".json"))
    if discriminator is not None:
        origin = {"terms": generator.provenance["terms"], **(card or {})}
        path = save_discriminator(discriminator, discriminator_path(target), origin, dtype)
        written += [path, path.with_suffix(".json")]
    return written


def _discriminator_or_none(source: str | Path) -> Discriminator | None:
    try:
        return load_discriminator(source)
    except AssetError as error:
        logger.warning("convert: the discriminator is left out: %s", error)
        return None
