"""One small Ray for all tests of a session that need it."""

from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.ray_session import ray_session

NUM_CPUS = 4
"""Logical: two actors of one run, and what a run that has just ended has not given back yet."""


@contextmanager
def shared_ray() -> Iterator[None]:
    """A Ray on loopback: the one that is there already, or a new one until the block ends."""
    with ray_session(num_cpus=NUM_CPUS):
        yield
