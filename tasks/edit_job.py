"""What a job of edits is: plain frozen values, as in `tasks.job`.

`pipeline.edit` makes them from the command line or a TOML file.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from annotated_types import Ge

from tasks.job import FILE, PLACE, StoredJob


@dataclass(frozen=True, kw_only=True)
class StrengthConfig:
    """A direction or a domain, and how much of it."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: str = field(metadata=PLACE)
    """A bundled name, or a path or URL."""
    strength: float = 1.0
    """Directions: in their units, negative for the opposite. Domains: 0 is the plain generator, 1
    the domain."""


@dataclass(frozen=True, kw_only=True)
class BlendConfig:
    """Codes drawn towards those of another stored sample: interpolation, or style mixing."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    sample_key: str
    """The other sample, of the same run."""
    share: float = 0.5
    """0 keeps the codes, 1 takes the other's."""
    rows: tuple[int, ...] = ()
    """Rows of w+ that move; none stands for all."""


@dataclass(frozen=True, kw_only=True)
class VariantConfig:
    """One picture to make of every stored sample: blends first, then edits, then domains."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: str
    """Column of its picture, and the end of its metrics' columns ("age_change@older")."""
    edits: tuple[StrengthConfig, ...] = ()
    """Strength by direction: a bundled name, a name in directions/, or a file."""
    domains: tuple[StrengthConfig, ...] = ()
    """Strength by domain: a bundled name, a name in domains/, or a folder."""
    blends: tuple[BlendConfig, ...] = ()
    assigned: str | None = field(default=None, metadata=PLACE)
    """Path or URL of a .csv or .parquet table with the columns sample_key, domain and, if wanted,
    strength: each sample's own domain, beside `domains`. Samples that are not in it get none."""
    residual: Annotated[float, Ge(0)] = 1.0
    """Strength of what the sample has beside its codes (kernel residual, map F); below 1 the edit
    moves more and the picture's own details go."""


@dataclass(frozen=True, kw_only=True)
class EditJobConfig(StoredJob):
    """Edits of a run's samples. `perceptual` and `identity` score the drift from the inversion."""

    kind: ClassVar[str] = "edit"

    variants: tuple[VariantConfig, ...]
    attributes: str = field(default="auto", metadata=FILE)
    """Attribute scorer: "auto" (the bundled one where it fits the generator), a path, or "none"."""
    domain_folders: tuple[str, ...] = field(default=(), metadata=PLACE)
    """Where the names of domains in `assigned` tables are looked for, before the bundled ones."""

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "kind": self.kind}
