"""What one edit job is: plain frozen values that travel to every worker.

`pipeline.edit` makes them from the command line or a TOML file; `edit_shard` reads nothing else.
"""

from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

from tasks.job import OutputConfig


@dataclass(frozen=True, kw_only=True)
class StrengthConfig:
    """A direction or a domain, and how much of it."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: str
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
    domains: tuple[StrengthConfig, ...] = ()
    blends: tuple[BlendConfig, ...] = ()
    assigned: str | None = None
    """Path or URL of a .csv or .parquet table with the columns sample_key, domain and, if wanted,
    strength: each sample's own domain, beside `domains`. Samples that are not in it get none."""
    residual: float = 1.0
    """Strength of the sample's own kernel residual; below 1 it lets go of the picture's details."""


@dataclass(frozen=True, kw_only=True)
class EditJobConfig:
    """Everything that decides the bytes of an edit run, and nothing else (no engine settings)."""

    source: str
    """The run whose samples are edited."""
    source_run: str
    """Its run id."""
    generator: str
    """The generator of that run."""
    method: str
    """Its method chain, e.g. "e4e+wplus"."""
    variants: tuple[VariantConfig, ...]
    output: OutputConfig = field(default_factory=OutputConfig)
    batch: int = 16
    """Samples rendered together. It never changes a result by more than rounding."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    perceptual: str = "auto"
    """Perceptual distance of the drift, as in an inversion job; "none" for no drift."""
    identity: str | None = None
    """Path or URL of ArcFace IR-SE50 weights; adds the drift of identity."""
    attributes: str = "auto"
    """Attribute scorer: "auto" (the bundled one where it fits the generator), a path, or "none"."""
    domain_folders: tuple[str, ...] = ()
    """Where the names of domains in `assigned` tables are looked for, before the bundled ones."""
    kind: Literal["edit"] = "edit"
    """Tells run.json of an edit run from that of an inversion."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values, the part of run.json that is hashed."""
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> "EditJobConfig":
        """The inverse of `to_dict`, after JSON has made lists of tuples."""
        values = dict(values)
        variants = [
            VariantConfig(
                **{
                    **variant,
                    "edits": tuple(StrengthConfig(**edit) for edit in variant["edits"]),
                    "domains": tuple(StrengthConfig(**domain) for domain in variant["domains"]),
                    "blends": tuple(
                        BlendConfig(**{**blend, "rows": tuple(blend["rows"])})
                        for blend in variant["blends"]
                    ),
                }
            )
            for variant in values.pop("variants")
        ]
        output = dict(values.pop("output"))
        output["pictures"] = tuple(output["pictures"])
        values["domain_folders"] = tuple(values.get("domain_folders", ()))
        return EditJobConfig(**values, variants=tuple(variants), output=OutputConfig(**output))
