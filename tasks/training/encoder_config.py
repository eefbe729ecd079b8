"""Settings of the encoders' training: e4e's, and the presets that make it another method's.

Legend: L num_ws.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from models.errors import ConfigError
from tasks.training.schedules import closed_offsets, open_offsets
from tasks.training.trainer import TrainingConfig


@dataclass(frozen=True, kw_only=True)
class FitEncoderConfig(TrainingConfig):
    """Settings of one e4e training run. The defaults suit a 64 px generator on a CPU."""

    method: ClassVar[str] = "e4e"
    """What the network is for; the exported file's name."""
    kind: ClassVar[Literal["e4e", "psp"]] = "e4e"

    generator: str
    """A bundled name or a checkpoint file; it stays as it is."""

    width: int = 24
    """Channels of the first stage, 64 in the published encoder."""
    units: tuple[int, int, int, int] = (2, 2, 2, 2)
    """Residual units of the stages, (3, 4, 14, 3) in the published encoder."""
    head_width: int = 64
    """Channels inside the style heads, 512 in the published encoder."""
    stem_stride: int = 2
    """1 in the published encoder; 2 saves the convolutions at full size."""
    start_from: str | None = None
    """Encoder file of the same sizes whose weights the run starts from, for example one that was
    trained with an earlier state of the generator. Of a file of the other kind the trunk and the
    pyramid are taken, and the style heads start afresh."""

    learning_rate: float = 3e-3
    """Ranger's; 1e-4 as published, for 2.4 million pictures."""
    anneal: float = 0.4
    """Share of the run, at its end, in which the rate falls to 0 along a cosine; 0 as published."""
    open_start: float = 20 / 300
    """Share of the run after which the first offset opens (step 20,000 of 300,000)."""
    open_end: float = 52 / 300
    """Share of the run after which the last offset opens; the others at equal distances between."""

    close_start: float = 1.0
    """Share of the run after which the offsets close again, the last row first; 1 never."""
    close_end: float = 1.0
    """Share of the run after which only w is left; the run and its codes end in W."""
    shrink_start: float = 1.0
    """Share of the run after which the offsets are driven to zero; 1 never."""
    shrink_end: float = 1.0
    """Share of the run in which the offsets' weight has grown by `delta_growth`, and the
    adversarial one has fallen by `adversarial_decay`; the latter goes on falling."""
    delta_growth: float = 1.0
    adversarial_decay: float = 1.0

    iterations: int = 1
    """Passes for each batch: after the first the encoder sees the picture and the render of its
    codes so far (6 channels), and adds to them."""

    mse_weight: float = 1.0
    perceptual_weight: float = 0.8
    perceptual: str = "auto"
    """Name for `load_perceptual`, or "none"."""
    identity: str | None = None
    """File of ArcFace weights for the identity loss."""
    identity_weight: float = 0.1
    delta_weight: float = 0.03
    """Of the mean norm of the offsets in units of W's spread; 0.03 is the published 2e-4 of their
    sum (`delta_penalty`), whatever L and D."""
    adversarial_weight: float = 0.1
    """Of the latent discriminator's verdict on the codes; 0 trains without it."""
    discriminator_learning_rate: float = 2e-4
    """Adam's; 2e-5 as published, for a run about ten times as long."""
    r1_gamma: float = 10.0
    r1_interval: int = 16
    pool: int = 50
    """Codes in each replay pool of the latent discriminator."""
    nscd_weight: float = 0.0
    """Of LSAP's alignment: minus the summed similarity of the normalised styles to the anchors."""
    align_open_rows: bool = False
    """Align the open rows alone, as the released LSAP training does: one layer in its first 20,000
    steps. False aligns all layers from the first step."""

    synthetic_fraction: float = 0.0
    """Share of each batch that is drawn from the generator: learned by its code, not rendered. It
    costs real pictures: at 8,000 shown (32 px) a share of 0.25 raised the held-out MSE by 16 %."""
    code_weight: float = 0.5
    """Of their squared code error, in units of the spread of W."""

    terms: str = "as the training data's"
    """For the card: on what terms the weights may be used."""

    def __post_init__(self) -> None:
        TrainingConfig.__post_init__(self)
        if not self.learning_rate > 0:
            raise ConfigError(f"learning_rate must be > 0, got {self.learning_rate}")
        if not 0 <= self.open_start <= self.open_end <= 1:
            raise ConfigError(
                f"open_start and open_end: expected 0 <= open_start <= open_end <= 1, "
                f"got {self.open_start} and {self.open_end}"
            )
        if self.iterations < 1:
            raise ConfigError(f"iterations must be >= 1, got {self.iterations}")
        self._check_way_back()
        for name in ("anneal", "synthetic_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} must be in 0..1, got {getattr(self, name)}")
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
        if not self.delta_growth > 0 or not 0 < self.adversarial_decay <= 1:
            raise ConfigError(
                f"delta_growth must be > 0 and adversarial_decay in (0, 1], got "
                f"{self.delta_growth} and {self.adversarial_decay}"
            )

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

    delta_weight: float = 0.0
    adversarial_weight: float = 0.0


@dataclass(frozen=True, kw_only=True)
class FitWEncoderConfig(FitEncoderConfig):
    """e4e's first phase alone: the offsets never open, the codes stay in W."""

    method: ClassVar[str] = "w-encoder"

    open_start: float = 1.0
    open_end: float = 1.0


@dataclass(frozen=True, kw_only=True)
class FitRestyleConfig(FitEncoderConfig):
    """ReStyle (arXiv 2104.02699) on e4e: five passes, each sees what the last one rendered."""

    method: ClassVar[str] = "restyle"

    iterations: int = 5


@dataclass(frozen=True, kw_only=True)
class FitLsapConfig(FitEncoderConfig):
    """LSAP_E: e4e's network, aligned in the normalised style space, no latent discriminator."""

    method: ClassVar[str] = "lsap"

    nscd_weight: float = 0.5
    adversarial_weight: float = 0.0


@dataclass(frozen=True, kw_only=True)
class FitCycleConfig(FitEncoderConfig):
    """Cycle Encoding: W, W+ and back to W, the published 750,000 steps as shares of the run.

    A run that starts from a finished e4e encoder has the first 500,000 of them behind it; the rest
    alone is open_start 0, open_end 0, shrink 0 to 0.6, close 0.584 to 0.856. The learning rate must
    not have fallen before the rows close: `anneal` is at most 1 - close_end.
    """

    method: ClassVar[str] = "cycle"

    open_start: float = 20 / 750
    open_end: float = 52 / 750
    shrink_start: float = 500 / 750
    shrink_end: float = 650 / 750
    delta_growth: float = 1.2**15
    adversarial_decay: float = 0.5**15
    close_start: float = 646 / 750
    close_end: float = 714 / 750
    anneal: float = 1 - 714 / 750
