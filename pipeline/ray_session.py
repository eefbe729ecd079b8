"""Connect to a Ray cluster, or start a small one on loopback, and end only what we started.

A Ray without its raylet or its GCS server answers nothing, and its client waits: so the daemons of
a Ray of this process are looked at from outside, by pid.
"""

import ctypes
import logging
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

from models.errors import ConfigError, RefineryError

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
DAEMONS = ("gcs_server", "raylet")
SPARED = ("start_monitor", "start_log_monitor", "start_api_server")
"""What Ray starts besides, and `ray.init` waits for: autoscaler, tail of the workers' logs, server
of a dashboard. A Ray of one command has no use for them; they have no switch."""
SPARED_PARTS = "get_dashboard_dependency_error"
"""Where Ray asks whether the parts of a dashboard are installed. Without them its agent, which its
raylet waits for, comes up in half the time, and this process does not load a web server to know."""
PR_SET_CHILD_SUBREAPER = 36
AGENT = re.compile(r"^ray::\w*Agent|/ray/([^\0]*/)?agent(/main)?\.py")
"""The command of an agent of the raylet: no other child of this process may be ended for one."""
START_TRIES = 3
STOPPED_S = 15.0
"""How long a daemon may be stopped. A minute without its GCS, and Ray ends this process."""


class RayLost(RefineryError):
    """A daemon of the Ray that this process has started is gone."""


_stopped_since: dict[int, float] = {}
_coming: list[Future[Any]] = []
"""A local Ray that starts in the background, for the next `ray_session`, and what is made in it."""


@contextmanager
def ray_on_its_way(address: str = "", first: Callable[[], Any] = lambda: None) -> Iterator[None]:
    """A local Ray starts while the block does something else, for the `ray_session` in it: Ray's
    processes need seconds to come up. One that no session asks for is ended with the block. Does
    nothing where a cluster is wanted or this process has a Ray, or one is on its way already.

    Args:
        first: called as soon as Ray is up; the session gets what it returns.
    """
    _quieten()
    if address or os.environ.get("RAY_ADDRESS") or _coming or _has_ray():
        yield
        return
    logging.getLogger("ray._private.worker").addFilter(_is_news)
    with ThreadPoolExecutor(1, "ray") as thread:
        _coming.append(thread.submit(lambda: (_start(None), first())[1]))
        try:
            yield
        finally:
            while _coming:
                _coming.pop().exception()
                import ray

                ray.shutdown()


def _has_ray() -> bool:
    """Whether this process has a Ray; not by importing it, which takes a second."""
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


def _is_news(record: logging.LogRecord) -> bool:
    """Not that a thread leaves this process's answer to SIGTERM alone."""
    return "SIGTERM handler is not set" not in record.getMessage()


def _quieten() -> None:
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)


@contextmanager
def ray_session(address: str = "", *, num_cpus: int | None = None) -> Iterator[Any]:
    """Ray for the length of a block; yields what `ray_on_its_way` has made in it, else None.

    Args:
        address: of a cluster; empty means RAY_ADDRESS, and without it a local Ray on loopback, with
            no dashboard and no usage report. A Ray that the process has already is used as it is.
        num_cpus: of a local Ray; None for those of the machine.

    Raises:
        ConfigError: the cluster does not answer, or a local Ray does not start.
    """
    _quieten()
    import ray

    logging.getLogger("ray").setLevel(logging.WARNING)
    made = None
    if _coming:
        made = _coming.pop().result()
    elif ray.is_initialized():
        yield
        return
    else:
        address = address or os.environ.get("RAY_ADDRESS", "")
        with _own_sigterm():
            _connect(address) if address else _start(num_cpus)
    with _no_agent_left():
        try:
            yield made
        finally:
            ray.shutdown()


def _connect(address: str) -> None:
    import ray

    try:
        ray.init(address=address, **_common())
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"engine.address: no Ray cluster answers at {address!r} ({error}); start one, "
            "correct the address, or leave it (and RAY_ADDRESS) empty for a local Ray"
        ) from error


