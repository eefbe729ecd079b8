"""Scoring stored pictures again: other metrics or other networks, without inverting again.

Legend: N batch, H W picture.
"""

import io
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import ClassVar, Literal

import numpy as np
import torch
from PIL import Image

from models.errors import AssetError, ConfigError, SampleError
from models.losses.pixel import mse, psnr
from models.losses.structure import ssim
from tasks.input.align import input_hashes, with_template
from tasks.input.decode import decode_all
from tasks.input.face import Crop, Face, face_key
from tasks.input.limits import chunks
from tasks.job import OutputConfig, StoredJob
from tasks.run.parts import Layout
from tasks.run.run_json import read_declared, read_run
from tasks.work.attempt import Attempt
from tasks.work.device import to_images
from tasks.work.kinds import load_job
from tasks.work.originals import Original, originals
from tasks.work.station import Batch, Result, Score
from tasks.work.stored_station import StoredStation

SAME_PX = 1.0
"""How far the points of a face may have moved when it is looked for once more."""
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
    """Stored pictures in, scores out: see `Station`. Inputs that the run has not stored are read
    again from where they were. `nscd` is there where the run has the codes of what its pictures
    show, which those of edits are not."""

    stages = ("read", "decode", "score", "write")
    reads_doors = False

    def load(self) -> None:
        super().load()
        self.stored = read_declared(self.job.source).pictures
        variants = read_declared(self.job.source).variants
        self.pairs = {f"@{name}": ("inversion", name) for name in variants} or {
            "": ("input", "inversion")
        }
        pairs = [name for pair in self.pairs.values() for name in pair]
        self.wanted = tuple(dict.fromkeys([*self.job.output.pictures, *pairs]))
        missing = [name for name in self.wanted if name not in (*self.stored, "input")]
        if missing:
            raise ConfigError(
                f"{self.job.source} has stored no pictures {missing[0]!r}, only "
                f"{', '.join(self.stored) or 'codes'}; run it again with them among "
                "output.pictures, or leave out what needs them"
            )
        self.card = self.generator.provenance.get("card")
        if self.reads_photos:
            self._check_input()
        self.generator.to(self.device)

    @property
    def reads_photos(self) -> bool:
        """Whether inputs are wanted that the run knows by their places alone."""
        return "input" in self.wanted and "input" not in self.stored

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(name for name in self.wanted if name in self.stored)

    def _check_input(self) -> None:
        """Refuse a template or a detector that is not the inversion's: it would cut other crops."""
        run = self.job.source
        while (job := load_job(run)).kind != "invert":
            run = job.source  # type: ignore[attr-defined]
        made_with = read_run(run)["weights"]
        for name, digest in input_hashes(with_template(job.input, self.card)).items():  # type: ignore[attr-defined]
            if made_with.get(name) != digest:
                raise AssetError(
                    f"{run}: {name} was {made_with.get(name)} when its photographs were read, is "
                    f"{digest} now; put back what it was made with"
                )

    def read(self, attempt: Attempt, pool: Executor) -> Iterator[Batch]:
        stored = super().read(attempt, pool)
        if not self.reads_photos:
            yield from stored
            return
        for chunk in chunks(originals(attempt, stored), self.job.batch):
            with attempt.watch("decode"):
                samples = list(chain.from_iterable(pool.map(self._with_inputs, chunk)))
            if samples:
                yield Batch.cat(samples)

    def _with_inputs(self, original: Original) -> list[Batch]:
        """The samples of a photograph with their crops; those that have none are failed rows."""
        photo, input, samples = original
        try:
            found = decode_all(photo, with_template(input, self.card), self.generator.resolution)
        except SampleError as error:
            found = [Crop(error=error)]
        crops = {face_key(photo.key, crop.number): crop for crop in found}
        good = []
        for sample in samples:
            row = sample.rows[0]
            crop = crops.get(row.sample_key, found[0])
            if crop.error is not None:
                row.fail(crop.error.kind, str(crop.error))
            elif crop.picture is None or not _is_same(crop.face, row.face):
                row.fail("align", "the detector finds another face than the one that was inverted")
            else:
                good.append(replace(sample, inputs=crop.picture[None]))
        return good

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
            name: to_images(self._pixels(batch, name), self.device)
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

    def _pixels(self, batch: Batch, name: str) -> np.ndarray:
        """uint8 [N H W 3], as the run has stored them, or as they were read again."""
        if name in batch.encoded:
            return decoded(batch.encoded[name])
        assert batch.inputs is not None
        return batch.inputs


def _is_same(found: Face | None, before: Face | None) -> bool:
    """Whether a face is where it was, or neither was looked for."""
    if found is None or before is None:
        return found is before
    return float(np.abs(found.points - before.points).max()) < SAME_PX


def decoded(pictures: Sequence[bytes]) -> np.ndarray:
    """uint8 [N H W 3]."""
    return np.stack([np.array(Image.open(io.BytesIO(data))) for data in pictures])
