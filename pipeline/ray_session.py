"""Connect to a Ray cluster, or start a small one on loopback, and end only what we started."""

import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

from models.errors import ConfigError

logger = logging.getLogger(__name__)

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # A launcher such as `uv run` must not make every worker build its own environment.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    # Keep CUDA_VISIBLE_DEVICES as it is for actors that ask for no GPU (and spare a warning).
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_DEDUP_LOGS": "0",
}
OBJECT_STORE_BYTES = 100 * 2**20
"""Pictures never enter the object store; only shard numbers and counts do."""


@contextmanager
def ray_session(address: str = "") -> Iterator[None]:
    """Ray for the length of a block.

    Args:
        address: of a cluster; empty means RAY_ADDRESS, and without it a local Ray on loopback, with
            no dashboard and no usage report. A Ray that the process has already is used as it is.

    Raises:
        ConfigError: the cluster does not answer.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS", "")
    common = {"log_to_driver": True, "logging_level": logging.WARNING, "configure_logging": True}
    if address:
        try:
            ray.init(address=address, **common)
        except (ConnectionError, TimeoutError, OSError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"engine.address: no Ray cluster answers at {address!r} ({error}); start one, "
                "correct the address, or leave it (and RAY_ADDRESS) empty for a local Ray"
            ) from error
    else:
        # Ray asks for a token, so that other users of the machine cannot use it: one for this Ray
        # alone instead of a file in the home directory, which may be read-only.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
        ray.init(
            address="local",
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
            object_store_memory=OBJECT_STORE_BYTES,
            **common,
        )
    try:
        yield
    finally:
        ray.shutdown()
