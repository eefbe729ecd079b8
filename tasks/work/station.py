"""Where batches are worked on: one generator, its scores and one kind of work, on one device.

A worker builds it once and keeps it; `tasks.work.shard` feeds it. A kind of job is a subclass: what
it reads, what it computes, and what it calls its columns.

Legend: N batch, H W picture.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from models.checkpoints.load import load_generator
from models.inversion.base import Inversion, Method
from models.losses.identity import load_identity
from models.losses.perceptual import load_perceptual
from models.losses.style_space import StyleSpace
from models.pictures import to_bytes
from models.statistics import statistics_for
from models.stylegan2.generator import Generator, weights_hash
from tasks.input.sample import RawSample
from tasks.job import INPUTS, InputConfig, ShardSpec
from tasks.run.parts import Layout
from tasks.run.rows import Row, encode_picture, encode_thumbnail
from tasks.run.run_json import Declared
from tasks.work.attempt import Attempt
from tasks.work.device import (
    BatchLimit,
    auto_batch,
    device_name,
    fixed_threads,
    local_copy,
    prepare_device,
    rows_not_finite,
)

LIBRARY_BYTES = 600 * 10**6
"""Of a process with PyTorch, PyArrow and Ray, before it loads a network."""
PIXEL_BYTES = 2300
"""Of a batch in work, for each of its pixels, where a method optimises codes: the dearest case."""
Failures = dict[int, tuple[str, str]]
Score = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Samples that are worked on together.

    Attributes:
        keys: of the samples; with the run's seed they make the random streams.
        rows: what becomes of them, in the same order.
        inputs: their pictures, decoded: uint8 [N H W 3].
        encoded: their pictures by column, as a run has stored them.
        inversion: what is stored of them, where they come from a run.
        photos: the files that they were cut from, and how those were read.
        folder: of the run that is being made.
    """

    keys: Sequence[str]
    rows: Sequence[Row] = ()
    inputs: np.ndarray | None = None
    encoded: dict[str, Sequence[bytes]] = field(default_factory=dict)
    inversion: Inversion | None = None
    photos: Sequence[tuple[RawSample, InputConfig]] = ()
    folder: str = ""

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, at: slice) -> "Batch":
        return Batch(
            keys=self.keys[at],
            rows=self.rows[at],
            inputs=None if self.inputs is None else self.inputs[at],
            encoded={name: pictures[at] for name, pictures in self.encoded.items()},
            inversion=None if self.inversion is None else self.inversion[at],
            photos=self.photos[at],
            folder=self.folder,
        )

    @staticmethod
    def cat(parts: Sequence["Batch"]) -> "Batch":
        """One after the other; they hold the same kinds of things."""
        first = parts[0]
        inputs = [part.inputs for part in parts if part.inputs is not None]
        inversions = [part.inversion for part in parts if part.inversion is not None]
        return Batch(
            keys=[key for part in parts for key in part.keys],
            rows=[row for part in parts for row in part.rows],
            inputs=np.concatenate(inputs) if inputs else None,
            encoded={n: [data for p in parts for data in p.encoded[n]] for n in first.encoded},
            inversion=Inversion.cat(inversions) if inversions else None,
            photos=[photo for part in parts for photo in part.photos],
            folder=first.folder,
        )


@dataclass(frozen=True, kw_only=True)
class Result:
    """What became of one batch.

    Attributes:
        inversion: what is stored of codes and other doors, on the CPU.
        pictures: uint8 [N H W 3] by column, to be stored; the inputs are the batch's.
        metrics: float32 [N] by column.
        vectors: what an index keeps, [N E] by name; such rows hold no codes of their own.
        failures: (kind, reason) by row; the row's other values must not be used.
        seconds: by stage.
        notes: what an operator should know.
    """

    inversion: Inversion
    pictures: dict[str, np.ndarray]
    metrics: dict[str, np.ndarray]
    vectors: dict[str, np.ndarray] = field(default_factory=dict)
    failures: Failures = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @staticmethod
    def cat(parts: Sequence["Result"], notes: tuple[str, ...]) -> "Result":
        """Join along the batch."""
        if len(parts) == 1:
            return replace(parts[0], notes=notes)
        failures: Failures = {}
        at = 0
        for part in parts:
            failures |= {at + row: why for row, why in part.failures.items()}
            at += len(part.inversion)
        first = parts[0]
        return Result(
            inversion=Inversion.cat([p.inversion for p in parts]),
            pictures={k: np.concatenate([p.pictures[k] for p in parts]) for k in first.pictures},
            metrics={k: np.concatenate([p.metrics[k] for p in parts]) for k in first.metrics},
            vectors={k: np.concatenate([p.vectors[k] for p in parts]) for k in first.vectors},
            failures=failures,
            seconds={k: sum(p.seconds[k] for p in parts) for k in first.seconds},
            notes=notes,
        )


