"""Settings of the encoders' training: e4e's, and the presets that make it another method's.

Legend: L num_ws.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from models.errors import ConfigError
from models.settings import Bounds, Count, CountOrNone, NotNegative, Positive, Share
from tasks.training.network import InverterConfig
from tasks.training.schedules import closed_offsets, open_offsets

Decay = Annotated[float, Bounds(0, 1, is_open=True)]


@dataclass(frozen=True, kw_only=True)
class FitEncoderConfig(InverterConfig):
    """Settings of one e4e training run. The defaults suit a 64 px generator on a CPU."""

    method: ClassVar[str] = "e4e"
    """What the network is for; the exported file's name."""
    kind: ClassVar[Literal["e4e", "psp"]] = "e4e"

    start_from: str | None = None
    """Encoder file of the same sizes whose weights the run starts from, for example one that was
    trained with an earlier state of the generator. Of a file of the other kind the trunk and the
    pyramid are taken, and the style heads start afresh."""

    open_start: Share = 20 / 300
    """Share of the run after which the first offset opens (step 20,000 of 300,000)."""
    open_end: Share = 52 / 300
    """Share of the run after which the last offset opens; the others at equal distances between."""

    close_start: Share = 1.0
    """Share of the run after which the offsets close again, the last row first; 1 never."""
    close_end: Share = 1.0
    """Share of the run after which only w is left; the run and its codes end in W."""
    shrink_start: Share = 1.0
    """Share of the run after which the offsets are driven to zero; 1 never."""
    shrink_end: Share = 1.0
    """Share of the run in which the offsets' weight has grown by `delta_growth`, and the
    adversarial one has fallen by `adversarial_decay`; the latter goes on falling."""
    delta_growth: Positive = 1.0
    adversarial_decay: Decay = 1.0

    iterations: Count = 1
    """Passes for each batch: after the first the encoder sees the picture and the render of its
    codes so far (6 channels), and adds to them."""
    first_stage: str | None = None
    """Encoder file whose codes the passes begin with (ReStyle's bootstrapping) instead of the mean
    code. The network begins silent, so that its first pass leaves them as they are; one that goes
    on from a network of this kind (`start_from`) begins as that one."""
    first_mixed: Share = 0.0
    """How far the first stage's codes are moved, at most, towards those of another picture of the
    batch. On the pictures it was trained on an encoder's own codes leave little to correct."""

    delta_weight: NotNegative = 0.03
    """Of the mean norm of the offsets in units of W's spread; 0.03 is the published 2e-4 of their
    sum (`delta_penalty`), whatever L and D."""
    adversarial_weight: NotNegative = 0.1
    """Of the latent discriminator's verdict on the codes; 0 trains without it."""
    discriminator_learning_rate: Positive = 2e-4
    """Adam's; 2e-5 as published, for a run about ten times as long."""
    r1_gamma: NotNegative = 10.0
    r1_interval: CountOrNone = 16
    pool: CountOrNone = 50
    """Codes in each replay pool of the latent discriminator."""
    nscd_weight: NotNegative = 0.0
    """Of LSAP's alignment: minus the summed similarity of the normalised styles to the anchors."""
    align_open_rows: bool = False
    """Align the open rows alone, as the released LSAP training does: one layer in its first 20,000
    steps. False aligns all layers from the first step."""

    synthetic_fraction: Share = 0.0
    """Share of each batch that is drawn from the generator: learned by its code, not rendered. It
    costs real pictures: at 8,000 shown (32 px) a share of 0.25 raised the held-out MSE by 16 %."""
    code_weight: NotNegative = 0.5
    """Of their squared code error, in units of the spread of W."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.open_start <= self.open_end <= 1:
            raise ConfigError(
                f"open_start and open_end: expected 0 <= open_start <= open_end <= 1, "
                f"got {self.open_start} and {self.open_end}"
            )
        if self.first_mixed and self.first_stage is None:
            raise ConfigError(
                f"first_mixed: {self.first_mixed:g} of the way from a first stage's codes, and "
                "there is none: set `first_stage`, or leave it out"
            )
        self._check_way_back()
        if self.batch - self.num_synthetic < 2:
            raise ConfigError(
                f"batch {self.batch} with synthetic_fraction {self.synthetic_fraction} leaves "
                f"{self.batch - self.num_synthetic} real pictures, expected at least 2"
            )

    def _check_way_back(self) -> None:
        for first, last in (("close_start", "close_end"), ("shrink_start", "shrink_end")):
            start, end = getattr(self, first), getattr(self, last)
            if not (0 <= start < end <= 1 or start == end == 1):
                raise ConfigError(
                    f"{first} and {last}: expected 0 <= {first} < {last} <= 1, or 1 and 1 for "
                    f"never, got {start} and {end}"
                )
        if self.close_start < self.open_end:
            raise ConfigError(
                f"close_start: expected at least open_end {self.open_end}, got {self.close_start}"
            )
        if self.close_end < 1 and self.anneal > 1 - self.close_end + 1e-9:
            raise ConfigError(
                f"anneal: expected at most 1 - close_end = {1 - self.close_end:.3g}, got "
                f"{self.anneal}: the rate must not fall before only w is left"
            )

    @property
    def sees_render(self) -> bool:
        """True where the encoder sees the picture and the render of the codes so far."""
        return self.iterations > 1 or self.first_stage is not None

    @property
    def is_in_w(self) -> bool:
        """True when the run ends with w alone: its offsets never open, or close again."""
        return self.kind == "e4e" and (self.open_start == 1.0 or self.close_start < 1.0)

    def open_offsets(self, share: float, num_ws: int) -> int:
        """How many offsets are open after a share of the run."""
        if self.open_start == 1.0:
            return 0  # also at the very end
        opened = open_offsets(share, num_ws, self.open_start, self.open_end)
        if self.close_start == 1.0:
            return opened
        return min(opened, closed_offsets(share, num_ws, self.close_start, self.close_end))

    @property
    def num_synthetic(self) -> int:
        """Generated pictures of each batch."""
        return round(self.batch * self.synthetic_fraction)


@dataclass(frozen=True, kw_only=True)
class FitPspConfig(FitEncoderConfig):
    """pSp: every row from its own head, no regularisation of the codes."""

    method: ClassVar[str] = "psp"
    kind: ClassVar[Literal["e4e", "psp"]] = "psp"

    delta_weight: NotNegative = 0.0
    adversarial_weight: NotNegative = 0.0


@dataclass(frozen=True, kw_only=True)
class FitWEncoderConfig(FitEncoderConfig):
    """e4e's first phase alone: the offsets never open, the codes stay in W."""

    method: ClassVar[str] = "w-encoder"

    open_start: Share = 1.0
    open_end: Share = 1.0


