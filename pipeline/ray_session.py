"""Connect to a Ray cluster, or start a small one on loopback, and end only what we started."""

import logging
import os
import secrets
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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
LOOPBACK = "127.0.0.2" if sys.platform == "linux" else "127.0.0.1"
"""Ray replaces 127.0.0.1 by the address of a network card, which a laptop may lose meanwhile; on
Linux all of 127/8 is loopback."""


@contextmanager
def ray_session(address: str = "", *, num_cpus: int | None = None) -> Iterator[None]:
    """Ray for the length of a block.

    Args:
        address: of a cluster; empty means RAY_ADDRESS, and without it a local Ray on loopback, with
            no dashboard and no usage report. A Ray that the process has already is used as it is.
        num_cpus: of a local Ray; None for those of the machine.

    Raises:
        ConfigError: the cluster does not answer, or a local Ray does not start.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import ray

    logging.getLogger("ray").setLevel(logging.WARNING)
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS", "")
    try:
        with _own_sigterm():
            _start_local(num_cpus) if not address else ray.init(address=address, **_common())
    except Exception as error:  # of every kind, bare ones too
        if address:
            raise ConfigError(
                f"engine.address: no Ray cluster answers at {address!r} ({error}); start one, "
                "correct the address, or leave it (and RAY_ADDRESS) empty for a local Ray"
            ) from error
        raise ConfigError(
            f"a local Ray does not start: {error}; set RAY_TMPDIR to a short path with free space, "
            "or run with --engine inline"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _start_local(num_cpus: int | None) -> None:
    import ray

    # Ray asks for a token, so that other users of the machine cannot use it: one for this Ray
    # alone instead of a file in the home directory, which may be read-only.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    ray.init(
        address="local",
        include_dashboard=False,
        num_cpus=num_cpus,
        object_store_memory=OBJECT_STORE_BYTES,
        _node_ip_address=LOOPBACK,
        **_common(),
    )


def _common() -> dict[str, Any]:
    """Ray's own set-up of logging would print every line of ours a second time. What workers and
    Ray's daemons print is for --debug: the driver says what matters of it."""
    is_debug = logger.isEnabledFor(logging.INFO)
    return {"log_to_driver": is_debug, "configure_logging": False}


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep this process's answer to SIGTERM; Ray's prints a stack trace and aborts."""
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    yield
    if is_main and before is not None:
        signal.signal(signal.SIGTERM, before)
