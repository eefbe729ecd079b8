"""One generator, one chain of methods and the scores, ready on one device.

An actor builds it once and keeps it; `run_shard` hands it batches of decoded pictures.

Legend: N batch, H W picture.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from models.checkpoints.load import load_generator
from models.errors import AssetError, ConfigError
from models.inversion.base import Inversion, Method, SampleRng, sample_seed
from models.inversion.registry import load_method
from models.losses.identity import load_identity
from models.losses.perceptual import load_perceptual
from models.losses.pixel import mse, psnr
from models.losses.structure import ssim
from models.losses.style_space import StyleSpace
from models.pictures import to_bytes
from models.statistics import statistics_for
from models.stylegan2.generator import Generator, weights_hash
from tasks.job import JobConfig
from tasks.storage.files import read_bytes
from tasks.work.device import (
    BatchLimit,
    device_name,
    fixed_threads,
    local_copy,
    prepare_device,
    rows_not_finite,
    to_images,
)

Score = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Inverted:
    """The result of one batch.

    Attributes:
        inversion: codes and the other doors, on the CPU.
        pictures: uint8 [N H W 3], the reconstruction as it is stored.
        metrics: float32 [N] by column name.
        failures: (kind, reason) by row; the row's other values must not be used.
        seconds: time of "invert" and "score".
        notes: what an operator should know.
    """

    inversion: Inversion
    pictures: np.ndarray
    metrics: dict[str, np.ndarray]
    failures: dict[int, tuple[str, str]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @staticmethod
    def cat(first: "Inverted", second: "Inverted") -> "Inverted":
        """Join along the batch."""
        offset = len(first.pictures)
        return Inverted(
            inversion=Inversion.cat([first.inversion, second.inversion]),
            pictures=np.concatenate([first.pictures, second.pictures]),
            metrics={
                name: np.concatenate([values, second.metrics[name]])
                for name, values in first.metrics.items()
            },
            failures={
                **first.failures,
                **{offset + row: why for row, why in second.failures.items()},
            },
            seconds={name: first.seconds[name] + second.seconds[name] for name in first.seconds},
            notes=tuple(dict.fromkeys(first.notes + second.notes)),
        )


class Inverter:
    """Pictures in, codes and scores out.

    Scores are of the stored picture: the reconstruction is rounded to 8 bits first, so that whoever
    reads the run can compute the same numbers again. Only `nscd` is a score of the codes: how far
    their styles are from those that the mapping network makes.
    Row n depends on picture n and its key alone, apart from rounding that follows the batch size; a
    job's batches are always the same, and so are its bytes.

    Args:
        job: what to build.
        device: "cpu", "cuda", "cuda:1".
        threads: CPU threads of the computation. Sums split over threads round differently (one
            against two does, in a W+ step), so this is a constant of the project and not of the
            machine: actors, not threads, fill the cores, and 1 or 16 of them write equal bytes.

    Attributes:
        generator: on `device`.
        hashes: sha256 by name of every weight that decides the result; part of the run's id.
        metric_names: columns that `invert` fills, in order.

    Raises:
        ConfigError: unknown method, setting or device.
        AssetError: a weight file is missing, unreadable or belongs to another generator.
    """

    def __init__(self, job: JobConfig, device: str, *, threads: int = 1) -> None:
        if not job.methods:
            raise ConfigError("the job has no method: add a [[method]] table, or pass --method e4e")
        self.job, self.device, self.threads = job, prepare_device(device), threads
        with fixed_threads(threads):
            self.generator: Generator = load_generator(local_copy(job.generator))
            self.hashes: dict[str, str] = {"generator": weights_hash(self.generator)}
            self._hash_template()
            self.generator.to(self.device)
            self.methods = [self._load_method(index) for index in range(len(job.methods))]
            self._scores = self._load_scores()
        if job.precision != "float32":
            self.generator.compute_dtype = getattr(torch, job.precision)
        self._batches = BatchLimit(self.device, self.generator.resolution, job.batch)
        self._style_space = StyleSpace(self.generator, statistics_for(self.generator).style_anchor)
        self.metric_names: tuple[str, ...] = (*self._scores, "nscd")

    @property
    def device_name(self) -> str:
        """For the marker: "cpu" or "cuda NVIDIA H200"."""
        return device_name(self.device)

    def invert(self, pictures: np.ndarray, keys: Sequence[str]) -> Inverted:
        """Invert and score one batch.

        A row that diverges or is not finite is a failure of that row. Out of memory halves the
        batch, now and for the rest of this inverter's life.

        Args:
            pictures: uint8 [N H W 3] at the generator's resolution.
            keys: one for each picture; with the run's seed it makes the sample's random stream.

        Raises:
            ShardError: not even one picture fits into memory.
        """
        with fixed_threads(self.threads):
            parts, notes = self._batches.run(
                len(keys), lambda rows: self._invert(pictures[rows], keys[rows])
            )
        return replace(reduce(Inverted.cat, parts), notes=notes)

    # ------------------------------------------------------------------ building

    def _load_method(self, index: int) -> Method:
        wanted = self.job.methods[index]
        settings = {key: local_copy(value) for key, value in wanted.settings.items()}
        method = load_method(wanted.name, self.generator, **settings)
        for name, digest in method.hashes().items():
            self.hashes[f"methods.{index}.{wanted.name}.{name}"] = digest
        return method

    def _hash_template(self) -> None:
        """A template file decides the crops as much as weights decide the codes."""
        template = self.job.input.template
        if self.job.input.fit == "align" and template not in ("face", "ffhq"):
            digest = hashlib.sha256(read_bytes(template, AssetError))
            self.hashes["input.template"] = digest.hexdigest()

    def _load_scores(self) -> dict[str, Score]:
        scores: dict[str, Score] = {"mse": mse, "psnr": psnr, "ssim": ssim}
        if self.job.perceptual != "none":
            perceptual = load_perceptual(self.job.perceptual).to(self.device)
            scores[perceptual.name] = perceptual
            self.hashes[f"perceptual.{perceptual.name}"] = perceptual.hash
        if self.job.identity is not None:
            identity = load_identity(local_copy(self.job.identity)).to(self.device)
            scores["identity"] = identity
            self.hashes["identity"] = identity.hash
        return scores

    # ------------------------------------------------------------------ one batch

    def _invert(self, pictures: np.ndarray, keys: Sequence[str]) -> Inverted:
        started = time.perf_counter()
        target = to_images(pictures, self.device)
        seeds = [sample_seed(self.job.seed, key) for key in keys]
        failures: dict[int, tuple[str, str]] = {}
        inversion: Inversion | None = None
        # Not inference_mode: a later method may build a graph on what an earlier one returned.
        with torch.no_grad():
            for method in self.methods:
                inversion = method.invert(target, inversion, SampleRng(seeds))
                for row, reason in inversion.failures.items():
                    failures.setdefault(row, ("diverged", reason))
                inversion = self._replace_broken_rows(inversion, failures)
        assert inversion is not None
        inversion = inversion.stored()
        with torch.inference_mode():
            image = inversion.render(self.generator).float()
            for row in rows_not_finite([image]):
                failures.setdefault(row, ("not_finite", "the rendered picture is not finite"))
            stored = to_bytes(image.nan_to_num(0.0)).cpu().numpy()
            inverted_s = time.perf_counter() - started
            metrics = self._score(target, to_images(stored, self.device), inversion.w_plus)
        return Inverted(
            inversion=inversion.to("cpu"),
            pictures=stored,
            metrics=metrics,
            failures=failures,
            seconds={
                "invert": inverted_s,
                "score": time.perf_counter() - started - inverted_s,
            },
        )

    def _score(self, target: Tensor, found: Tensor, w_plus: Tensor) -> dict[str, np.ndarray]:
        values = {name: score(target, found) for name, score in self._scores.items()}
        values["nscd"] = self._style_space.nscd(w_plus)
        return {name: value.float().cpu().numpy() for name, value in values.items()}

    def _replace_broken_rows(
        self, inversion: Inversion, failures: dict[int, tuple[str, str]]
    ) -> Inversion:
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
