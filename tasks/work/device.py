"""What every worker does with its device: set it up, feed it batches, survive its memory.

Legend: N batch, H W picture.
"""

import ctypes
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from models.errors import AssetError, ConfigError, ShardError
from tasks.storage.files import exists, is_local, join, localise, read_bytes, write_bytes

R = TypeVar("R")
LARGEST_BATCH = 16
BATCH_PIXELS = {"cpu": 1024**2, "cuda": 4 * 1024**2}
"""Of a batch on a device. A picture of 1024 px takes 2.3 GB where a method optimises its code."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
KEPT_BYTES, LARGEST_BLOCK = 1 << 30, 32 << 20  # the latter is the most that glibc takes


def auto_batch(resolution: int, device: str) -> int:
    """Pictures of this resolution that any method can work on at once on such a device."""
    pixels = BATCH_PIXELS[torch.device(device).type]
    return max(1, min(LARGEST_BATCH, pixels // resolution**2))


class BatchLimit:
    """Halves a batch that does not fit into memory, now and from then on.

    Args:
        device: whose memory it is, for messages.
        resolution: of the pictures, for messages.
        batch: the job's batch size, for notes.
    """

    def __init__(self, device: torch.device, resolution: int, batch: int) -> None:
        self.device, self.resolution, self.batch = device, resolution, batch
        self._limit: int | None = None

    def run(self, count: int, compute: Callable[[slice], R]) -> tuple[list[R], tuple[str, ...]]:
        """Results of consecutive ranges of `count` rows, and what an operator should know.

        Raises:
            ShardError: not even one row fits into memory.
        """
        done: list[R] = []
        at = 0
        while at < count:
            size = min(self._limit or count, count - at)
            try:
                done.append(compute(slice(at, at + size)))
                at += size
                continue
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = str(error).partition("\n")[0]
            # Outside the handler, whose traceback keeps the batch's tensors alive.
            self._halve(size, reason)
        if len(done) < 2:
            return done, ()
        return done, (f"out of memory: batch lowered from {self.batch} to {self._limit}",)

    def _halve(self, size: int, reason: str) -> None:
        if size == 1:
            raise ShardError(
                f"out of memory on {device_name(self.device)} with a single {self.resolution} px "
                f"picture ({reason}); use a device with more memory, precision = bfloat16, or "
                "fewer actors on this device"
            )
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self._limit = size // 2


def device_name(device: torch.device) -> str:
    """For the marker: "cpu" or "cuda NVIDIA H200"."""
    if device.type != "cuda":
        return device.type
    return f"cuda {torch.cuda.get_device_name(device)}"


def peak_memory(device: torch.device) -> int:
    """Bytes at most until now: of a GPU what PyTorch has reserved, else what the process has had
    resident (Linux; 0 elsewhere)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return 1024 * int(found[1]) if found else 0


def to_images(pictures: np.ndarray, device: torch.device) -> Float[Tensor, "N 3 H W"]:
    """uint8 [N H W 3] to [-1, 1] on the device."""
    pixels = torch.from_numpy(np.ascontiguousarray(pictures)).to(device)
    return pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0).contiguous()


@contextmanager
def fixed_threads(count: int) -> Iterator[None]:
    """Compute on the CPU with exactly `count` threads, then put the old number back."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def keep_freed_memory() -> None:
    """What a batch frees stays with the process, for the next batch: the system clears each page
    that it gives anew, which took a tenth of the CPU time at 64 px (Linux with glibc)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST_BLOCK)
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def prepare_device(name: str) -> torch.device:
    """The device, set up to give the same bytes every time, and the process, to keep its memory.

    Raises:
        ConfigError: no such device here.
    """
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
    keep_freed_memory()
    return device


def rows_not_finite(values: Sequence[Tensor]) -> list[int]:
    """Rows in which any of the [N ...] tensors is not finite."""
    finite = torch.stack([value.isfinite().flatten(1).all(1) for value in values]).all(0)
    return [row for row, is_finite in enumerate(finite.tolist()) if not is_finite]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch might have worked."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def local_copy(value: Any) -> Any:
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
