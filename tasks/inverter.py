"""One generator, one chain of methods and the scores, ready on one device.

An actor builds it once and keeps it; `run_shard` hands it batches of decoded pictures.

Legend: N batch, H W picture.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.checkpoints.load import load_generator
from models.errors import AssetError, ConfigError, ShardError
from models.inversion.base import Inversion, Method, SampleRng, sample_seed
from models.inversion.registry import load_method
from models.losses.identity import load_identity
from models.losses.perceptual import load_perceptual
from models.losses.pixel import mse, psnr
from models.losses.structure import ssim
from models.losses.style_space import StyleSpace
from models.statistics import statistics_for
from models.stylegan2.generator import Generator, weights_hash
from tasks.job import JobConfig
from tasks.storage import exists, is_local, join, localise, read_bytes, write_bytes
from tasks.training.grids import to_bytes

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
        self.job, self.device, self.threads = job, _prepare_device(device), threads
        self._batch_limit: int | None = None
        with fixed_threads(threads):
            self.generator: Generator = load_generator(_local(job.generator))
            self.hashes: dict[str, str] = {"generator": weights_hash(self.generator)}
            self._hash_template()
            self.generator.to(self.device)
            self.methods = [self._load_method(index) for index in range(len(job.methods))]
            self._scores = self._load_scores()
        if job.precision != "float32":
            self.generator.compute_dtype = getattr(torch, job.precision)
        self._style_space = StyleSpace(self.generator, statistics_for(self.generator).style_anchor)
        self.metric_names: tuple[str, ...] = (*self._scores, "nscd")

    @property
    def device_name(self) -> str:
        """For the marker: "cpu" or "cuda NVIDIA H200"."""
        if self.device.type != "cuda":
            return self.device.type
        return f"cuda {torch.cuda.get_device_name(self.device)}"

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
        limit = self._batch_limit or len(keys)
        if len(keys) <= limit:
            try:
                with fixed_threads(self.threads):
                    return self._invert(pictures, keys)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not _is_out_of_memory(error):
                    raise
                reason = str(error).partition("\n")[0]
            # Outside the handler, whose traceback keeps the batch's tensors alive.
            limit = self._halve(len(keys), reason)
        done = self.invert(pictures[:limit], keys[:limit])
        rest = self.invert(pictures[limit:], keys[limit:])
        note = f"out of memory: batch lowered from {self.job.batch} to {self._batch_limit}"
        joined = Inverted.cat(done, rest)
        return Inverted(**{**joined.__dict__, "notes": (note,)})

    # ------------------------------------------------------------------ building

    def _load_method(self, index: int) -> Method:
        wanted = self.job.methods[index]
        settings = {key: _local(value) for key, value in wanted.settings.items()}
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
            identity = load_identity(_local(self.job.identity)).to(self.device)
            scores["identity"] = identity
            self.hashes["identity"] = identity.hash
        return scores

    # ------------------------------------------------------------------ one batch

    def _invert(self, pictures: np.ndarray, keys: Sequence[str]) -> Inverted:
        started = time.perf_counter()
        target = self._to_images(pictures)
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
            for row in _rows_not_finite([image]):
                failures.setdefault(row, ("not_finite", "the rendered picture is not finite"))
            stored = to_bytes(image.nan_to_num(0.0)).cpu().numpy()
            inverted_s = time.perf_counter() - started
            metrics = self._score(target, self._to_images(stored), inversion.w_plus)
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

    def _to_images(self, pictures: np.ndarray) -> Tensor:
        """uint8 [N H W 3] -> [N 3 H W] in [-1, 1] on the device."""
        pixels = torch.from_numpy(np.ascontiguousarray(pictures)).to(self.device)
        return pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0).contiguous()

    def _replace_broken_rows(
        self, inversion: Inversion, failures: dict[int, tuple[str, str]]
    ) -> Inversion:
        """Codes of rows that are not finite become the average: the next method gets numbers."""
        broken = _rows_not_finite(list(inversion.tensors().values()))
        if not broken:
            return inversion
        for row in broken:
            failures.setdefault(row, ("not_finite", "the codes are not finite"))
        tensors = {name: value.clone() for name, value in inversion.tensors().items()}
        for name, value in tensors.items():
            value[broken] = self.generator.latent_avg.nan_to_num(0.0) if name == "w_plus" else 0
        return replace(Inversion.from_tensors(tensors), failures=inversion.failures)

    def _halve(self, batch: int, reason: str) -> int:
        if batch == 1:
            raise ShardError(
                f"out of memory on {self.device_name} with a single {self.generator.resolution} px "
                f"picture ({reason}); use a device with more memory, precision = bfloat16, or "
                "fewer actors on this device"
            )
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self._batch_limit = batch // 2
        return self._batch_limit


@contextmanager
def fixed_threads(count: int) -> Iterator[None]:
    """Compute on the CPU with exactly `count` threads, then put the old number back."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _prepare_device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(
            f"device {name!r}: expected cpu, cuda or cuda:<number> ({error})"
        ) from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(
                f"device {name!r}: this PyTorch sees no CUDA device; use the device cpu, or "
                "install the GPU build and check the driver with nvidia-smi"
            )
        # The same bytes on every run on one GPU model, and float32 that is float32.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
        # An operation without a deterministic form (some backward passes of resampling) warns.
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return device


def _rows_not_finite(values: Sequence[Tensor]) -> list[int]:
    """Rows in which any of the [N ...] tensors is not finite."""
    finite = torch.stack([value.isfinite().flatten(1).all(1) for value in values]).all(0)
    return [row for row, is_finite in enumerate(finite.tolist()) if not is_finite]


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _local(value: Any) -> Any:
    """URLs of weight files become local copies, ours with their card; other values pass."""
    if not isinstance(value, str) or "://" not in value:
        return value
    path = localise(value)
    if path.suffix == ".safetensors" and not is_local(value):
        card = localise(value.removesuffix(".safetensors") + ".json")
        beside = join(str(path.parent), card.name)
        if not exists(beside) or read_bytes(beside) != card.read_bytes():
            write_bytes(beside, card.read_bytes(), AssetError)
    return str(path)
