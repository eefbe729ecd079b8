"""What an exception means for the rest of the run, judged along its chain of causes."""

import errno
import logging
import time
from collections.abc import Callable
from typing import TypeVar

from models.errors import LedgerError
from tasks.storage.errors import BAD_CREDENTIALS, error_code, is_unreachable

logger = logging.getLogger(__name__)

R = TypeVar("R")

OUTAGE_WAITS_S = (10, 60, 300)
"""Waits before a stage is tried again whose storage did not answer."""


def patiently(stage: Callable[[], R]) -> R:
    """The stage's result, over outages of storage as long as `OUTAGE_WAITS_S` together."""
    for wait_s in OUTAGE_WAITS_S:
        try:
            return stage()
        except Exception as error:
            if not is_passing(error):
                raise
            logger.warning("storage does not answer, next try in %d s: %s", wait_s, error)
        time.sleep(wait_s)
    return stage()


def is_passing(error: BaseException) -> bool:
    """Storage could not be talked to: a later try may succeed."""
    return any(is_unreachable(e) for e in causes(error))


def is_refused(error: BaseException) -> bool:
    """A full disk, a missing bucket, refused credentials: every shard would fail alike."""
    codes = {*BAD_CREDENTIALS, "NoSuchBucket"}
    if isinstance(error, LedgerError):
        # One input object may be private; a run directory that refuses one write refuses all.
        codes.add("AccessDenied")
        if any(isinstance(e, PermissionError) for e in causes(error)):
            return True
    return any(_is_disk_full(e) or error_code(e) in codes for e in causes(error))


def is_cuda_error(error: BaseException) -> bool:
    """A broken CUDA context; running out of memory is none (the inverter halves its batch)."""
    import torch

    def is_broken(e: BaseException) -> bool:
        if isinstance(e, torch.OutOfMemoryError):
            return False
        return isinstance(e, torch.AcceleratorError) or "CUDA error" in str(e)

    return any(is_broken(e) for e in causes(error))


def causes(error: BaseException | None) -> list[BaseException]:
    """The exception and what it came from, outermost first."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def _is_disk_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
