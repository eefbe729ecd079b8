"""The one result type and the one contract of every inversion method.

Legend: N batch, L num_ws, D w_dim, C H W image.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from models.errors import ConfigError
from models.stylegan2.generator import Generator, StyleShift
from models.stylegan2.residual import LowRank, Residual
from models.stylegan2.weight_delta import TunedWeights, WeightDelta

HALF_MAX = float(torch.finfo(torch.float16).max)
FAR_OUT = 10.0
"""No picture in [-1, 1] comes near it, nor noise about it; one in 0..255 is beyond."""


@dataclass(frozen=True, kw_only=True)
class Inversion:
    """What a method found for N pictures: the doors of the generator, and who failed.

    Attributes:
        w_plus: one w per layer, float32.
        noise: one map [N 1 h w] per 3x3 convolution, or None for the generator's stored maps.
        features: replaced activations by layer (`Generator.synthesis`).
        residual: low-rank kernel additions by layer.
        weights: changes of the generator's parameters by name, where it was tuned to each picture.
            Such rows render one at a time.
        style_shift: an edit in style space by layer, [N I]: `edited` gives it, no method does.
        failures: reason by row for pictures that could not be inverted (a diverged optimisation);
            their other fields hold finite placeholders and must not be used.
    """

    w_plus: Float[Tensor, "N L D"]
    noise: tuple[Float[Tensor, "N 1 h w"], ...] | None = None
    features: Mapping[int, Float[Tensor, "N C H W"]] | None = None
    residual: Residual | None = None
    weights: TunedWeights | None = None
    style_shift: StyleShift | None = None
    failures: Mapping[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.w_plus.shape[0]

    def __getitem__(self, rows: slice) -> "Inversion":
        """The same fields for a range of rows (step 1)."""
        start, stop, step = rows.indices(len(self))
        assert step == 1
        kept = {k - start: why for k, why in self.failures.items() if start <= k < stop}
        return replace(self._each(lambda part: part[rows]), failures=kept)

    def to(self, device: torch.device | str) -> "Inversion":
        return self._each(lambda part: part.to(device))

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name, as a stored run names them: `w_plus`, `noise_<layer>`,
        `features_<layer>`, `residual_<layer>_u` and `_v`, `weights_<parameter>_codes` and `_step`,
        layers numbered as `Generator.synthesis` does; of an edit `style_<layer>`."""
        found = {"w_plus": self.w_plus}
        found |= {f"noise_{i}": m for i, m in enumerate(self.noise or ())}
        found |= {f"features_{k}": f for k, f in sorted((self.features or {}).items())}
        for layer, low_rank in sorted((self.residual or {}).items()):
            found[f"residual_{layer}_u"], found[f"residual_{layer}_v"] = low_rank.u, low_rank.v
        for name, delta in sorted((self.weights or {}).items()):
            found[f"weights_{name}_codes"], found[f"weights_{name}_step"] = delta.codes, delta.step
        found |= {f"style_{k}": shift for k, shift in sorted((self.style_shift or {}).items())}
        return found

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> "Inversion":
        """The inverse of `tensors`.

        Raises:
            ValueError: a name that `tensors` does not give.
        """
        noise: dict[int, Tensor] = {}
        features: dict[int, Tensor] = {}
        residual: dict[int, dict[str, Tensor]] = {}
        weights: dict[str, dict[str, Tensor]] = {}
        shifts: dict[int, Tensor] = {}
        for name, value in tensors.items():
            kind, _, rest = name.partition("_")
            if name == "w_plus":
                continue
            if kind == "noise":
                noise[int(rest)] = value
            elif kind == "features":
                features[int(rest)] = value
            elif kind == "residual":
                layer, factor = rest.split("_")
                residual.setdefault(int(layer), {})[factor] = value
            elif kind == "weights":
                parameter, _, what = rest.rpartition("_")
                weights.setdefault(parameter, {})[what] = value
            elif kind == "style":
                shifts[int(rest)] = value
            else:
                raise ValueError(f"an inversion has no tensor {name!r}")
        return Inversion(
            w_plus=tensors["w_plus"],
            noise=tuple(noise[i] for i in sorted(noise)) or None,
            features=features or None,
            residual={k: LowRank(u=parts["u"], v=parts["v"]) for k, parts in residual.items()}
            or None,
            weights={k: WeightDelta(**parts) for k, parts in weights.items()} or None,
            style_shift=shifts or None,
        )

    def stored(self) -> "Inversion":
        """What a stored run gives back: noise, features and residual rounded to half precision."""

        def rounded(values: Tensor) -> Tensor:
            return values.float().clamp(-HALF_MAX, HALF_MAX).half().float()

        residual = self.residual and {
            k: LowRank(u=rounded(r.u), v=rounded(r.v)) for k, r in self.residual.items()
        }
        return replace(
            self,
            noise=self.noise and tuple(rounded(m) for m in self.noise),
            features=self.features and {k: rounded(f) for k, f in self.features.items()},
            residual=residual,
        )

    def doors(self) -> dict[str, Any]:
        """What `Generator.synthesis` takes, by its names: the stored noise where none was found."""
        return {
            "w_plus": self.w_plus,
            "noise": "const" if self.noise is None else list(self.noise),
            "features": self.features,
            "residual": self.residual,
            "style_shift": self.style_shift,
        }

    def render(self, generator: Generator) -> Float[Tensor, "N 3 H W"]:
        """The reconstruction: every door as it was found, row by row where weights were tuned."""
        if self.weights is None:
            return generator.synthesis(**self.doors())
        own = dict(generator.named_parameters())
        images = []
        for row in range(len(self)):
            one = self[row : row + 1]
            tuned = {k: own[k] + d.value()[0].to(own[k]) for k, d in (one.weights or {}).items()}
            images.append(torch.func.functional_call(generator, tuned, (), one.doors()))
        return torch.cat(images)

    def edited(
        self,
        generator: Generator,
        w_plus: Float[Tensor, "N L D"],
        strength: float = 1.0,
        style_shift: StyleShift | None = None,
    ) -> "Inversion":
        """The same pictures at other codes: noise, residual and tuned weights stay attached.

        Features move by what the plain generator's activations move by (CLCAE, arXiv 2211.11448:
        f + G5(edited w+) - G5(w+)); with a strength s they are G5(edited w+) + s (f - G5(w+)).

        Args:
            w_plus: the edited codes.
            strength: factor of what the picture has beside its codes, the kernel residual and the
                features' distance from the generator's; below 1 an edit moves more, and the
                picture's own details go.
            style_shift: an edit in style space (`Generator.synthesis`), [N I] or [1 I] by layer.
        """
        features, residual = self.features, self.residual
        if features is not None:
            noise, moved = self.noise or "const", {}
            for layer, f in features.items():
                before = generator.activations(self.w_plus, layer, noise, self.style_shift)
                after = generator.activations(w_plus, layer, noise, style_shift)
                kept = f + after - before
                moved[layer] = kept if strength == 1.0 else after + strength * (f - before)
            features = moved
        if residual is not None and strength != 1.0:
            residual = {k: LowRank(u=strength * r.u, v=r.v) for k, r in residual.items()}
        shift = style_shift and {k: s.expand(len(self), -1) for k, s in style_shift.items()}
        return replace(self, w_plus=w_plus, features=features, residual=residual, style_shift=shift)

    @staticmethod
    def cat(parts: Sequence["Inversion"]) -> "Inversion":
        """Join along the batch. All parts come from one method chain: they carry the same doors."""
        failures: dict[int, str] = {}
        at = 0
        for part in parts:
            failures |= {at + row: why for row, why in part.failures.items()}
            at += len(part)
        tensors = [part.tensors() for part in parts]
        joined = {name: torch.cat([t[name] for t in tensors]) for name in tensors[0]}
        return replace(Inversion.from_tensors(joined), failures=failures)

    def detached(self) -> "Inversion":
        """The same values as ordinary tensors without history, also from inference mode."""
        tensors = {name: value.detach().clone() for name, value in self.tensors().items()}
        return replace(Inversion.from_tensors(tensors), failures=dict(self.failures))

    def _each(self, change: Callable[[Any], Any]) -> "Inversion":
        """The same change of every door; each understands the operations of a tensor's rows."""
        return Inversion(
            w_plus=change(self.w_plus),
            noise=self.noise and tuple(change(m) for m in self.noise),
            features=self.features and {k: change(f) for k, f in self.features.items()},
            residual=self.residual and {k: change(r) for k, r in self.residual.items()},
            weights=self.weights and {k: change(d) for k, d in self.weights.items()},
            style_shift=self.style_shift and {k: change(s) for k, s in self.style_shift.items()},
            failures=dict(self.failures),
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
            ValueError: pictures of another size than the generator's, not of about [-1, 1], or
                counts that differ.
        """
        size = self.generator.resolution
        if images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(
                f"{type(self).__name__}.invert: expected pictures [N 3 {size} {size}], "
                f"found {list(images.shape)}"
            )
        largest = images.nan_to_num(0.0, 0.0, 0.0).abs().amax().item() if images.numel() else 0
        if not images.is_floating_point() or largest > FAR_OUT:
            raise ValueError(
                f"{type(self).__name__}.invert: expected pictures of floats in [-1, 1], found "
                f"{images.dtype} up to {largest:g}; bytes become that by x / 127.5 - 1"
            )
        if init is None and self.needs_init:
            raise ConfigError(
                f"{type(self).__name__}: it starts from the result of an earlier method and there "
                "is none: put another [[method]] (for example e4e) before it"
            )
        if init is not None and init.weights is not None:
            raise ConfigError(
                f"{type(self).__name__}: the method before it tuned the generator to each picture; "
                "such a method must be the last one of the chain"
            )
        counts = {"images": len(images), "rng": len(rng), "init": len(init or images)}
        if len(set(counts.values())) > 1:
            raise ValueError(f"{type(self).__name__}.invert: row counts differ: {counts}")

    @classmethod
    def tiny_network(cls, generator: Generator) -> Any:
        """A small random network of the kind that the setting `checkpoint` names (`tiny` of its
        architecture), for the contract test; None where a method has none of its own."""
        return None

    def hashes(self) -> dict[str, str]:
        """sha256 by name of every weight file this method computes with; part of the run's id."""
        return {}
