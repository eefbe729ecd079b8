"""Inverting pictures: read, decode, invert by the job's chain of methods, score.

Legend: N batch, H W picture.
"""

import hashlib
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import replace
from itertools import chain

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from models.errors import ConfigError, SampleError
from models.inversion.base import Inversion, Method, SampleRng, sample_seed
from models.inversion.registry import load_method
from models.losses.pixel import mse, psnr
from models.losses.structure import ssim
from tasks.input.align import AUTO, input_hashes, template_points, with_template
from tasks.input.decode import decode_all
from tasks.input.detect import face_square, has_mtcnn, load_mtcnn, shows_face
from tasks.input.face import Crop, face_key
from tasks.input.limits import chunks
from tasks.input.plan import plan_shards
from tasks.input.read import RawSample, read_shard
from tasks.job import JobConfig, ShardSpec
from tasks.run.parts import Layout
from tasks.run.rows import Row
from tasks.storage.crash import crash_point
from tasks.work.attempt import Attempt
from tasks.work.device import local_copy, rows_not_finite, to_images
from tasks.work.station import Batch, Failures, Result, Score, Station


class Inverter(Station):
    """Pictures in; codes, reconstructions and scores out: see `Station`.

    Only `nscd` is a score of the codes: how far their styles are from those that the mapping
    network makes.

    Attributes:
        methods: the chain, each starting from the result of the one before.
        input: the job's, with the template that the generator's card names.
        square: corner and upper side of where an aligned picture has its face; None where nobody
            looks.
    """

    stages = ("read", "decode", "invert", "score", "write")
    stores_doors = True

    @classmethod
    def plan(
        cls, job: JobConfig, source: str, shard_size: int, limit: int | None
    ) -> Iterator[ShardSpec]:
        return plan_shards(source, shard_size, limit, job.input)

    def check(self, job: JobConfig) -> None:
        if not job.methods:
            raise ConfigError("the job has no method: add a [[method]] table, or pass --method e4e")

    def load(self) -> None:
        self._settle_input()
        self.generator.to(self.device)
        self.methods = [self._load_method(index) for index in range(len(self.job.methods))]

    @property
    def scores(self) -> dict[str, Score]:
        """Functions of target and reconstruction by column."""
        return {"mse": mse, "psnr": psnr, "ssim": ssim, **self.distances}

    @property
    def layout(self) -> Layout:
        return Layout(
            method="+".join(method.name for method in self.job.methods),
            metrics=(*self.scores, "nscd"),
            shape=self.shape,
            output=self.job.output,
            faces=self.input.fit == "align",
            checked=self.square is not None,
        )

    def read(self, attempt: Attempt, pool: Executor) -> Iterator[Batch]:
        """Each `job.batch` pictures that can be decoded, in order, make a batch."""
        job, watch = self.job, attempt.watch
        samples = chunks(read_shard(attempt.spec, job.input), job.batch)
        good: list[tuple[Row, np.ndarray]] = []
        while True:
            with watch("read"):
                chunk = next(samples, None)
            if chunk is None:
                break
            crash_point("in_decode", attempt.spec.id)
            with watch("decode"):
                for row, picture in chain.from_iterable(pool.map(self.decode, chunk)):
                    attempt.rows.append(row)
                    if picture is not None:
                        good.append((row, picture))
            while len(good) >= job.batch:
                yield _batch(good[: job.batch])
                good = good[job.batch :]
        if good:
            yield _batch(good)

    def invert(self, pictures: np.ndarray, keys: Sequence[str]) -> Result:
        """Invert and score pictures that come from elsewhere; see `Station.work`.

        Args:
            pictures: uint8 [N H W 3] at the generator's resolution.
            keys: one for each picture.
        """
        return self.work(Batch(keys=keys, inputs=pictures))

    def compute(self, batch: Batch) -> Result:
        assert isinstance(batch.inputs, np.ndarray)
        started = time.perf_counter()
        target = to_images(batch.inputs, self.device)
        failures: Failures = {}
        inversion = self._chained(target, batch.keys, failures).stored()
        with torch.inference_mode():
            image = inversion.render(self.generator)
            pixels = self.pixels("the rendered picture", image, failures)
            inverted_s = time.perf_counter() - started
            found = to_images(pixels, self.device)
            values = {name: score(target, found) for name, score in self.scores.items()}
            values["nscd"] = self.style_space.nscd(inversion.w_plus)
        return Result(
            inversion=inversion.to("cpu"),
            pictures={"inversion": pixels},
            metrics={name: value.float().cpu().numpy() for name, value in values.items()},
            failures=failures,
            seconds={"invert": inverted_s, "score": time.perf_counter() - started - inverted_s},
        )

    def _chained(self, target: Tensor, keys: Sequence[str], failures: Failures) -> Inversion:
        seeds = [sample_seed(self.job.seed, key) for key in keys]
        inversion: Inversion | None = None
        # Not inference_mode: a later method may build a graph on what an earlier one returned.
        with torch.no_grad():
            for method in self.methods:
                inversion = method.invert(target, inversion, SampleRng(seeds))
                for row, reason in inversion.failures.items():
                    failures.setdefault(row, ("diverged", reason))
                inversion = self._replace_broken_rows(inversion, failures)
        assert inversion is not None
        return inversion

    def _load_method(self, index: int) -> Method:
        wanted = self.job.methods[index]
        settings = {key: local_copy(value) for key, value in wanted.settings.items()}
        method = load_method(wanted.name, self.generator, **settings)
        for name, digest in method.hashes().items():
            self.hashes[f"methods.{index}.{wanted.name}.{name}"] = digest
        return method

    def decode(self, raw: RawSample) -> list[tuple[Row, np.ndarray | None]]:
        """The rows of a sample, one for each of its faces where they are looked for, and their
        pictures, uint8 [H W 3]; a failed row has none."""
        try:
            crops = decode_all(raw, self.input, self.generator.resolution)
        except SampleError as error:
            crops = [Crop(error=error)]
        digest = None if raw.data is None else hashlib.sha256(raw.data).hexdigest()
        return [(self._row(raw, crop, digest), crop.picture) for crop in crops]

    def _row(self, raw: RawSample, crop: Crop, digest: str | None) -> Row:
        key = face_key(raw.key, crop.number)
        row = Row(
            sample_key=key,
            image_uri=raw.uri,
            image_sha256=digest,
            seed=sample_seed(self.job.seed, key),
            face=crop.face,
        )
        if crop.error is not None:
            row.fail(crop.error.kind, str(crop.error))
        elif self.square is not None and crop.picture is not None:
            row.looks_aligned = shows_face(Image.fromarray(crop.picture), *self.square)
        return row

    def _settle_input(self) -> None:
        """The template of the generator's card, the detector, and what both are made of: they
        decide the crops as much as weights decide the codes."""
        self.input = with_template(self.job.input, self.generator.provenance.get("card"))
        self.hashes |= input_hashes(self.input)
        self.square = None
        if self.input.fit == "align" or not self.input.check_aligned:
            return
        if self.input.template != AUTO and has_mtcnn():
            self.hashes["input.detector"] = load_mtcnn().hash
            template = template_points(self.input.template)
            self.square = face_square(template * self.generator.resolution)

    def _replace_broken_rows(self, inversion: Inversion, failures: Failures) -> Inversion:
        """Codes of rows that are not finite become the average: the next method gets numbers."""
        broken = rows_not_finite(list(inversion.tensors().values()))
        if not broken:
            return inversion
        for row in broken:
            failures.setdefault(row, ("not_finite", "the codes are not finite"))
        tensors = {name: value.clone() for name, value in inversion.tensors().items()}
        for name, value in tensors.items():
            value[broken] = self.generator.latent_avg.nan_to_num(0.0) if name == "w_plus" else 0
        return replace(Inversion.from_tensors(tensors), failures=inversion.failures)


def _batch(good: Sequence[tuple[Row, np.ndarray]]) -> Batch:
    return Batch(
        keys=[row.sample_key for row, _ in good],
        rows=[row for row, _ in good],
        inputs=np.stack([picture for _, picture in good]),
    )