class Station(ABC):
    """Samples in, codes, pictures and scores out.

    Scores are of the stored pictures, rounded to 8 bits, so that whoever reads the run can compute
    the same numbers again. Row n depends on sample n and its key alone, apart from rounding that
    follows the batch size: a run whose `batch` stays has the same bytes whoever does it.

    Args:
        job: what to do; here with numbers in the place of "auto".
        device: "cpu", "cuda", "cuda:1".
        threads: CPU threads of the computation. Sums split over threads round differently (one
            against two does, in a W+ step), so this is a constant of the project and not of the
            machine: actors, not threads, fill the cores, and 1 or 16 of them write equal bytes.

    Attributes:
        asked: the job as it was given, with its columns.
        generator: on `device`.
        hashes: sha256 by name of all that decides the result; part of the run's id.

    Raises:
        ConfigError: an unknown name, setting or device.
        AssetError: a file is missing, unreadable or belongs to another generator.
    """

    stages: ClassVar[tuple[str, ...]]
    """Busy times of an attempt, in order: the keys of `Marker.seconds`."""
    stores_doors: ClassVar[bool] = False
    """Whether the run is the home of its codes: noise, features and residuals are stored too, and
    other kinds of job can start from it."""

    def __init__(self, job: Any, device: str, *, threads: int = 1) -> None:
        self.check(job)
        self.device, self.threads = prepare_device(device), threads
        with fixed_threads(threads):
            self.generator: Generator = load_generator(local_copy(job.generator))
            resolution = self.generator.resolution
            batch = auto_batch(resolution, device) if job.batch == "auto" else job.batch
            self.asked = replace(job, output=job.output.settled(resolution))
            self.job = job = replace(self.asked, batch=batch)
            self.hashes: dict[str, str] = {"generator": weights_hash(self.generator)}
            self.load()
            self.perceptual, self.identity = self._load_distances()
        if job.precision != "float32":
            self.generator.compute_dtype = getattr(torch, job.precision)
        self.style_space = StyleSpace(self.generator, statistics_for(self.generator).style_anchor)
        self._limit = BatchLimit(self.device, resolution, batch)

    # ------------------------------------------------------------------ what a kind of job gives

    @classmethod
    @abstractmethod
    def plan(cls, job: Any, source: str, shard_size: int, limit: int | None) -> Iterator[ShardSpec]:
        """Cut what the job reads into shards."""

    def check(self, job: Any) -> None:  # noqa: B027 - most jobs are right as they are
        """Refuse a job before anything is read."""

    @abstractmethod
    def load(self) -> None:
        """Build the rest, add to `hashes`, and move the generator to the device."""

    @abstractmethod
    def read(self, attempt: Attempt, pool: Executor) -> Iterator[Batch]:
        """The attempt's shard in batches; every sample becomes a row of `attempt.rows`."""

    @abstractmethod
    def compute(self, batch: Batch) -> Result:
        """The work on one batch that fits into memory."""

    @property
    @abstractmethod
    def layout(self) -> Layout:
        """The columns of the run's parts."""

    # ------------------------------------------------------------------ what all of them do

    @property
    def device_name(self) -> str:
        """For the marker: "cpu" or "cuda NVIDIA H200"."""
        return device_name(self.device)

    @property
    def declared(self) -> Declared:
        """What readers of the run are told."""
        layout = self.layout
        return Declared(
            kind=self.job.kind,
            stages=self.stages,
            stores_doors=self.stores_doors,
            method=layout.method,
            metrics=layout.metrics,
            pictures=layout.pictures,
            variants=layout.variants,
            faces=layout.faces,
            shape=layout.shape,
            worker_bytes=self.worker_bytes,
        )

    @property
    def worker_bytes(self) -> int:
        """Memory of a worker on a CPU, estimated: libraries, weights as they are read and as they
        are used, and a batch in work."""
        networks = {id(m): m for m in _modules(self)}.values()
        weights = {p.data_ptr(): p.nbytes for m in networks for p in m.state_dict().values()}
        pixels = self.job.batch * self.generator.resolution**2
        return LIBRARY_BYTES + sum(weights.values()) + pixels * PIXEL_BYTES

    @property
    def shape(self) -> tuple[int, int]:
        """(L, D) of w+."""
        return self.generator.num_ws, self.generator.w_dim

    def work(self, batch: Batch) -> Result:
        """Compute and score one batch.

        A row that diverges or is not finite is a failure of that row. Out of memory halves the
        batch, now and for the rest of this station's life.

        Raises:
            ShardError: not even one sample fits into memory.
        """
        with fixed_threads(self.threads):
            parts, notes = self._limit.run(len(batch), lambda rows: self.compute(batch[rows]))
        return Result.cat(parts, notes)

    def pixels(self, name: str, image: Tensor, failures: Failures) -> np.ndarray:
        """A render as 8 bits; a row that is not finite fails."""
        image = image.float()
        for row in rows_not_finite([image]):
            failures.setdefault(row, ("not_finite", f"{name} is not finite"))
        return to_bytes(image.nan_to_num(0.0)).cpu().numpy()

    @property
    def distances(self) -> dict[str, Score]:
        """The job's networks that compare two pictures, by column."""
        perceptual = {} if self.perceptual is None else {self.perceptual.name: self.perceptual}
        return perceptual | ({} if self.identity is None else {"identity": self.identity})

    def _load_distances(self) -> tuple[Any, Any]:
        perceptual, identity = None, None
        if self.job.perceptual != "none":
            perceptual = load_perceptual(self.job.perceptual).to(self.device)
            self.hashes[f"perceptual.{perceptual.name}"] = perceptual.hash
        if self.job.identity is not None:
            identity = load_identity(local_copy(self.job.identity)).to(self.device)
            self.hashes["identity"] = identity.hash
        return perceptual, identity


