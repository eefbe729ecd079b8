"""Indexing stored samples: vectors of a space, quantised, for `tasks.similar` to scan.

Legend: N batch, E values of a vector, P directions of the projection, H W picture.
"""

import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, ClassVar

import torch
from annotated_types import Ge
from threadpoolctl import ThreadpoolController
from torch import Tensor

from models.errors import ConfigError
from tasks.job import FILE, OutputConfig, StoredJob
from tasks.run.ledger import read_markers
from tasks.run.parts import Layout
from tasks.run.run_json import Declared, read_declared
from tasks.run.source import check_has_codes, source_marker
from tasks.run.stored import StoredBatch, read_shard_inversions
from tasks.run.vectors import Projection
from tasks.storage.files import join
from tasks.storage.part_files import read_part
from tasks.work.attempt import Attempt
from tasks.work.device import fixed_threads, to_images
from tasks.work.rescore import decoded
from tasks.work.spaces import OF_CODES, PictureSpace, SpaceName, of_codes
from tasks.work.station import Batch, Result
from tasks.work.stored_station import StoredStation

SAMPLE = 8192
"""Samples that the projection of codes is fitted to."""
SAMPLE_OF_PICTURES = 1024
"""The same where each has to be embedded by a network."""


@dataclass(frozen=True, kw_only=True)
class IndexJob(StoredJob):
    """Vectors of a run's samples, for similarity."""

    kind: ClassVar[str] = "index"

    space: SpaceName = "w_plus"
    """w, w_plus, style: of the codes; clip, identity, perceptual: of the stored pictures."""
    directions: Annotated[int, Ge(1)] = 128
    """Bytes of a code, and half as many for its sketch; fewer where the space or the run is
    smaller."""
    clip: str = field(default="refinery", metadata=FILE)
    """The CLIP of the space clip: "refinery", a folder or a hub id."""
    batch: Annotated[int, Ge(1)] = 256
    output: OutputConfig = field(default_factory=lambda: OutputConfig(pictures=()))
    """None: an index copies no pictures."""


class Indexer(StoredStation):
    """Stored samples in; 8-bit codes, their sketches, exact float16 vectors and the run's scores
    out.

    The projection is fitted to a sample of the run by the first attempt that needs it and kept in
    the index's folder: the same sample, and so the same projection, whoever comes first.
    """

    stages = ("read", "embed", "write")
    reads_doors = False

    def check(self, job: IndexJob) -> None:
        check_has_codes(job.source)
        if job.output.pictures:
            raise ConfigError(
                f"output.pictures: an index copies none, found {', '.join(job.output.pictures)}; "
                f"they are in {job.source}"
            )
        if job.space == "identity" and job.identity is None:
            raise ConfigError(
                "space identity needs a face network: --set identity=dlib (package "
                "face-recognition-models) or a file of ArcFace IR-SE50 weights"
            )

    def load(self) -> None:
        super().load()
        self.source: Declared = read_declared(self.job.source)
        self._fitting = threading.Lock()
        self._libraries = ThreadpoolController()  # NumPy's and faiss's threads are not torch's
        self._projection: Projection | None = None
        missing = [name for name in self.columns if name not in self.source.pictures]
        if missing:
            raise ConfigError(
                f"{self.job.source} has stored no pictures, only codes; index one of the spaces "
                f"{', '.join(OF_CODES)}"
            )
        self.pictures: PictureSpace | None = None
        if self.job.space not in OF_CODES:
            self.pictures = PictureSpace(self.job.space, getattr(self.job, self.job.space))
            self.pictures.network.to(self.device)
            self.hashes[self.job.space] = self.pictures.network.hash
        self.generator.to(self.device)

    def _load_distances(self) -> tuple[None, None]:
        return None, None  # nothing is scored

    @property
    def columns(self) -> tuple[str, ...]:
        if self.job.space in OF_CODES:
            return ()
        return ("input",) if "input" in self.source.pictures else ("inversion",)

    @cached_property
    def layout(self) -> Layout:  # pyright: ignore[reportIncompatibleMethodOverride]
        return Layout(
            method=self.job.method,
            metrics=self.source.metrics,
            shape=self.shape,
            output=self.job.output,
        )

    def read(self, attempt: Attempt, pool: Executor) -> Iterator[Batch]:
        batches = super().read(attempt, pool)
        first = next(batches, None)
        if first is None:
            return
        with attempt.watch("read"):
            self.projection(attempt.run.uri)
            self._read_scores(attempt)
        yield first
        yield from batches

    @torch.inference_mode()
    def compute(self, batch: Batch) -> Result:
        assert batch.inversion is not None
        started = time.perf_counter()
        # Stored is exact: the code is of the vector that the ranking will use.
        exact = self.embed(batch.inversion.w_plus, batch.encoded).half()
        assert self._projection is not None
        with self._libraries.limit(limits=self.threads):
            encoded = self._projection.encode(exact.float().numpy())
        return Result(
            inversion=batch.inversion,
            pictures={},
            metrics={},  # the rows have the run's
            vectors={**encoded, "exact": exact.numpy()},
            seconds={"embed": time.perf_counter() - started},
        )

    def embed(self, w_plus: Tensor, encoded: Mapping[str, Sequence[bytes]]) -> Tensor:
        """Vectors [N E] of stored samples, on the CPU."""
        if self.pictures is None:
            vectors = of_codes(self.job.space, w_plus.to(self.device), self.style_space)
        else:
            pictures = decoded(encoded[self.columns[0]])
            vectors = self.pictures(to_images(pictures, self.device))
        return vectors.float().cpu()

    def projection(self, run_uri: str) -> Projection:
        """The index's own, fitted where it has none yet."""
        with self._fitting:
            if self._projection is None:
                found = Projection.read(run_uri)
                if found is None:
                    found = self._fitted()
                    found.write(run_uri)
                self._projection = found
            return self._projection

    @torch.inference_mode()
    def _fitted(self) -> Projection:
        with fixed_threads(self.threads), torch.random.fork_rng(devices=[]):
            sample = torch.cat([self.embed(b.inversion.w_plus, b.pictures) for b in self._sample()])
            torch.manual_seed(0)
            count = min(self.job.directions, *sample.shape)
            _, _, directions = torch.svd_lowrank(sample - sample.mean(0), q=count, niter=6)
            return Projection.fit(sample.numpy(), directions.T.contiguous().numpy())

    def _sample(self) -> Iterator[StoredBatch]:
        """Some of the samples, from all over the run."""
        size = SAMPLE if self.pictures is None else SAMPLE_OF_PICTURES
        markers = [m for m in read_markers(self.job.source).values() if m.rows > m.failed]
        chosen = markers[:: max(1, len(markers) * 64 // size)]
        each = -(-size // len(chosen))
        for marker in chosen:
            yield next(
                read_shard_inversions(self.job.source, marker, each, self.columns, with_doors=False)
            )

    def _read_scores(self, attempt: Attempt) -> None:
        """The scores that the run has of its samples, for filters."""
        part = source_marker(attempt.spec).parts["latents"]
        uri = join(attempt.spec.uri, part.path)
        table = read_part(uri, part.bytes, list(self.source.metrics))
        columns = {name: table[name].to_numpy() for name in self.source.metrics}
        for at, row in enumerate(attempt.rows):
            if row.error_kind is None:
                row.metrics = {name: float(values[at]) for name, values in columns.items()}
