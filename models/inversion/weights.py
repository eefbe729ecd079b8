"""Which weight file a method computes with, and whether it belongs to the generator at hand."""

import logging
from pathlib import Path

from models.checkpoints.bundled import find_for_generator
from models.errors import AssetError
from models.stylegan2.generator import Generator, weights_hash

logger = logging.getLogger(__name__)


def weights_file(method: str, generator: Generator, checkpoint: str | None) -> Path:
    """`checkpoint`, or the bundled `<method>.safetensors` whose card names the generator's hash.

    Args:
        method: its registry name, which is the file's and what `refinery train` takes.

    Raises:
        AssetError: neither; the message says what to set or to train.
    """
    if checkpoint is not None:
        return Path(checkpoint)
    digest = weights_hash(generator)
    path = find_for_generator(digest, f"{method}.safetensors")
    if path is None:
        raise AssetError(
            f"{method}: no bundled weights belong to this generator ({digest[:12]}...); set "
            "`checkpoint` to a network trained with it, or train one with "
            f"`refinery train {method}`"
        )
    return path


def check_generator(
    method: str, path: Path, trained_with: str | None, generator: Generator, allow_other: bool
) -> None:
    """Refuse weights of another generator, or warn where the setting allows them.

    Args:
        trained_with: hash in the file's card, None where the file does not say.

    Raises:
        AssetError: it was trained with another generator and `allow_other` is False.
    """
    digest = weights_hash(generator)
    if trained_with in (None, digest):
        return
    complaint = (
        f"{method}: `checkpoint` {path} was trained with generator {trained_with[:12]}..., "
        f"this one is {digest[:12]}..."
    )
    if not allow_other:
        raise AssetError(
            f"{complaint} Choose this generator's weights, or set `allow_other_generator` "
            "= true for a generator fine-tuned from that one"
        )
    logger.warning("%s", complaint)
