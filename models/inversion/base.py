"""The one result type and the one contract of every inversion method.

Legend: N batch, L num_ws, D w_dim, C H W image.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from models.errors import ConfigError
from models.stylegan2.generator import Generator
from models.stylegan2.residual import LowRank


@dataclass(frozen=True, kw_only=True)
class Inversion:
    """What a method found for N pictures: the four doors of the generator, and who failed.

    Attributes:
        w_plus: one w per layer, float32.
        noise: one map [N 1 h w] per 3x3 convolution, or None for the generator's stored maps.
        features: replaced activations by layer (`Generator.synthesis`).
        residual: low-rank kernel additions by layer.
        failures: reason by row for pictures that could not be inverted (a diverged optimisation);
            their other fields hold finite placeholders and must not be used.
    """

    w_plus: Float[Tensor, "N L D"]
    noise: tuple[Float[Tensor, "N 1 h w"], ...] | None = None
    features: Mapping[int, Float[Tensor, "N C H W"]] | None = None
    residual: Mapping[int, LowRank] | None = None
    failures: Mapping[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.w_plus.shape[0]

    def __getitem__(self, rows: slice) -> "Inversion":
        """The same fields for a range of rows (step 1)."""
        start, stop, step = rows.indices(len(self))
        assert step == 1
        return Inversion(
            w_plus=self.w_plus[rows],
            noise=None if self.noise is None else tuple(n[rows] for n in self.noise),
            features=None
            if self.features is None
            else {k: f[rows] for k, f in self.features.items()},
            residual=None
            if self.residual is None
            else {k: r[rows] for k, r in self.residual.items()},
            failures={k - start: why for k, why in self.failures.items() if start <= k < stop},
        )

    def to(self, device: torch.device | str) -> "Inversion":
        return Inversion(
            w_plus=self.w_plus.to(device),
            noise=None if self.noise is None else tuple(n.to(device) for n in self.noise),
            features=None
            if self.features is None
            else {k: f.to(device) for k, f in self.features.items()},
            residual=None
            if self.residual is None
            else {k: r.to(device) for k, r in self.residual.items()},
            failures=dict(self.failures),
        )

    def render(self, generator: Generator) -> Float[Tensor, "N 3 H W"]:
        """The reconstruction: every door as it was found, the stored noise where none was."""
        noise = "const" if self.noise is None else list(self.noise)
        return generator.synthesis(self.w_plus, noise, self.features, self.residual)

    @staticmethod
    def cat(parts: Sequence["Inversion"]) -> "Inversion":
        """Join along the batch. All parts come from one method chain: they carry the same doors."""
        first, failures, at = parts[0], {}, 0
        for part in parts:
            failures |= {at + row: why for row, why in part.failures.items()}
            at += len(part)
        return Inversion(
            w_plus=torch.cat([p.w_plus for p in parts]),
            noise=None
            if first.noise is None
            else tuple(
                torch.cat(maps) for maps in zip(*(p.noise or () for p in parts), strict=True)
            ),
            features=None
            if first.features is None
            else {k: torch.cat([(p.features or {})[k] for p in parts]) for k in first.features},
            residual=None
            if first.residual is None
            else {k: LowRank.cat([(p.residual or {})[k] for p in parts]) for k in first.residual},
            failures=failures,
        )


class SampleRng:
    """One random stream per picture, so a result does not depend on the batch it was computed in.

    Args:
        seeds: one seed per row, usually `sample_seed(run_seed, sample_key)`.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self.seeds = list(seeds)
        self._streams = [torch.Generator().manual_seed(seed) for seed in self.seeds]

    def __len__(self) -> int:
        return len(self.seeds)

    def randn(self, *shape: int, device: torch.device | str = "cpu") -> Float[Tensor, "N ..."]:
        """[N, *shape] standard normal values, row n from stream n (always drawn on the CPU)."""
        return torch.stack([torch.randn(shape, generator=s) for s in self._streams]).to(device)

    def __getitem__(self, rows: slice) -> "SampleRng":
        """Fresh streams for a range of rows, from their seeds."""
        return SampleRng(self.seeds[rows])


def sample_seed(run_seed: int, sample_key: str) -> int:
    """A 63-bit seed from the run's seed and the sample's key; the same on every machine."""
    digest = hashlib.sha256(f"{run_seed}:{sample_key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@contextmanager
def frozen(generator: Generator) -> Iterator[None]:
    """Inside, no parameter of the generator takes a gradient; on leaving, the flags come back."""
    flags = [(p, p.requires_grad) for p in generator.parameters()]
    generator.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


class Method(ABC):
    """One way to invert pictures. A method is a class of one verb; methods chain through `init`.

    A subclass defines a frozen keyword-only dataclass `Config` (with
    `__pydantic_config__ = {"extra": "forbid"}` and a docstring under each field) just above itself
    and sets `Config = ThatDataclass`. It must be batch-invariant: row n depends on picture n, its
    `init` row and its stream of `rng` alone. The shared generator is left as it was, on errors too.
    """

    Config: ClassVar[type]
    needs_init: ClassVar[bool] = False
    """True when `invert` cannot start without the result of an earlier method."""
    summary: ClassVar[str]
    """One line for `refinery methods`: what it does, the space of its codes, the paper."""

    def __init__(self, generator: Generator, config: Any) -> None:
        self.generator, self.config = generator, config

    @abstractmethod
    def invert(
        self, images: Float[Tensor, "N 3 H W"], init: Inversion | None, rng: SampleRng
    ) -> Inversion:
        """Find the codes of pictures in [-1, 1] at the generator's resolution.

        Raises:
            ConfigError: `init` is missing where `needs_init`, before any work.
        """

    def check_inputs(
        self, images: Float[Tensor, "N 3 H W"], init: Inversion | None, rng: SampleRng
    ) -> None:
        """Refuse what no method can work with, before any work.

        Raises:
            ConfigError: `init` is missing where `needs_init`.
            ValueError: pictures of another size than the generator's, or counts that differ.
        """
        size = self.generator.resolution
        if images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(
                f"{type(self).__name__}.invert: expected pictures [N 3 {size} {size}], "
                f"found {list(images.shape)}"
            )
        if init is None and self.needs_init:
            raise ConfigError(
                f"{type(self).__name__}: it starts from the result of an earlier method and there "
                "is none: put another [[method]] (for example e4e) before it"
            )
        counts = {"images": len(images), "rng": len(rng), "init": len(init or images)}
        if len(set(counts.values())) > 1:
            raise ValueError(f"{type(self).__name__}.invert: row counts differ: {counts}")

    def hashes(self) -> dict[str, str]:
        """sha256 by name of every weight file this method computes with; part of the run's id."""
        return {}