@dataclass(frozen=True, kw_only=True)
class FitRestyleConfig(FitEncoderConfig):
    """ReStyle (arXiv 2104.02699) on e4e: five passes, each sees what the last one rendered."""

    method: ClassVar[str] = "restyle"

    iterations: Count = 5


@dataclass(frozen=True, kw_only=True)
class FitLsapConfig(FitEncoderConfig):
    """LSAP_E: e4e's network, aligned in the normalised style space, no latent discriminator."""

    method: ClassVar[str] = "lsap"

    nscd_weight: NotNegative = 0.5
    adversarial_weight: NotNegative = 0.0


@dataclass(frozen=True, kw_only=True)
class FitCycleConfig(FitEncoderConfig):
    """Cycle Encoding: W, W+ and back to W, the published 750,000 steps as shares of the run.

    A run that starts from a finished e4e encoder has the first 500,000 of them behind it; the rest
    alone is open_start 0, open_end 0, shrink 0 to 0.6, close 0.584 to 0.856. The learning rate must
    not have fallen before the rows close: `anneal` is at most 1 - close_end.
    """

    method: ClassVar[str] = "cycle"

    open_start: Share = 20 / 750
    open_end: Share = 52 / 750
    shrink_start: Share = 500 / 750
    shrink_end: Share = 650 / 750
    delta_growth: Positive = 1.2**15
    adversarial_decay: Decay = 0.5**15
    close_start: Share = 646 / 750
    close_end: Share = 714 / 750
    anneal: Share = 1 - 714 / 750
