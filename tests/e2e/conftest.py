"""A small dataset, its undisturbed run, and one Ray that knows the S3 server."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import make_tiny_generator
from tests.e2e.small_dataset import Dataset, run_aligned, run_inline, run_kind
from tests.local_ray import shared_ray
from tests.s3_server import S3Server
from tests.tasks.small_edit import write_direction, write_domain


@pytest.fixture(scope="session")
def undisturbed(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A finished run that nothing happened to, on the inline engine."""
    run = str(tmp_path_factory.mktemp("undisturbed") / "run")
    summary = run_inline(dataset, run)
    assert summary.is_clean
    assert (summary.outcome.rows, summary.outcome.failed) == (12, 1)
    return run


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A direction and a domain of the dataset's generator."""
    folder, generator = tmp_path_factory.mktemp("place"), make_tiny_generator()
    write_direction(generator, folder / "turn.json")
    write_domain(generator, folder / "oil")
    return folder


@pytest.fixture(scope="session")
def calm(dataset: Dataset, undisturbed: str, place: Path) -> dict[str, str]:
    """A finished run of each kind that nothing happened to."""
    runs = {"invert": undisturbed}
    assert run_aligned(dataset, str(place / "aligned")).is_clean
    for kind in ("edit", "rescore", "index", "compose"):
        runs[kind] = str(place / kind)
        summary = run_kind(kind, dataset, undisturbed, place, runs[kind])
        assert summary.is_clean
        assert (summary.outcome.rows, summary.outcome.failed) == (12, 1)
    return runs


@pytest.fixture(scope="session")
def local_ray(s3_server: S3Server) -> Iterator[None]:
    """Started with the S3 server's variables: workers inherit them, as pods do from their spec."""
    before = dict(os.environ)
    os.environ.update(s3_server.environment)
    with shared_ray():
        os.environ.clear()
        os.environ.update(before)
        yield
