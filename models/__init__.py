"""Tensors in, tensors out: the stable public face of the generator and the inversion methods.

    from models import SampleRng, load_generator, load_method

    generator = load_generator("faces64")
    inversion = load_method("e4e", generator).invert(images, None, SampleRng([0]))
    picture = inversion.render(generator)

Names load on first use (PEP 562): `refinery --help` and `models.errors` do not wait for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.checkpoints.load import load_generator as load_generator
    from models.inversion.base import Inversion as Inversion
    from models.inversion.base import Method as Method
    from models.inversion.base import SampleRng as SampleRng
    from models.inversion.base import sample_seed as sample_seed
    from models.inversion.registry import load_method as load_method
    from models.stylegan2.generator import Generator as Generator
    from models.stylegan2.residual import LowRank as LowRank

_HOME = {
    "Generator": "models.stylegan2.generator",
    "Inversion": "models.inversion.base",
    "LowRank": "models.stylegan2.residual",
    "Method": "models.inversion.base",
    "SampleRng": "models.inversion.base",
    "load_generator": "models.checkpoints.load",
    "load_method": "models.inversion.registry",
    "sample_seed": "models.inversion.base",
}

__all__ = [
    "Generator",
    "Inversion",
    "LowRank",
    "Method",
    "SampleRng",
    "load_generator",
    "load_method",
    "sample_seed",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'models' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
