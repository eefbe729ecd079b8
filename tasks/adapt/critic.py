"""The discriminator of one domain: patch heads on the trunk, trained beside the tokens.

Legend: B pictures, M references, H W image.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from models.adaptation.adversary import (
    PatchDiscriminator,
    discriminator_loss,
    generator_loss,
    shifted,
)
from models.losses.trunk import PerceptualTrunk
from tasks.adapt.terms import STYLE_SCALES, units

RATE = 2e-3


class Critic:
    """Tells adapted pictures from references, patch by patch.

    Args:
        rng: its first weights come from it.
    """

    def __init__(
        self,
        trunk: PerceptualTrunk,
        references: Float[Tensor, "M 3 H W"],
        rng: torch.Generator,
    ) -> None:
        self.trunk, self.references = trunk, references
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31, (1,), generator=rng)))
            widths = trunk.architecture.widths[STYLE_SCALES]
            spread = [float(t.var((0, 2, 3)).mean().sqrt()) for t in self._taps(references)]
            self.heads = PatchDiscriminator(widths, spread)
        self.heads.to(references.device)
        self.adam = torch.optim.Adam(self.heads.parameters(), lr=RATE, betas=(0.0, 0.99))

    def verdict(
        self, images: Float[Tensor, "B 3 H W"], rng: torch.Generator
    ) -> Float[Tensor, " B"]:
        """One update of the discriminator, then what the adapted pictures lose by it."""
        fake = self._taps(shifted(images, rng))
        rows = torch.randint(len(self.references), (len(images),), generator=rng)
        real_images = self.references[rows.to(images.device)]
        is_mirrored = torch.rand(len(rows), generator=rng) < 0.5
        real_images[is_mirrored] = real_images[is_mirrored].flip(3)
        with torch.no_grad():
            real = self._taps(shifted(real_images, rng))
        loss = discriminator_loss(self.heads(real), self.heads([t.detach() for t in fake]))
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()
        self.heads.requires_grad_(False)
        verdict = generator_loss(self.heads(fake))
        self.heads.requires_grad_(True)
        return verdict

    def _taps(self, images: Float[Tensor, "B 3 H W"]) -> list[Tensor]:
        return units(self.trunk(images)[STYLE_SCALES])

    def state(self) -> dict[str, object]:
        return {"critic": self.heads.state_dict(), "adam": self.adam.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        self.heads.load_state_dict(state["critic"])
        self.adam.load_state_dict(state["adam"])
