"""e4e: one forward pass of an encoder (arXiv 2102.02766). pSp checkpoints run through it as well.

Legend: N batch, L num_ws, D w_dim, H W image.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from models.encoders.checkpoint import LoadedEncoder, load_encoder
from models.errors import AssetError
from models.inversion.base import Inversion, Method, SampleRng
from models.inversion.weights import check_generator, weights_file
from models.stylegan2.generator import Generator


@dataclass(frozen=True, kw_only=True)
class E4eConfig:
    """Settings of the method `e4e`."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    checkpoint: str | None = None
    """Encoder file: ours (.safetensors beside its .json card) or an official e4e or pSp .pt.
    Without it, the bundled encoder whose card names the generator's hash."""
    allow_other_generator: bool = False
    """Accept an encoder that was trained with another generator. Right for a generator fine-tuned
    from that one, which shares its W; wrong for any other."""


class E4e(Method):
    """Codes of pictures in one forward pass: `latent_avg` + encoder(picture)."""

    Config = E4eConfig
    summary = "one forward pass of an encoder to w+ (e4e, arXiv 2102.02766; pSp checkpoints too)"

    def __init__(self, generator: Generator, config: E4eConfig) -> None:
        super().__init__(generator, config)
        loaded = _load(generator, config)
        average = generator.latent_avg if loaded.latent_avg is None else loaded.latent_avg
        if not average.isfinite().all():
            raise AssetError(
                "e4e: the generator has no latent_avg and neither has the encoder's file; load the "
                "generator through `load_generator`, which estimates it"
            )
        self.latent_avg = average.float().expand(generator.num_ws, -1)
        self.encoder = loaded.encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._sha256 = loaded.sha256

    def hashes(self) -> dict[str, str]:
        return {"e4e": self._sha256}

    @torch.no_grad()
    def invert(
        self, images: Float[Tensor, "N 3 H W"], init: Inversion | None, rng: SampleRng
    ) -> Inversion:
        """See `Method.invert`; `init` and `rng` are not used: the encoder is deterministic.

        The convolutions run in the generator's `compute_dtype`, the codes are float32.
        """
        self.check_inputs(images, init, rng)
        self.encoder.to(images.device)
        dtype = self.generator.compute_dtype
        with torch.autocast(images.device.type, dtype=dtype, enabled=dtype is not None):
            offsets = self.encoder(images.float().contiguous(memory_format=torch.channels_last))
        average = self.latent_avg.to(images.device)
        w_plus = offsets.float() + average
        is_finite = w_plus.isfinite().flatten(1).all(1)
        failures = {
            row: "e4e: the encoder's output is not finite (is the picture?)"
            for row in (~is_finite).nonzero()[:, 0].tolist()
        }
        return Inversion(
            w_plus=torch.where(is_finite[:, None, None], w_plus, average), failures=failures
        )


def _load(generator: Generator, config: E4eConfig) -> LoadedEncoder:
    path = weights_file("e4e", generator, config.checkpoint)
    loaded = load_encoder(path, generator.num_ws, generator.w_dim)
    check_generator("e4e", path, loaded.generator_hash, generator, config.allow_other_generator)
    return loaded
