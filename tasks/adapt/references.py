"""Reference pictures, through the same readers and decoder as an inversion's.

Legend: M pictures, H W image.
"""

import hashlib
import logging
from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from models.errors import ConfigError, RefineryError, SampleError
from tasks.adapt.config import DomainConfig
from tasks.adapt.portraits import read_portraits
from tasks.input.decode import decode
from tasks.input.plan import plan_shards
from tasks.input.read import read_shard
from tasks.input.sample import RawSample
from tasks.job import InputConfig

logger = logging.getLogger(__name__)

SHOWN = 3
"""Unreadable pictures that a message names."""


def load_references(
    domain: DomainConfig, input: InputConfig, resolution: int
) -> tuple[Float[Tensor, "M 3 H W"], str]:
    """Pictures in [-1, 1] at the generator's size, and the sha256 of their pixels.

    Some unreadable pictures are named in a warning and left out.

    Raises:
        ConfigError: nothing there, or no picture that can be read; names them and says why.
    """
    pictures: list[np.ndarray] = []
    failed: list[str] = []
    limit = 1 if domain.guidance == "image" else domain.reference_limit
    try:
        for sample in _samples(domain, input, resolution):
            if len(pictures) == limit:
                break
            try:
                pictures.append(decode(sample, input, resolution))
            except SampleError as error:
                failed.append(f"{sample.key} ({error})")
    except RefineryError as error:
        raise ConfigError(f"{domain.name}: references {domain.references}: {error}") from error
    named = "; ".join(failed[:SHOWN]) + ("; ..." if len(failed) > SHOWN else "")
    if not pictures:
        found = f"{len(failed)} that cannot be used: {named}" if failed else "no picture"
        raise ConfigError(
            f"{domain.name}: references {domain.references}: found {found}; give at least one "
            'picture of the domain (10 or more for guidance = "images")'
        )
    if failed:
        logger.warning(
            "%s: %d of %d references left out: %s",
            domain.name,
            len(failed),
            len(failed) + len(pictures),
            named,
        )
    pixels = np.stack(pictures)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    return images, hashlib.sha256(pixels.tobytes()).hexdigest()


def _samples(domain: DomainConfig, input: InputConfig, resolution: int) -> Iterator[RawSample]:
    if not domain.style:
        for spec in plan_shards(domain.references, 256, input=input):
            yield from read_shard(spec, input)
        return
    styles = read_portraits(domain.references, resolution)
    if domain.style not in styles:
        raise ConfigError(f"no style {domain.style!r}; it has {', '.join(styles)}")
    for key, data in styles[domain.style].training.items():
        yield RawSample(key=key, uri=f"{domain.references}#{key}", data=data)
