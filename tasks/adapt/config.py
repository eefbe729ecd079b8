"""What one adaptation job is: plain frozen values."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, get_args

from models.errors import ConfigError
from models.losses.clip_direction import TEMPLATES
from models.stylegan2.tokens import Factorization, check_tokens
from tasks.job import InputConfig, MethodConfig

Guidance = Literal["text", "image", "images"]

WEIGHTS: dict[str, dict[str, float]] = {
    "text": {"direction": 1.0, "in_domain": 5.0, "content": 0.2},
    "image": {
        "across": 1.0,
        "within": 0.5,
        "reference_clip": 30.0,
        "reference_mse": 10.0,
        "reference_perceptual": 10.0,
    },
    "images": {"distribution": 1.0, "in_domain": 1.0, "content": 0.05},
}
"""Weights of the loss terms by guidance, where a domain does not set them. `image` has Mind the
Gap's (arXiv 2110.08398); the others are chosen here (docs/adaptation.md)."""
TERMS = (
    "direction",
    "across",
    "within",
    "reference_clip",
    "reference_mse",
    "reference_perceptual",
    "distribution",
    "adversarial",
    "in_domain",
    "content",
    "identity",
)
CLIP_TERMS = ("direction", "across", "within", "reference_clip")
ALLOWED = {
    "text": ("direction", "in_domain", "content", "identity"),
    "image": tuple(t for t in TERMS if t != "direction"),
    "images": ("direction", "distribution", "adversarial", "in_domain", "content", "identity"),
}
"""Terms that a guidance has what they need for."""


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
    reference_limit: int = 500
    """images: so many of them at most, the first by key."""
    weights: dict[str, float] = field(default_factory=dict)
    """Weights of loss terms that replace the guidance's own: direction, across, within,
    reference_clip, reference_mse, reference_perceptual, distribution, adversarial, in_domain,
    content, identity."""
    terms: str = "unknown"
    """For the card: on what terms the tokens may be used (those of the references)."""

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name or self.name.startswith("."):
            raise ConfigError(f"name: expected the name of a folder, found {self.name!r}")
        if self.guidance not in get_args(Guidance):
            raise ConfigError(
                f"{self.name}: guidance: expected one of {', '.join(get_args(Guidance))}, "
                f"found {self.guidance!r}"
            )
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
        if self.reference_limit < 1:
            raise ConfigError(f"{self.name}: reference_limit must be >= 1")
        self._check_weights()

    def _check_weights(self) -> None:
        for term, value in self.weights.items():
            if term not in ALLOWED[self.guidance]:
                raise ConfigError(
                    f"{self.name}: weights.{term}: {self.guidance} guidance has the terms "
                    f"{', '.join(ALLOWED[self.guidance])}"
                )
            if not value >= 0:
                raise ConfigError(f"{self.name}: weights.{term} must be >= 0, got {value}")
        pulls = [t for t in TERMS[:8] if self.weight(t)]
        if not pulls:
            raise ConfigError(f"{self.name}: weights: no term pulls towards the domain")

    def weight(self, term: str) -> float:
        """Of a loss term; 0 switches it off."""
        return self.weights.get(term, WEIGHTS[self.guidance].get(term, 0.0))


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
    form: Literal["tokens", "weights"] = "tokens"
    """"tokens": kernel tokens (RefineStyle); "weights": all of the synthesis network (the baseline,
    as StyleGAN-NADA fine-tunes)."""
    factorization: Factorization = "shared"
    """How two token sets become a kernel: "shared", "per_tap" or "conv_lora"."""
    rank: int = 4
    """Tokens of each set ("per_tap": for each tap of the kernel)."""
    layers: tuple[int, ...] | None = None
    """Indices of the refined 3x3 layers, 0 at 4x4 px; an empty list stands for all. Without it all
    but the two of the finest size, whose residuals add grain and little style."""
    clips: tuple[ClipConfig, ...] = (ClipConfig(),)
    """CLIPs of the terms that need one; their losses are added with their weights."""
    steps: int = 200
    batch: int = 6
    """Codes of a step; every domain sees the same ones."""
    truncation_psi: float = 0.8
    """Of the codes (StyleGAN-NADA: 0.7)."""
    learning_rate: float | None = None
    """Peak rate of Adam; none stands for 0.015 on tokens and 0.002 on weights (StyleGAN-NADA's)."""
    warm_up: int = 10
    """Steps in which the rate grows to its peak."""
    ramp_down: float = 0.5
    """Share of the steps, at the end, in which it falls to 0 along a cosine."""
    augment: float = 0.1
    """Size of the random shifts, scales and turns of what CLIP sees; 0 shows the plain pictures."""
    identity: str | None = None
    """File of ArcFace weights, where a domain gives the identity term a weight."""
    validation_every: int = 25
    """Steps between scores on held-out codes; the best tokens are kept."""
    validation_codes: int = 16
    patience: int = 0
    """A domain stops after so many scores without a new best; 0 never stops it."""
    preview_every: int = 50
    """Steps between preview grids and checkpoints."""
    seed: int = 0
    device: str = "cpu"
    """On the command line "cuda" where there is a GPU."""
    threads: int = 0
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
        check_tokens(self.factorization, self.rank)
        if self.form not in ("tokens", "weights"):
            raise ConfigError(f'form: expected "tokens" or "weights", found {self.form!r}')
        self._check_numbers()
        for domain in self.domain:
            if domain.weight("identity") and self.identity is None:
                raise ConfigError(
                    f"{domain.name}: weights.identity needs `identity`, a file of ArcFace weights"
                )
            if self.needs_clip(domain) and not self.clips:
                raise ConfigError(
                    f"{domain.name}: {domain.guidance} guidance needs a CLIP and `clips` is empty"
                )

    def _check_numbers(self) -> None:
        # Pictures are compared with each other: two at least.
        least = {"steps": 1, "validation_every": 1, "preview_every": 1, "warm_up": 0, "augment": 0}
        least |= {"patience": 0, "batch": 2, "validation_codes": 2}
        for name, bound in least.items():
            if not getattr(self, name) >= bound:
                raise ConfigError(f"{name} must be >= {bound}, got {getattr(self, name)}")
        for name in ("ramp_down", "truncation_psi"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be in 0..1, got {getattr(self, name)}")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ConfigError(f"learning_rate must be > 0, got {self.learning_rate}")

    @staticmethod
    def needs_clip(domain: DomainConfig) -> bool:
        return any(domain.weight(term) for term in CLIP_TERMS)

    @property
    def peak_rate(self) -> float:
        if self.learning_rate is not None:
            return self.learning_rate
        return 0.015 if self.form == "tokens" else 0.002

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
