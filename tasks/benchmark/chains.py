"""The rows of the table: chains of methods with the settings they are compared at.

Step counts are those of 64 px faces on a CPU, chosen so that the whole table takes minutes; every
number that differs from a method's default stands here and nowhere else.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from models.checkpoints.bundled import find_for_generator
from models.errors import ConfigError

SEARCH = {"steps": 60}
"""Of the optimisations that start from the average code."""
TUNING = {"learning_rate": 1e-3, "steps": 150}
"""Of pivotal tuning, on any pivot: the preset `pti` and its threshold, reached three times faster
than at the published 3e-4, which was made for a generator of thirty times as many parameters."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """One method of a chain.

    Attributes:
        method: its registry name.
        settings: what differs from its defaults.
        weights: stem of its network's file, None for a method without one.
        train: what `refinery train` calls that network; the stem where empty.
        is_search: it optimises something for each picture, its network or not.
    """

    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    weights: str | None = None
    train: str = ""
    is_search: bool = False

    def resolved(self, folder: str | None, generator_hash: str) -> tuple[dict[str, Any], str]:
        """The method's table with the file that there is, and what to train where there is none.

        Args:
            folder: looked into before the bundled files.
        """
        table = {"name": self.method, **self.settings}
        if self.weights is None:
            return table, ""
        name = f"{self.weights}.safetensors"
        own = Path(folder) / name if folder else None
        path = own if own and own.is_file() else find_for_generator(generator_hash, name)
        if path is None:
            return table, f"no weights: refinery train {self.train or self.weights}"
        return {**table, "checkpoint": str(path)}, ""


@dataclass(frozen=True, kw_only=True)
class Editing:
    """How the pictures of a chain are edited.

    Attributes:
        kept: strength of what a picture has beside its codes, an edit's `residual`.
        times: factor of the protocol's strengths.
    """

    kept: float = 1.0
    times: float = 1.0


AS_IT_IS = Editing()


@dataclass(frozen=True, kw_only=True)
class Chain:
    """One row of the table.

    Attributes:
        name: also of its run's folder.
        links: its methods, the first one first.
        note: how it is run, for the table.
    """

    name: str
    links: tuple[Link, ...]
    note: str = ""
    editing: Editing = AS_IT_IS

    @property
    def reencoder(self) -> str | None:
        """The method that finds codes of edited pictures (latent editing consistency): the chain's
        own encoder. None where it begins with an optimisation, whose second run would measure
        the search and not the space."""
        first = self.links[0]
        return first.method if first.weights and not first.is_search else None


def _network(method: str, **changes: Any) -> Link:
    return Link(**{"method": method, "weights": method, **changes})


E4E, CYCLE = _network("e4e"), _network("cycle")
PTI = Link(method="pti", settings=TUNING)

CHAINS: tuple[Chain, ...] = (
    Chain(name="e4e", links=(E4E,)),
    Chain(name="psp", links=(_network("psp"),)),
    Chain(
        name="w-encoder",
        links=(_network("cycle", weights="w-encoder"),),
        note="an encoder to W, the offsets never opened",
    ),
    Chain(name="restyle", links=(_network("restyle"),)),
    Chain(name="lsap", links=(_network("lsap"),)),
    Chain(name="cycle", links=(CYCLE,)),
    Chain(name="cycle_refine", links=(_network("cycle_refine", weights="cycle", is_search=True),)),
    Chain(name="clcae", links=(_network("clcae"),)),
    Chain(
        name="clcae-half",
        links=(_network("clcae"),),
        note="edits keep half of the map",
        editing=Editing(kept=0.5),
    ),
    Chain(
        name="clcae-further",
        links=(_network("clcae"),),
        note="edits go 1.5 times as far and keep three quarters of the map",
        editing=Editing(kept=0.75, times=1.5),
    ),
    Chain(name="refine", links=(E4E, _network("refine"))),
    Chain(
        name="refine-one-stage",
        links=(_network("refine", weights="refine_one_stage", train="refine --set stages=one"),),
    ),
    Chain(
        name="w",
        links=(Link(method="wplus", settings={**SEARCH, "space": "w"}),),
        note="from the average code",
    ),
    Chain(
        name="wplus",
        links=(Link(method="wplus", settings=SEARCH),),
        note="from the average code",
    ),
    Chain(
        name="lsap_o",
        links=(Link(method="lsap_o", settings=SEARCH),),
        note="from the average code",
    ),
    Chain(name="refine_opt", links=(E4E, Link(method="refine_opt")), note="after e4e"),
    Chain(name="e4e+pti", links=(E4E, PTI)),
    Chain(name="cycle+pti", links=(CYCLE, PTI)),
)


def chosen_chains(names: Sequence[str] | None) -> tuple[Chain, ...]:
    """The chains of these names in the table's order; all for None.

    Raises:
        ConfigError: an unknown name.
    """
    known = {chain.name: chain for chain in CHAINS}
    unknown = sorted(set(names or ()) - set(known))
    if unknown:
        raise ConfigError(
            f"--methods: {unknown[0]!r} is no row of the table; rows: {', '.join(known)}"
        )
    return tuple(chain for chain in CHAINS if names is None or chain.name in names)
