"""Every method by name, one lazy line each: importing this file loads no method's code."""

import dataclasses
import importlib
from typing import TYPE_CHECKING, Any

from models.errors import ConfigError

if TYPE_CHECKING:
    from models.inversion.base import Method
    from models.stylegan2.generator import Generator

METHODS: dict[str, str] = {
    "cycle": "models.inversion.cycle:Cycle",
    "cycle_refine": "models.inversion.cycle_refine:CycleRefine",
    "e4e": "models.inversion.e4e:E4e",
    "lsap": "models.inversion.lsap:Lsap",
    "lsap_o": "models.inversion.lsap_o:LsapO",
    "pti": "models.inversion.pti:Pti",
    "clcae": "models.inversion.clcae:Clcae",
    "psp": "models.inversion.psp:Psp",
    "refine": "models.inversion.refine:Refine",
    "refine_opt": "models.inversion.refine_opt:RefineOpt",
    "restyle": "models.inversion.restyle:Restyle",
    "wplus": "models.inversion.wplus:WPlus",
}


def method_class(name: str) -> "type[Method]":
    """The class behind a registry line.

    Raises:
        ConfigError: no such method; the message lists the known ones.
    """
    if name not in METHODS:
        raise ConfigError(
            f"method {name!r} is unknown; known methods: {', '.join(sorted(METHODS))}"
        )
    module, attribute = METHODS[name].split(":")
    return getattr(importlib.import_module(module), attribute)


def load_method(name: str, generator: "Generator", **config: Any) -> "Method":
    """Build a method for a generator. It loads its assets: a missing one fails before any work.

    Raises:
        ConfigError: unknown method or setting, or a value out of range.
        AssetError: a weight file is missing or belongs to another generator.
    """
    cls = method_class(name)
    known = {f.name for f in dataclasses.fields(cls.Config)}
    unknown = sorted(set(config) - known)
    if unknown:
        raise ConfigError(
            f"method {name}: unknown setting {unknown[0]!r}; "
            f"known settings: {', '.join(sorted(known))}"
        )
    try:
        settings = cls.Config(**config)
    except ConfigError as error:
        raise ConfigError(f"method {name}: {error}") from error
    return cls(generator, settings)
