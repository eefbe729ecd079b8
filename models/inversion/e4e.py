"""e4e: one forward pass of an encoder (arXiv 2102.02766). pSp checkpoints run through it as well.

Legend: N batch, I channels seen, L num_ws, D w_dim, H W image.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from models.encoders.checkpoint import LoadedEncoder, build_encoder, load_encoder
from models.encoders.psp import EncoderArchitecture, PyramidEncoder
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
    name: ClassVar[str] = "e4e"
    """Its line in the registry, and the stem of its bundled weight file."""
    in_channels: ClassVar[int] = 3
    """Of what the encoder sees: 6 where a render stands beside the picture."""

    def __init__(self, generator: Generator, config: E4eConfig) -> None:
        super().__init__(generator, config)
        loaded = self._load()
        average = generator.latent_avg if loaded.latent_avg is None else loaded.latent_avg
        if not average.isfinite().all():
            raise AssetError(
                f"{self.name}: the generator has no latent_avg and neither has the encoder's file; "
                "load the generator through `load_generator`, which estimates it"
            )
        self.latent_avg = average.float().expand(generator.num_ws, -1)
        self.encoder = loaded.encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._sha256, self._card = loaded.sha256, loaded.card

    @classmethod
    def tiny_network(cls, generator: Generator) -> PyramidEncoder:
        return build_encoder(EncoderArchitecture.tiny(generator, in_channels=cls.in_channels))

    def hashes(self) -> dict[str, str]:
        return {self.name: self._sha256}

    @torch.no_grad()
    def invert(
        self, images: Float[Tensor, "N 3 H W"], init: Inversion | None, rng: SampleRng
    ) -> Inversion:
        """See `Method.invert`; `init` and `rng` are not used: the encoder is deterministic.

        The convolutions run in the generator's `compute_dtype`, the codes are float32.
        """
        self.check_inputs(images, init, rng)
        average = self.latent_avg.to(images.device)
        w_plus = self.offsets(images) + average
        is_finite = w_plus.isfinite().flatten(1).all(1)
        failures = {
            row: f"{self.name}: the encoder's output is not finite (is the picture?)"
            for row in (~is_finite).nonzero()[:, 0].tolist()
        }
        return Inversion(
            w_plus=torch.where(is_finite[:, None, None], w_plus, average), failures=failures
        )

    def offsets(self, seen: Float[Tensor, "N I H W"]) -> Float[Tensor, "N L D"]:
        """What the encoder makes of pictures: codes relative to where it starts from."""
        self.encoder.to(seen.device)
        dtype = self.generator.compute_dtype
        with torch.autocast(seen.device.type, dtype=dtype, enabled=dtype is not None):
            return self.encoder(seen.float().contiguous(memory_format=torch.channels_last)).float()

    def _load(self) -> LoadedEncoder:
        generator, config = self.generator, self.config
        path = weights_file(self.name, generator, config.checkpoint)
        loaded = load_encoder(path, generator.num_ws, generator.w_dim)
        found = loaded.encoder.architecture.in_channels
        if found != self.in_channels:
            raise AssetError(
                f"{self.name}: the encoder {path} sees {found} channels, expected "
                f"{self.in_channels}: ReStyle's encoders (6) belong to `restyle`, others (3) to "
                "`e4e` or `psp`"
            )
        allow_other = config.allow_other_generator
        check_generator(self.name, path, loaded.generator_hash, generator, allow_other)
        return loaded
