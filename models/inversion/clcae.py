"""CLCAE: w+ and a map F in one forward pass (arXiv 2211.11448).

f replaces the generator's activation after the fifth 3x3 layer. Edits move both:
`Inversion.edited` renders edited codes with f + G5(edited w+) - G5(w+).

Legend: N batch, L num_ws, D w_dim, C h w map, H W image.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from models.encoders.clcae import FEATURE_LAYER, ClcaeArchitecture, ClcaeEncoder, load_clcae
from models.errors import AssetError
from models.inversion.base import Inversion, Method, SampleRng
from models.inversion.weights import check_generator, weights_file
from models.statistics import statistics_for
from models.stylegan2.generator import Generator


@dataclass(frozen=True, kw_only=True)
class ClcaeConfig:
    """Settings of the method `clcae`."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    checkpoint: str | None = None
    """Encoder file: ours (.safetensors beside its .json card) or an official CLCAE .pt. Without it,
    the bundled encoder whose card names the generator's hash."""
    allow_other_generator: bool = False
    """Accept an encoder that was trained with another generator. Right for a generator fine-tuned
    from that one, which shares its W; wrong for any other."""


class Clcae(Method):
    """Codes and the map F of pictures in one forward pass."""

    Config = ClcaeConfig
    summary = "one forward pass to w+ and the activation at 16x16 (CLCAE, arXiv 2211.11448)"

    def __init__(self, generator: Generator, config: ClcaeConfig) -> None:
        super().__init__(generator, config)
        path = weights_file("clcae", generator, config.checkpoint)
        encoder, self._sha256, card = load_clcae(path, generator.num_ws, generator.w_dim)
        trained_with = card.get("generator_hash")
        check_generator("clcae", path, trained_with, generator, config.allow_other_generator)
        found = encoder.architecture.feature_channels
        wanted = generator.conv(FEATURE_LAYER - 1).conv.weight.shape[1]
        if found != wanted:
            raise AssetError(
                f"clcae: the encoder {path} makes maps of {found} channels, the generator has "
                f"{wanted} at 16x16: choose the encoder of this generator"
            )
        self.encoder = encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        statistics = statistics_for(generator)
        self.latent_avg, self.average = statistics.latent_avg, statistics.average_image

    @classmethod
    def tiny_network(cls, generator: Generator) -> ClcaeEncoder:
        return ClcaeEncoder(ClcaeArchitecture.tiny(generator))

    def hashes(self) -> dict[str, str]:
        return {"clcae": self._sha256}

    @torch.no_grad()
    def invert(
        self, images: Float[Tensor, "N 3 H W"], init: Inversion | None, rng: SampleRng
    ) -> Inversion:
        """See `Method.invert`; `init` and `rng` are not used: the encoder is deterministic.

        The convolutions run in the generator's `compute_dtype`, codes and map are float32.
        """
        self.check_inputs(images, init, rng)
        return self._encode(images, None)

    @torch.no_grad()
    def invert_shifted(
        self, images: Float[Tensor, "N 3 H W"], shift: Float[Tensor, "N D"]
    ) -> Inversion:
        """The released code's edit along a direction: it enters w before the attention blocks.

        w, w+ and f are all made again from the shifted w, and f is moved by what the generator's
        activations move by, as `Inversion.edited` does.
        """
        plain, moved = self._encode(images, None), self._encode(images, shift)
        anchored = Inversion(w_plus=plain.w_plus, features=moved.features, failures=moved.failures)
        return anchored.edited(self.generator, moved.w_plus)

    def _encode(
        self, images: Float[Tensor, "N 3 H W"], shift: Float[Tensor, "N D"] | None
    ) -> Inversion:
        self.encoder.to(images.device)
        dtype = self.generator.compute_dtype
        with torch.autocast(images.device.type, dtype=dtype, enabled=dtype is not None):
            seen = images.float().contiguous(memory_format=torch.channels_last)
            _, rows, features = self.encoder(seen, self.average.to(images.device), shift)
        average = self.latent_avg.to(images.device)
        w_plus, features = rows.float() + average, features.float().contiguous()
        is_finite = w_plus.isfinite().flatten(1).all(1) & features.isfinite().flatten(1).all(1)
        failures = {
            row: "clcae: the encoder's output is not finite (is the picture?)"
            for row in (~is_finite).nonzero()[:, 0].tolist()
        }
        w_plus = torch.where(is_finite[:, None, None], w_plus, average)
        features = torch.where(is_finite[:, None, None, None], features, 0.0)
        return Inversion(w_plus=w_plus, features={FEATURE_LAYER: features}, failures=failures)
