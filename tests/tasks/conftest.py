"""A job of a moment."""

from pathlib import Path

import pytest

from models.stylegan2.generator import Generator
from tasks.job import JobConfig
from tests.tasks.small_run import make_job


@pytest.fixture
def job(tiny_generator: Generator, tmp_path: Path) -> JobConfig:
    return make_job(tiny_generator, tmp_path)
