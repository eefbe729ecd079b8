"""Scoring stored pictures again: other metrics or other networks, without inverting again.

Legend: N batch, H W picture.
"""

import io
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import torch
from PIL import Image

from models.errors import ConfigError
from models.losses.pixel import mse, psnr
from models.losses.structure import ssim
from tasks.job import OutputConfig, StoredJob
from tasks.run.parts import Layout
from tasks.run.run_json import read_declared
from tasks.work.device import to_images
from tasks.work.station import Batch, Result, Score
from tasks.work.stored_station import StoredStation

PIXEL_SCORES: dict[str, Score] = {"mse": mse, "psnr": psnr, "ssim": ssim}


@dataclass(frozen=True, kw_only=True)
class RescoreJob(StoredJob):
    """New scores of a run's pictures: of each inversion against its input, of each edit against its
    inversion (`<metric>@<variant>`)."""

    kind: ClassVar[str] = "rescore"

    metrics: tuple[Literal["mse", "psnr", "ssim"], ...] = ("mse", "psnr", "ssim")
    """Scores beside those of `perceptual` and `identity`."""
    output: OutputConfig = field(default_factory=lambda: OutputConfig(pictures=()))
    """Pictures to copy from the run; none without it."""


class Rescorer(StoredStation):
    """Stored pictures in, scores out: see `Station`. `nscd` is there where the run has the codes of
    what its pictures show, which those of edits are not."""

    stages = ("read", "decode", "score", "write")
    reads_doors = False

    def load(self) -> None:
        super().load()
        source = read_declared(self.job.source)
        self.pairs = {f"@{name}": ("inversion", name) for name in source.variants} or {
            "": ("input", "inversion")
        }
        missing = [name for name in self.columns if name not in source.pictures]
        if missing:
            raise ConfigError(
                f"{self.job.source} has stored no pictures {missing[0]!r}, only "
                f"{', '.join(source.pictures) or 'codes'}; run it again with them among "
                "output.pictures, or leave out what needs them"
            )
        self.generator.to(self.device)

    @property
    def columns(self) -> tuple[str, ...]:
        pairs = [name for pair in self.pairs.values() for name in pair]
        return tuple(dict.fromkeys([*self.job.output.pictures, *pairs]))

    @property
    def scores(self) -> dict[str, Score]:
        """Functions of two pictures by name."""
        named = {name: PIXEL_SCORES[name] for name in self.job.metrics}
        return named | self.distances

    @property
    def layout(self) -> Layout:
        codes = ("nscd",) if "" in self.pairs else ()
        return Layout(
            method=self.job.method,
            metrics=(*(f"{name}{end}" for end in self.pairs for name in self.scores), *codes),
            shape=self.shape,
            output=self.job.output,
            faces=self.has_faces,
        )

    @torch.inference_mode()
    def compute(self, batch: Batch) -> Result:
        assert batch.inversion is not None
        started = time.perf_counter()
        images = {
            name: to_images(decoded(batch.encoded[name]), self.device)
            for name in dict.fromkeys(name for pair in self.pairs.values() for name in pair)
        }
        decoded_s = time.perf_counter() - started
        values = {
            f"{name}{end}": score(images[before], images[after])
            for end, (before, after) in self.pairs.items()
            for name, score in self.scores.items()
        }
        if "" in self.pairs:
            values["nscd"] = self.style_space.nscd(batch.inversion.w_plus.to(self.device))
        return Result(
            inversion=batch.inversion,
            pictures={},
            metrics={name: value.float().cpu().numpy() for name, value in values.items()},
            seconds={"decode": decoded_s, "score": time.perf_counter() - started - decoded_s},
        )


def decoded(pictures: Sequence[bytes]) -> np.ndarray:
    """uint8 [N H W 3]."""
    return np.stack([np.array(Image.open(io.BytesIO(data))) for data in pictures])
