"""Where chaos happens: a small data set, undisturbed runs of each kind, drivers that are forked
from a process with everything loaded, so that a start costs no seconds."""

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import dataclass, field, replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from tests.chaos.proxy import FaultProxy
from tests.conftest import make_picture_bytes, make_tiny_generator
from tests.e2e.small_dataset import Dataset, write_dataset
from tests.s3_server import S3Server
from tests.tasks.small_edit import write_direction, write_domain

KINDS = ("invert", "edit", "rescore")
ADAPT = (
    *("steps=40", "batch=2", "rank=2", "preview_every=4"),
    *("validation_every=4", "validation_codes=4"),
    *("domain.0.weights.patches=0", "domain.0.weights.adversarial=0"),
)
"""Settings of a domain of seconds."""
PATIENCE_S = 240.0
"""For a driver that must end; the machine may be busy."""


def run_driver(words: list[str], environment: dict[str, str], log: str) -> None:
    """The body of a driver process: the command line as a user types it."""
    os.setsid()
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if limit := os.environ.get("CHAOS_CLOCK_S"):
        _shift_clock(float(limit))
    from pipeline.cli import _interrupt, run_app

    signal.signal(signal.SIGTERM, _interrupt)
    code = run_app(words)
    sys.stdout.flush()
    os._exit(code)


def _shift_clock(seconds: float) -> None:
    """This process reads another time of day; its monotonic clock goes on."""
    real = time.time
    time.time = lambda: real() + seconds
    import datetime as module

    class Shifted(module.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return super().now(tz) + module.timedelta(seconds=seconds)

    from tasks.run import ledger

    ledger.datetime = Shifted  # type: ignore[attr-defined]


class Driver:
    """One `refinery` process."""

    def __init__(self, process: ForkServerProcess, log: Path) -> None:
        self.process, self.log = process, log

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def send(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def end(self, patience_s: float = PATIENCE_S) -> int:
        """The exit code; of a killed one negative.

        Raises:
            TimeoutError: it hangs. It is killed then.
        """
        self.process.join(patience_s)
        if self.process.exitcode is None:
            os.killpg(self.pid, signal.SIGKILL)
            self.process.join(30)
            raise TimeoutError(f"no end within {patience_s:g} s; it said {self.said[-500:]!r}")
        return self.process.exitcode

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


@dataclass
class Site:
    """Everything that trials share.

    Attributes:
        calm: the undisturbed run of each kind.
        calm_s: how long each took.
    """

    folder: Path
    dataset: Dataset
    context: Any
    server: S3Server
    proxy: FaultProxy
    calm: dict[str, str] = field(default_factory=dict)
    calm_s: dict[str, float] = field(default_factory=dict)
    count: int = 0

    @staticmethod
    def make(folder: Path) -> "Site":
        """Data set, moto's S3 server, proxy, and a run of each kind that nothing happens to."""
        generator = make_tiny_generator()
        pictures = [make_picture_bytes(seed) for seed in range(8)]
        dataset = write_dataset(folder / "dataset", generator, pictures)
        write_direction(generator, folder / "turn.json")
        write_domain(generator, folder / "oil")
        (folder / "warm").mkdir()
        for seed in range(10):
            (folder / "warm" / f"{seed}.png").write_bytes(make_picture_bytes(seed))
        context = multiprocessing.get_context("forkserver")
        modules = ["tests.chaos.site", "pipeline.cli", "pipeline.run", "pipeline.inline"]
        modules += ["pipeline.config", "pipeline.edit", "tasks.report.page", "tasks.verify.run"]
        modules += [f"tasks.work.{name}" for name in (*KINDS, "station")]
        context.set_forkserver_preload(modules)
        server = S3Server()
        os.environ.update(server.environment)  # the invariants look past the proxy
        site = Site(folder, dataset, context, server, FaultProxy(server.endpoint))
        site.start("invert", str(folder / "first")).end()  # the fork server loads PyTorch
        for kind in KINDS:
            site.undisturbed(kind)
        return site

    def undisturbed(self, kind: str) -> str:
        """The run of a kind that nothing happens to."""
        if kind not in self.calm:
            run, began = str(self.folder / "calm" / kind), time.monotonic()
            driver = self.start(kind, run)
            code = driver.end()
            assert code == 0, f"the undisturbed {kind} ended with {code}: {driver.said}"
            self.calm[kind], self.calm_s[kind] = run, time.monotonic() - began
        return self.calm[kind]

    def at(self, server: S3Server) -> "Site":
        """The same before another server, with a proxy of its own."""
        os.environ.update(server.environment)
        return replace(self, server=server, proxy=FaultProxy(server.endpoint))

    def close(self) -> None:
        self.proxy.close()
        self.server.stop()

    @property
    def s3(self) -> dict[str, str]:
        """The environment of a driver that meets S3 through the proxy; few and quick retries."""
        return self.server.environment | {
            "AWS_ENDPOINT_URL": self.proxy.endpoint,
            "AWS_RETRY_MODE": "standard",
            "AWS_MAX_ATTEMPTS": "6",
        }

    def words(self, kind: str, run: str, *sets: str) -> list[str]:
        """The command line of a kind of job."""
        if kind == "adapt":
            settings = [f"generator={self.folder}/dataset/tiny.safetensors", *ADAPT, *sets]
            found = ["adapt", "warm", f"--images={self.folder}/warm", f"--out={run}"]
            return [*found, *(f"--set={item}" for item in settings)]
        engine = ["engine.kind=inline", "engine.retry_wait_s=0.1", *sets]
        found = {"invert": ["invert", self.dataset.source, run, "--config", self.dataset.config]}
        if kind != "invert":
            plain = ["perceptual=none", "batch=2"]
            found[kind] = [kind, self.calm["invert"], run, *(f"--set={item}" for item in plain)]
        if kind == "edit":
            wishes = [f"--edit={self.folder}/turn.json=-1:1:2", f"--domain={self.folder}/oil"]
            found[kind] += [*wishes, "--strength=0.7", "--each", "--set=attributes=none"]
        return [*found[kind], "--no-flow", *(f"--set={item}" for item in engine)]

    def start(
        self, kind: str, run: str, *sets: str, environment: dict[str, str] | None = None
    ) -> Driver:
        """A driver, at work."""
        self.count += 1
        log = self.folder / f"driver-{self.count}.log"
        words = self.words(kind, run, *sets)
        process = self.context.Process(
            target=run_driver, args=(words, environment or {}, str(log)), daemon=True
        )
        process.start()
        return Driver(process, log)
