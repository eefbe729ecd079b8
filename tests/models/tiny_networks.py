"""Files of small random networks that belong to a generator."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from models.encoders.checkpoint import build_encoder, save_encoder
from models.encoders.psp import EncoderArchitecture
from models.stylegan2.generator import Generator, weights_hash
from tests.conftest import make_tiny_generator

ARCHITECTURE = EncoderArchitecture.tiny(make_tiny_generator())


def save_network(
    path: Path, owner: Generator | str, make: Callable[[], Any], seed: int = 0, **card: Any
) -> Path:
    """A fresh network in a file whose card names a generator, or its hash.

    Matrices that begin at zero are drawn too: such a network changes pictures.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = make()
        for parameter in network.parameters():
            if parameter.ndim > 1 and not parameter.any():
                torch.nn.init.normal_(parameter, std=0.1)
    digest = owner if isinstance(owner, str) else weights_hash(owner)
    return save_encoder(network, path, {"generator_hash": digest, **card})


def save_tiny_encoder(path: Path, owner: Generator | str, **changes: Any) -> Path:
    """A pyramid encoder for the tiny generator."""
    architecture = EncoderArchitecture.tiny(make_tiny_generator(), **changes)
    return save_network(path, owner, lambda: build_encoder(architecture))
