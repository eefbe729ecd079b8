"""What every network that is trained on a frozen generator shares: settings, losses, card."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from torch import nn

from models.checkpoints.load import load_generator
from models.optim import Ranger
from models.settings import Count, NotNegative, Positive, Share
from models.statistics import statistics_for
from models.stylegan2.generator import Generator, weights_hash
from tasks.training.blocks import (
    LOSS_SIZE,
    card_settings,
    prepared,
    rounded_scores,
    save_with_page,
    settle,
    started_from,
)
from tasks.training.losses import PictureLosses
from tasks.training.schedules import annealed
from tasks.training.trainer import Objective, Stateful, TrainingConfig


@dataclass(frozen=True, kw_only=True)
class NetworkConfig(TrainingConfig):
    """Settings of a network that is trained on a frozen generator; the sizes suit 64 px on a CPU.

    The published sizes of the trunk are pSp's, e4e's and CLCAE's.
    """

    generator: str
    """A bundled name or a checkpoint file; it stays as it is."""

    width: Count = 24
    """Channels of the trunk's first stage, 64 in the published one."""
    units: tuple[int, int, int, int] = (2, 2, 2, 2)
    """Residual units of the trunk's stages, (3, 4, 14, 3) in the published one."""
    head_width: Count = 64
    """Channels inside the style heads, 512 in the published encoders."""
    stem_stride: Count = 2
    """1 in the published trunk; 2 saves the convolutions at full size."""
    start_from: str | None = None
    """Network file whose weights the run starts from."""

    learning_rate: Positive = 3e-3
    """The optimiser's; 1e-4 as published, for a run many times as long."""
    anneal: Share = 0.4
    """Share of the run, at its end, in which the rate falls to 0 along a cosine; 0 as published."""

    terms: str = "as the training data's"
    """For the card: on what terms the weights may be used."""


@dataclass(frozen=True, kw_only=True)
class InverterConfig(NetworkConfig):
    """Settings of a network that inverts pictures: what its renders are compared by."""

    mse_weight: NotNegative = 1.0
    """Weight of the mean squared error on [-1, 1]."""
    perceptual_weight: NotNegative = 0.8
    """Weight of the perceptual distance."""
    perceptual: str = "auto"
    """Name for `load_perceptual`, or "none"."""
    identity: str | None = None
    """Name or file for `load_identity`: the network of the identity loss."""
    identity_weight: NotNegative = 0.1
    """Weight of the identity loss."""


Arch = TypeVar("Arch")
Config = TypeVar("Config", bound=NetworkConfig)
Inverter = TypeVar("Inverter", bound=InverterConfig)


class NetworkObjective(Objective, Generic[Config]):
    """One network, its optimiser, and the frozen generator that it is trained on.

    Attributes:
        network: what is trained, and written at the end.
    """

    config: Config
    network: Any
    optimizer: torch.optim.Optimizer
    unit: ClassVar[str] = "images"
    """What `images` counts, for the card."""
    paths: ClassVar[tuple[str, ...]] = ("generator", "start_from")
    """Settings that name a file."""

    def __init__(self, config: Config, generator: Generator) -> None:
        super().__init__(config)
        self.generator_hash = weights_hash(generator)
        self.statistics = statistics_for(generator)
        self.generator = prepared(generator, config.device, self.dtype)
        self.resolution = min(generator.resolution, LOSS_SIZE)

    @classmethod
    def of(cls, config: Config) -> Self:
        return cls(config, load_generator(config.generator))

    def sized(self, architecture: Callable[..., Arch], **own: Any) -> Arch:
        """An architecture: each field from `own`, the settings, or the generator."""
        known = {
            "num_ws": self.generator.num_ws,
            "w_dim": self.generator.w_dim,
            "input_size": self.resolution,
            **vars(self.config),
            **own,
        }
        fields = dataclasses.fields(architecture)  # type: ignore[arg-type]
        return architecture(**{f.name: known[f.name] for f in fields if f.name in known})

    def trains(
        self,
        network: nn.Module,
        make: Callable[..., torch.optim.Optimizer] = Ranger,
        parts: Mapping[str, Stateful] | None = None,
        **identity: Any,
    ) -> None:
        """Take the network that is trained, and what its checkpoint holds and must agree with."""
        device = self.config.device
        self.network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = make(self.network.parameters(), lr=self.config.learning_rate)
        self.parts = {"network": self.network, "optimizer": self.optimizer, **(parts or {})}
        self.identity = {
            "architecture": self.network.architecture.to_dict(),
            "generator_hash": self.generator_hash,
            "batch": self.config.batch,
            **identity,
        }

    def set_rate(self, shown: int) -> float:
        """The learning rate of this moment; the share of the run that is over."""
        share = shown / self.config.images
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * annealed(share, self.config.anneal)
        return share

    def provenance(self) -> dict[str, Any]:
        """What else made the network, for the card."""
        return {}

    def settle(self) -> None:
        self.dtype = self.generator.compute_dtype = None
        settle(self.network)

    def write(
        self, name: str, method: str, scores: Mapping[str, float], shown: int, **fields: Any
    ) -> Path:
        """The finished weights as `<out>/<name>.safetensors` with card and page.

        Args:
            method: where the network comes from, for the card.
            fields: further ones of the card.
        """
        config = self.config
        card = {
            **fields,
            "generator_hash": self.generator_hash,
            "terms": config.terms,
            "provenance": {
                "method": method,
                "generator": Path(config.generator).stem,
                f"{self.unit}_shown": shown,
                **self.provenance(),
                **started_from(config.start_from),
                "settings": card_settings(config, self.paths),
            },
            "scores": rounded_scores(scores),
        }
        return save_with_page(self.network, Path(config.out) / f"{name}.safetensors", card)


class InverterObjective(NetworkObjective[Inverter]):
    """A network whose renders are compared with pictures."""

    paths = ("generator", "identity", "start_from")

    def __init__(self, config: Inverter, generator: Generator) -> None:
        super().__init__(config, generator)
        weights = {
            "mse": config.mse_weight,
            "perceptual": config.perceptual_weight,
            "identity": config.identity_weight,
        }
        self.losses = PictureLosses(
            weights, config.perceptual, config.identity, config.device, self.dtype
        )

    def provenance(self) -> dict[str, Any]:
        return {"perceptual": self.losses.perceptual_name}

    def settle(self) -> None:
        super().settle()
        self.losses.dtype = None