def fill_row(batch: Batch, result: Result, station: Station, at: int) -> None:
    """Put result number `at` of a batch into its sample's row, pictures encoded."""
    row, layout = batch.rows[at], station.layout
    if at in result.failures:
        row.fail(*result.failures[at])
        return
    row.vectors = {name: values[at] for name, values in result.vectors.items()}
    row.w_plus = None if row.vectors else result.inversion.w_plus[at].numpy()
    row.metrics |= {name: float(values[at]) for name, values in result.metrics.items()}
    row.doors = stored_doors(result.inversion, at) if station.stores_doors else {}
    for name in layout.pictures:
        if name in batch.encoded:
            row.pictures[name] = batch.encoded[name][at]
            continue
        pixels = batch.inputs if name in INPUTS else result.pictures[name]
        assert pixels is not None
        if name == "thumbnail":
            row.pictures[name] = encode_thumbnail(pixels[at])
        else:
            kind, quality = layout.output.picture_format, layout.output.quality
            row.pictures[name] = encode_picture(pixels[at], kind, quality)


def stored_doors(inversion: Inversion, at: int) -> dict[str, np.ndarray]:
    """The doors of row `at` besides w_plus, named as `Inversion.tensors` does: float16 arrays, and
    the 8-bit codes of tuned weights."""
    tensors = inversion.stored().tensors()
    return {
        name: (value[at].half() if value.is_floating_point() else value[at]).numpy()
        for name, value in tensors.items()
        if name != "w_plus"
    }


def _modules(holder: object) -> Iterator[torch.nn.Module]:
    """Networks among an object's attributes, and those of the methods that it holds."""
    for value in vars(holder).values():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, torch.nn.Module):
                yield each
            elif isinstance(each, Method):
                yield from _modules(each)