def _start(num_cpus: int | None) -> None:
    """A local Ray. A busy machine may need another try: Ray waits for half a minute, then raises a
    plain Exception and leaves what it has started, or has ended all but the agents of its raylet:
    whoever loses its parent is then this process's child."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    for left in reversed(range(START_TRIES)):
        try:
            _start_local(num_cpus)
            return
        except Exception as error:
            me = {os.getpid()}
            begun = {
                pid for pid, _ in _children(me) if any(name in _command(pid) for name in DAEMONS)
            }
            _kill([*_agents(me | begun), *begun])
            if not left:
                raise ConfigError(
                    f"a local Ray does not start: {error}; set RAY_TMPDIR to a short path with "
                    "free space, or run with --engine inline"
                ) from error
            logger.warning("Ray did not start (%s); once more", error)


@contextmanager
def _no_agent_left() -> Iterator[None]:
    """The raylet's agents do not notice its end, nor this process's: a shell that sees its standard
    input close ends them."""
    agents = _agents(_raylets())
    if not agents:
        yield
        return
    command = ["sh", "-c", f"read -r _; kill -KILL {' '.join(map(str, agents))} 2>&-"]
    guard = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield
    finally:
        guard.kill()
        guard.communicate()
        _kill({*filter(_is_agent, agents), *_agents({os.getpid()})})


def _kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _agents(parents: set[int]) -> list[int]:
    """Pids of the agents that some processes have started, or inherited."""
    return [pid for pid, _ in _children(parents) if _is_agent(pid)]


def _is_agent(pid: int) -> bool:
    """By "python .../ray/.../agent.py" too: on a busy machine it takes minutes until an agent calls
    itself "ray::DashboardAgent"."""
    return bool(AGENT.search(_command(pid)))


def _raylets() -> set[int]:
    return {process.pid for name, process in _daemons() if name == "raylet"}


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except OSError:
        return ""


def _children(parents: set[int]) -> Iterator[tuple[int, str]]:
    """Pid and state of every child of some processes."""
    for folder in Path("/proc").glob("[0-9]*") if parents else ():
        with suppress(OSError):
            # "pid (name) state parent ...": a name may hold blanks and brackets.
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
            if int(parent) in parents:
                yield int(folder.name), state


def end_worker(pid: int) -> bool:
    """SIGKILL a Ray process of this machine; a process that is none is left alone."""
    with suppress(OSError):
        if _command(pid).startswith("ray::"):
            os.kill(pid, signal.SIGKILL)
            return True
    return False


def check_daemons() -> bool:
    """Look at the daemons of the Ray that this process has started; a cluster's are not ours.

    Returns:
        False while one of them is stopped: no call of Ray would return.

    Raises:
        RayLost: one has ended, or was stopped for longer than `STOPPED_S` and is ended here.
    """
    is_running = True
    for name, process in _daemons():
        if process.poll() is not None:
            raise RayLost(f"Ray's {name} (pid {process.pid}) has ended: {_ending(process)}")
        stopped_s = _stopped_s(process.pid, _state(process.pid))
        is_running &= stopped_s == 0
        if stopped_s > STOPPED_S:
            process.kill()
            process.wait()
            raise RayLost(f"Ray's {name} (pid {process.pid}) was stopped for {STOPPED_S:g} s")
    return is_running


def end_stopped_workers() -> None:
    """End those of our own raylet that are stopped for longer than `STOPPED_S`: one that is stopped
    before it is up answers no heartbeat, and Ray waits for it."""
    for pid, state in _children(_raylets()):
        if _stopped_s(pid, state) > STOPPED_S and end_worker(pid):
            logger.warning("a worker (pid %d) was stopped for %g s and is ended", pid, STOPPED_S)


def _stopped_s(pid: int, state: str) -> float:
    """For how long a process has been seen stopped."""
    if state not in ("T", "t"):
        _stopped_since.pop(pid, None)
        return 0.0
    now = time.monotonic()
    return now - _stopped_since.setdefault(pid, now - 1e-3)


def _daemons() -> list[tuple[str, Any]]:
    """Name and process of each."""
    from ray._private import worker

    node = worker._global_node
    processes = {} if node is None else node.all_processes
    return [(name, entry.process) for name in DAEMONS for entry in processes.get(name, ())]


def _ending(process: Any) -> str:
    code = process.returncode
    if code >= 0:
        return f"status {code}"
    hint = " (out of memory?)" if -code == signal.SIGKILL else ""
    return f"{signal.Signals(-code).name}{hint}"


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def _start_local(num_cpus: int | None) -> None:
    import ray
    from ray._private import utils
    from ray._private.node import Node

    # Ray asks for a token, so that other users of the machine cannot use it: one for this Ray
    # alone instead of a file in the home directory, which may be read-only.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    options = _common()
    spared = [
        name for name in SPARED if name != "start_log_monitor" or not options["log_to_driver"]
    ]
    with ExitStack() as stack:
        for name in spared:
            if hasattr(Node, name):  # another version of Ray may call it otherwise
                stack.enter_context(patch.object(Node, name, lambda node, **_: None))
        if hasattr(utils, SPARED_PARTS):
            absent = ImportError("a Ray of one command has no dashboard")
            stack.enter_context(patch.object(utils, SPARED_PARTS, lambda: absent))
        ray.init(
            address="local",
            include_dashboard=False,
            num_cpus=num_cpus,
            object_store_memory=OBJECT_STORE_BYTES,
            # One process for each CPU, before anybody knows how many actors there will be.
            _system_config={"enable_worker_prestart": False, "prestart_worker_first_driver": False},
            _node_ip_address=LOOPBACK,
            **options,
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
