"""What a generator is, apart from its weights."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class GeneratorArchitecture:
    """Everything that the weights do not say by themselves, and what they do.

    Attributes:
        resolution: output height and width, px (a power of two).
        widths: channels of each block by resolution, e.g. {4: 512, ..., 1024: 32}.
        z_dim, w_dim: dimensions of z and w.
        mapping_layers: fully connected layers of the mapping network.
        c_dim: size of the condition vector; 0 for an unconditional generator.
        mapping_lr_mul: learning-rate multiplier of the mapping network.
        conv_clamp: clamp of every layer's output (256 in NVIDIA's half-precision networks) or None.
    """

    resolution: int
    widths: Mapping[int, int]
    z_dim: int = 512
    w_dim: int = 512
    mapping_layers: int = 8
    c_dim: int = 0
    mapping_lr_mul: float = 0.01
    conv_clamp: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", {int(k): int(v) for k, v in self.widths.items()})
        expected = [2**i for i in range(2, self.resolution.bit_length())]
        if (
            self.resolution < 8
            or expected[-1] != self.resolution
            or sorted(self.widths) != expected
        ):
            raise ValueError(
                f"generator widths: expected one width for each of {expected} at resolution "
                f"{self.resolution}, found {sorted(self.widths)}"
            )

    @property
    def num_ws(self) -> int:
        """L = 2 log2(resolution) - 2."""
        return 2 * int(math.log2(self.resolution)) - 2

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready values (widths keyed by string)."""
        return {**asdict(self), "widths": {str(k): v for k, v in self.widths.items()}}
