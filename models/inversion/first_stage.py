"""The encoder whose codes a network goes on from, where no method of the chain comes before it.

Legend: N batch, H W image.
"""

import logging

from jaxtyping import Float
from torch import Tensor

from models.checkpoints.bundled import find_for_generator
from models.errors import ConfigError
from models.inversion.base import Inversion, Method, SampleRng
from models.inversion.e4e import E4e, E4eConfig
from models.stylegan2.generator import Generator, weights_hash

logger = logging.getLogger(__name__)


class FirstStage(Method):
    """The codes that a network of a method was trained to go on from; a part of that method.

    Args:
        method: its registry name, for messages.
        checkpoint: the encoder's file; None stands for the bundled e4e of the generator, where
            there is one.
        allow_other_generator: accept an encoder of another generator.
        trained_on: sha256 of the encoder that the network was trained on (`first_stage_sha256` of
            its card); a warning says where it is another one, or cannot be known.
    """

    def __init__(
        self,
        method: str,
        generator: Generator,
        checkpoint: str | None,
        allow_other_generator: bool,
        trained_on: str | None,
    ) -> None:
        super().__init__(generator, None)
        self.method = method
        self.encoder: E4e | None = None
        known = checkpoint or find_for_generator(weights_hash(generator), "e4e.safetensors")
        if known is None:
            return  # the chain may have a method before this one
        config = E4eConfig(checkpoint=checkpoint, allow_other_generator=allow_other_generator)
        self.encoder = E4e(generator, config)
        if trained_on is None:
            if checkpoint is not None:
                logger.warning(
                    "%s: nobody knows whether the network was trained on the codes of "
                    "`first_stage` %s: its card names no first stage",
                    method,
                    checkpoint,
                )
        elif self.encoder.hashes()["e4e"] != trained_on:
            logger.warning(
                "%s: the network was trained on the codes of another first stage (sha256 %s); "
                "set `first_stage` to that encoder",
                method,
                trained_on,
            )

    def hashes(self) -> dict[str, str]:
        """The encoder's, as `Method.hashes` has them; empty without one."""
        return {} if self.encoder is None else {"first_stage": self.encoder.hashes()["e4e"]}

    def invert(
        self, images: Float[Tensor, "N 3 H W"], init: Inversion | None, rng: SampleRng
    ) -> Inversion:
        """`init`, or else what the encoder makes of the pictures.

        Raises:
            ConfigError: neither.
        """
        if init is not None:
            return init
        if self.encoder is None:
            raise ConfigError(
                f"{self.method}: the network goes on from the codes of a first stage and there is "
                "none: put another [[method]] (for example e4e) before it, or set `first_stage`"
            )
        return self.encoder.invert(images, None, rng)
