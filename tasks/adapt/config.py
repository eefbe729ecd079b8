"""What one adaptation job is: plain frozen values."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

from models.errors import ConfigError
from models.losses.clip_direction import TEMPLATES
from models.settings import Count, CountOrNone, NotNegative, Positive, Several, Share, check_fields
from models.stylegan2.tokens import Factorization
from tasks.adapt.terms import TERMS, Guidance
from tasks.job import InputConfig, MethodConfig

RATES = {"tokens": 0.015, "style": 0.05, "weights": 0.002}
"""Peak rate of Adam by form: chosen here, StyleDomain's, StyleGAN-NADA's."""


@dataclass(frozen=True, kw_only=True)
class DomainConfig:
    """One domain of a job."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    name: str
    """Of its folder below `out`."""
    guidance: Guidance = "images"
    """"text": a pair of texts; "image": one reference picture; "images": a set of them."""
    source_text: str = "photo of a face"
    """text: what the generator makes now."""
    target_text: str = ""
    """text: what it shall make."""
    templates: tuple[str, ...] = TEMPLATES
    """text: prompts that both texts are put into at {}; embeddings are averaged over them."""
    references: str = ""
    """image, images: a folder or prefix of pictures, a Parquet or tar file of them, or one file."""
    style: str = ""
    """image, images: of a Parquet file with the columns id, image and style only the rows of this
    style, without the fifth that is held out for scoring."""
    reference_limit: Count = 500
    """images: so many of them at most, the first by key."""
    colour: Share = 1.0
    """images: how far the references' colours are part of the style; at 0 they are recoloured to
    the source's mean and covariance, and only texture and line are learned."""
    strength: Positive = 1.0
    """Scale of what was learned, in the file: below 1 the faces are more their own. Previews while
    learning and scores are of 1."""
    weights: dict[str, float] = field(default_factory=dict)
    """Weights of loss terms that replace the guidance's own, by name in tasks/adapt/terms.py."""
    terms: str = "unknown"
    """For the card: on what terms the tokens may be used (those of the references)."""

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise ConfigError(f"name: expected the name of a folder, found {self.name!r}")
        check_fields(self, f"{self.name}: ")
        if self.guidance == "text":
            if not self.source_text.strip() or not self.target_text.strip():
                raise ConfigError(
                    f"{self.name}: text guidance needs source_text and target_text, "
                    f"found {self.source_text!r} and {self.target_text!r}"
                )
            if not self.templates or any("{}" not in t for t in self.templates):
                raise ConfigError(f"{self.name}: templates: expected texts with {{}} in each")
        elif not self.references:
            raise ConfigError(
                f"{self.name}: {self.guidance} guidance needs `references`: a picture, a folder, "
                "or a Parquet file with an image column"
            )
        self._check_weights()

    def _check_weights(self) -> None:
        allowed = [name for name, term in TERMS.items() if term.fits(self.guidance)]
        for name, value in self.weights.items():
            if name not in allowed:
                raise ConfigError(
                    f"{self.name}: weights.{name}: {self.guidance} guidance has the terms "
                    f"{', '.join(allowed)}"
                )
            if not value >= 0:
                raise ConfigError(f"{self.name}: weights.{name} must be >= 0, got {value}")
        if not any(self.weight(name) for name, term in TERMS.items() if term.is_pull):
            raise ConfigError(f"{self.name}: weights: no term pulls towards the domain")

    def weight(self, term: str) -> float:
        """Of a loss term; 0 switches it off."""
        return self.weights.get(term, TERMS[term].weights.get(self.guidance, 0.0))

    def needs(self, what: str) -> bool:
        """Whether a term that is on stands on it."""
        return any(self.weight(name) for name, term in TERMS.items() if what in term.needs)


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """One of the CLIPs that guide together."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    source: str = "refinery"
    """"refinery", a folder in transformers' format, or a hub id."""
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class AdaptConfig:
    """One job: domains that are optimised together. The defaults suit 64 px on a CPU."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    domain: tuple[DomainConfig, ...]
    out: str = "domains"
    """Folder that gets a folder for each domain."""
    generator: str = "faces64"
    """A bundled name or a checkpoint file; it stays as it is."""
    form: Literal["tokens", "style", "weights"] = "tokens"
    """"tokens": kernel tokens (RefineStyle); "style": offsets in style space (StyleDomain);
    "weights": all of the synthesis network (the baseline, as StyleGAN-NADA fine-tunes)."""
    factorization: Factorization = "shared"
    """How two token sets become a kernel: "shared", "per_tap" or "conv_lora"."""
    rank: Count = 4
    """Tokens of each set ("per_tap": for each tap of the kernel)."""
    layers: tuple[int, ...] = ()
    """Indices of the refined 3x3 layers, 0 at 4x4 px; none stands for all."""
    clips: tuple[ClipConfig, ...] = (ClipConfig(),)
    """CLIPs of the terms that need one; their losses are added with their weights."""
    steps: Count = 150
    batch: Several = 4
    """Codes of a step, two at least: pictures are compared with each other. Every domain sees the
    same ones."""
    truncation_psi: Share = 0.8
    """Of the codes (StyleGAN-NADA: 0.7)."""
    mixing: Share = 0.5
    """Share of the codes that are two, joined at a random row (StyleGAN's style mixing)."""
    noise: Literal["none", "const"] = "none"
    """The noise inputs while learning: at "const" a generator's stored grain is part of what the
    losses see."""
    views: Count = 3
    """What CLIP sees of a picture: the whole, and so many less one parts of it."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the networks while learning; bfloat16 is twice as fast where a CPU or GPU has it."""
    learning_rate: Positive | None = None
    """Peak rate of Adam; none stands for the form's own (`RATES`)."""
    warm_up: CountOrNone = 10
    """Steps in which the rate grows to its peak."""
    ramp_down: Share = 0.5
    """Share of the steps, at the end, in which it falls to 0 along a cosine."""
    augment: NotNegative = 0.1
    """Size of the random shifts, scales and turns of what CLIP sees; 0 shows the plain pictures."""
    identity: str | None = None
    """Name or file for `load_identity`, where a domain gives the identity term a weight."""
    validation_every: Count = 25
    """Steps between scores on held-out codes; the best tokens are kept."""
    validation_codes: Several = 16
    patience: CountOrNone = 0
    """A domain stops after so many scores without a new best; 0 never stops it."""
    preview_every: Count = 50
    """Steps between preview grids and checkpoints."""
    seed: int = 0
    device: str = "cpu"
    """On the command line "cuda" where there is a GPU."""
    threads: CountOrNone = 0
    """CPU threads; 0 keeps torch's choice."""
    input: InputConfig = field(default_factory=InputConfig)
    """How reference pictures are read: fit (crop, resize, align), columns, landmarks."""
    invert: tuple[MethodConfig, ...] = (
        MethodConfig(name="e4e"),
        MethodConfig(name="wplus", settings={"steps": 100}),
    )
    """image: the methods that find the reference's own code."""

    def __post_init__(self) -> None:
        names = [domain.name for domain in self.domain]
        if not names or len(set(names)) != len(names):
            raise ConfigError(f"domain: expected one or more with different names, found {names}")
        check_fields(self)
        for domain in self.domain:
            if domain.weight("identity") and self.identity is None:
                raise ConfigError(
                    f"{domain.name}: weights.identity needs `identity`, a face network"
                )
            if domain.needs("clip") and not self.clips:
                raise ConfigError(
                    f"{domain.name}: {domain.guidance} guidance needs a CLIP and `clips` is empty"
                )

    @property
    def peak_rate(self) -> float:
        if self.learning_rate is not None:
            return self.learning_rate
        return RATES[self.form]

    def rate(self, step: int) -> float:
        """Adam's rate of the update `step`, 0-based."""
        up = min(1.0, (step + 1) / self.warm_up) if self.warm_up else 1.0
        down = min(1.0, (1 - step / self.steps) / self.ramp_down) if self.ramp_down else 1.0
        return self.peak_rate * up * (0.5 - 0.5 * math.cos(math.pi * down))

    def settings(self) -> dict[str, Any]:
        """What decides the tokens, JSON-ready, the domains left out."""
        skipped = ("domain", "out", "preview_every", "threads")
        return {k: v for k, v in asdict(self).items() if k not in skipped}

    def job_id(self, hashes: dict[str, str]) -> str:
        """Hash over settings, domains, and the files they stand on."""
        weights = [{term: d.weight(term) for term in TERMS} for d in self.domain]
        values = [
            self.settings(),
            [asdict(d) for d in self.domain],
            weights,
            self.peak_rate,
            hashes,
        ]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
