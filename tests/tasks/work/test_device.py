"""Batches that do not fit into memory, and devices that are not there."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from models.errors import ConfigError, ShardError
from tasks.work.device import BatchLimit, prepare_device, rows_not_finite, to_images


def compute(limit: int, seen: list[int]):
    def work(rows: slice) -> list[int]:
        seen.append(rows.stop - rows.start)
        if rows.stop - rows.start > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
        return list(range(rows.start, rows.stop))

    return work


def test_a_batch_is_halved_until_it_fits_and_stays_so() -> None:
    batches, seen = BatchLimit(torch.device("cpu"), 64, 8), list[int]()
    parts, notes = batches.run(8, compute(3, seen))
    assert parts == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert notes == ("out of memory: batch lowered from 8 to 2",)
    assert seen == [8, 4, 2, 2, 2, 2]
    seen.clear()
    assert batches.run(3, compute(3, seen))[0] == [[0, 1], [2]]
    assert seen == [2, 1]
    assert batches.run(2, compute(3, seen)) == ([[0, 1]], ())


def test_a_single_row_that_does_not_fit_says_what_helps() -> None:
    batches = BatchLimit(torch.device("cpu"), 64, 8)
    with pytest.raises(ShardError, match=r"single 64 px picture \(CUDA out of memory.* GiB\)"):
        batches.run(2, compute(0, []))


def test_other_errors_pass() -> None:
    def fail(rows: slice) -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        BatchLimit(torch.device("cpu"), 64, 8).run(2, fail)


def test_pixels_become_images() -> None:
    pixels = np.array([[[[0, 51, 255]]]], np.uint8)
    torch.testing.assert_close(
        to_images(pixels, torch.device("cpu")),
        torch.tensor([-1.0, -0.6, 1.0]).reshape(1, 3, 1, 1),
    )


def test_rows_that_are_not_finite_are_named() -> None:
    first = torch.ones(4, 2)
    second = torch.ones(4, 3)
    first[1, 0], second[3, 2] = torch.nan, torch.inf
    assert rows_not_finite([first, second]) == [1, 3]


@pytest.mark.parametrize("name", ["gpu", "cuda:999"])
def test_a_device_that_is_not_there(name: str) -> None:
    if name != "gpu" and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(ConfigError, match=f"device '{name}'"):
        prepare_device(name)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_what_a_batch_frees_is_there_for_the_next() -> None:
    """In a process of its own, since the setting stays: pages that the system has to clear."""
    script = """
import resource, torch
from tasks.work.device import prepare_device
def cleared():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for count in (1, 3, 10, 30, 100) * 3:
        blocks = [torch.ones(2**22 // count) for _ in range(count + 2)]
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
cleared()
before = cleared()
prepare_device("cpu")
cleared()
print(before, cleared())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert not done.stderr
    before, after = map(int, done.stdout.split())
    assert before > 20_000  # of some 100,000 that are written
    assert after < before / 20
