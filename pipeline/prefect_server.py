"""A Prefect API for flows where nobody runs a server: on loopback, for the life of this process.

Prefect can start one by itself. This one differs where a long run on a terminal needs it to: it
starts while PyTorch is still loading, Ctrl-C does not reach it, it dies with a driver that is
killed, and nothing of it outlives the process (PREFECT_HOME is a temporary folder).
"""

import atexit
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.error
import urllib.request
from pathlib import Path

from models.errors import RefineryError

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 120.0
OFFLINE = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
}
PRIVATE = {
    **OFFLINE,
    "PREFECT_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_TO_API_ENABLED": "false",
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_UI_ENABLED": "0",
    "PREFECT_CLI_COLORS": "false",
}
# The server asks the kernel to end it with the thread that started it, then becomes uvicorn.
BOOTSTRAP = """
import ctypes, runpy, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
runpy.run_module("uvicorn", run_name="__main__", alter_sys=True)
"""


def has_server() -> bool:
    """Whether the user named a server: PREFECT_API_URL, or an active profile that sets it."""
    if os.environ.get("PREFECT_API_URL"):
        return True
    home = Path(os.environ.get("PREFECT_HOME", Path.home() / ".prefect"))
    try:
        profiles = tomllib.loads((home / "profiles.toml").read_text())
        active = os.environ.get("PREFECT_PROFILE", profiles["active"])
        return bool(profiles["profiles"][active].get("PREFECT_API_URL"))
    except (OSError, KeyError, tomllib.TOMLDecodeError):
        return False


class PrivateServer:
    """Starts at once, is waited for later. Must be made before `prefect` is imported.

    Attributes:
        api_url: also set as PREFECT_API_URL in this process.
    """

    def __init__(self) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="refinery-prefect-"))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.api_url = f"http://127.0.0.1:{port}/api"
        os.environ.update(PRIVATE, PREFECT_HOME=str(self.home))
        command = ["uvicorn", "--factory", "prefect.server.api.server:create_app"]
        command += ["--host", "127.0.0.1", "--port", str(port), "--log-level", "error"]
        self._log = (self.home / "server.log").open("wb")
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", BOOTSTRAP, *command[1:]],
            env={**os.environ, "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        os.environ["PREFECT_API_URL"] = self.api_url
        # Registered before Prefect's own clean-up, which talks to the server, so it runs after.
        atexit.register(self.stop)

    def wait(self) -> None:
        """Return when the API answers.

        Raises:
            RefineryError: it does not come up.
        """
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._log.flush()
                log = (self.home / "server.log").read_text(errors="replace").strip()
                self.stop()
                raise RefineryError(
                    f"Prefect's server did not start on {self.api_url}: "
                    f"{log[-500:] or 'no answer'}; run with --no-flow, or name a server with "
                    "PREFECT_API_URL"
                )
            time.sleep(0.05)

    def stop(self) -> None:
        """End the server and remove its folder. Safe to call again."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._log.close()
        shutil.rmtree(self.home, ignore_errors=True)
        if os.environ.get("PREFECT_API_URL") == self.api_url:
            del os.environ["PREFECT_API_URL"]

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.api_url}/health", timeout=1) as response:
                return response.status == 200
        except (urllib.error.URLError, OSError):
            return False


def start_server() -> PrivateServer | None:
    """A server of our own where the user named none; None means that Prefect's settings decide."""
    if has_server():
        for name, value in OFFLINE.items():
            os.environ.setdefault(name, value)
        return None
    return PrivateServer()
