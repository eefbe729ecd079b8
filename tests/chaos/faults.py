"""Kinds of fault: each is a function of a `Trial` that disturbs a run in its way, lets it come to
its end, and has the invariants looked at."""

import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from tasks.storage.crash import POINTS
from tests.chaos.invariants import check_exit, check_processes, check_run
from tests.chaos.proxy import Weather
from tests.chaos.scarcity import Scarcity, can_be_scarce
from tests.chaos.site import PATIENCE_S, Driver, Site
from tests.e2e.small_dataset import NUM_SHARDS
from tests.processes import named, send, wait_for

RAY = ("engine.kind=ray", "engine.actors=1", "engine.gpus_per_actor=0", "engine.heartbeat_s=10")


@dataclass
class Trial:
    """One run, its drivers, and what was found wrong."""

    site: Site
    fault: str
    seed: int
    kind: str
    folder: Path
    dice: random.Random = field(init=False)
    run: str = ""
    drivers: list[Driver] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    hits: int = 0
    """What the proxy did, or how many processes were hit."""

    def __post_init__(self) -> None:
        self.dice = random.Random(f"{self.fault} {self.seed}")
        self.run = self.run or str(self.folder / "run")
        self.mark = f"chaos-{self.fault}-{self.seed}-{os.getpid()}"

    def start(self, *sets: str, **environment: str) -> Driver:
        driver = self.site.start(
            self.kind, self.run, *sets, environment={"CHAOS_TRIAL": self.mark, **environment}
        )
        self.drivers.append(driver)
        return driver

    def expect(self, driver: Driver, *codes: int, may_be_terminated: bool = False) -> int:
        """A driver that nobody killed ends by itself; with one of these codes, where given.

        Args:
            may_be_terminated: SIGTERM was sent. A driver that had not got as far as to answer it
                is ended by the system, and has then said and written nothing.
        """
        try:
            code = driver.end()
        except TimeoutError as error:
            self.problems.append(str(error))
            return -1
        if code == -signal.SIGTERM and may_be_terminated:
            if driver.said or Path(self.run).exists():
                self.problems.append(f"ended by SIGTERM in the midst of it: {driver.said[-300:]}")
            return code
        self.problems += check_exit(code, driver.said)
        if codes and code not in codes:
            self.problems.append(f"exit code {code}, not {codes}: {driver.said[-300:]}")
        return code

    def moment_s(self) -> float:
        """Some time within the run."""
        return self.dice.uniform(0.0, 1.1 * self.site.calm_s[self.kind])

    def finish(self, *sets: str, **environment: str) -> None:
        """Run once more, undisturbed, and look at everything."""
        last = self.start(*sets, **environment)
        self.expect(last, 0)
        self.check(last)

    def check(self, last: Driver) -> None:
        if not self.problems:
            self.problems += check_run(self.run, self.site.calm[self.kind], last.said)
        self.problems += check_processes([driver.pid for driver in self.drivers], self.mark)


# ---------------------------------------------------------------------------- processes


def driver_killed(trial: Trial) -> None:
    """SIGKILL at any moment, up to three times."""
    for _ in range(trial.dice.randint(1, 3)):
        driver = trial.start()
        time.sleep(trial.moment_s())
        driver.send(signal.SIGKILL)
        trial.hits += driver.end() == -signal.SIGKILL
    trial.finish()


def driver_terminated(trial: Trial) -> None:
    """SIGTERM, as a preempted machine sends it."""
    driver = trial.start()
    time.sleep(trial.moment_s())
    driver.send(signal.SIGTERM)
    trial.hits += trial.expect(driver, 0, 130, may_be_terminated=True) != 0
    trial.finish()


def crash_point(trial: Trial) -> None:
    """A death at a named place of a shard: before the read, between two parts, ..."""
    points = [p for p in POINTS if p != "in_decode" or trial.kind == "invert"]
    point, shard = trial.dice.choice(points), trial.dice.randrange(NUM_SHARDS)
    driver = trial.start(REFINERY_CRASH=f"{point}:{shard}:{trial.folder / 'token'}")
    trial.hits += driver.end() == 137
    trial.finish()


def driver_stopped(trial: Trial) -> None:
    """SIGSTOP; another driver finishes the run; then the first one wakes up."""
    late = trial.start()
    time.sleep(trial.moment_s())
    late.send(signal.SIGSTOP)
    trial.hits += late.process.is_alive()
    other = trial.start(*_other(trial))
    trial.expect(other, 0)
    late.send(signal.SIGCONT)
    trial.expect(late)
    trial.finish()


def two_drivers(trial: Trial) -> None:
    """Two at once on one run; one of them may be told so."""
    first = trial.start()
    time.sleep(trial.dice.uniform(0, 0.5))
    second = trial.start(*_other(trial))
    trial.hits += 1
    codes = {trial.expect(first), trial.expect(second)}
    if 0 not in codes:
        trial.problems.append(f"neither came to its end: {codes}")
    trial.finish()


def out_of_memory(trial: Trial) -> None:
    """The kernel's out-of-memory killer ends the driver."""
    with Scarcity(trial.mark) as scarcity:
        driver = trial.start()
        time.sleep(trial.moment_s())
        scarcity.put(driver.pid)
        code = driver.end()
        trial.hits += scarcity.kills
    if code not in (0, -signal.SIGKILL):
        trial.problems.append(f"exit code {code}: {driver.said[-300:]}")
    trial.finish()


def clock_jump(trial: Trial) -> None:
    """A driver whose clock is hours off dies, another one goes on."""
    shift = trial.dice.choice([-90_000, -4_000, 4_000, 90_000])
    driver = trial.start(CHAOS_CLOCK_S=str(shift))
    time.sleep(trial.moment_s())
    driver.send(signal.SIGKILL)
    trial.hits += driver.end() == -signal.SIGKILL
    trial.finish()


def _other(trial: Trial) -> tuple[str, ...]:
    """Settings of a driver that may meet another one: it waits for its end, or takes the run."""
    return (f"engine.if_busy={trial.dice.choice(['wait', 'take'])}",)


# ---------------------------------------------------------------------------- adaptation


def _adapting(number: signal.Signals) -> Callable[[Trial], None]:
    """A signal to who learns a domain, up to twice; a stopped one goes on after a while."""

    def fault(trial: Trial) -> None:
        trial.kind = "adapt"
        calm = Path(trial.site.undisturbed("adapt"))
        for _ in range(trial.dice.randint(1, 2)):
            driver = trial.start()
            time.sleep(trial.moment_s())
            trial.hits += driver.process.is_alive()
            driver.send(number)
            if number == signal.SIGSTOP:
                time.sleep(2.0)
                driver.send(signal.SIGCONT)
            code = driver.end()
            if code not in (0, 130, -number):
                trial.problems.append(f"exit code {code}: {driver.said[-300:]}")
        last = trial.start()
        if (code := last.end()) != 0:
            trial.problems.append(f"exit code {code}: {last.said[-300:]}")
        found = Path(trial.run)
        names, wanted = ({p.relative_to(f) for p in f.rglob("*")} for f in (found, calm))
        if names != wanted:
            trial.problems.append(f"other files than the undisturbed: {names ^ wanted}")
        for name in ("warm/tokens.safetensors", "warm/preview.png"):
            if (found / name).read_bytes() != (calm / name).read_bytes():
                trial.problems.append(f"{name} has other bytes than the undisturbed one")
        trial.problems += check_processes([driver.pid for driver in trial.drivers], trial.mark)

    return fault


# ---------------------------------------------------------------------------- disks


def disk_full(trial: Trial) -> None:
    """A disk of a few hundred kilobytes that fills up, and is then made larger."""
    size = trial.dice.randint(20, 90)
    with _small_disk(trial, f"size={size}k"):
        code = trial.expect(trial.start(), 0, 2)
        trial.hits += code == 2
        _mount("-o", "remount,size=64m", str(trial.folder / "disk"))
        trial.finish()


def disk_read_only(trial: Trial) -> None:
    """A disk that turns read-only in the middle, as one with errors does."""
    disk = str(trial.folder / "disk")
    with _small_disk(trial, "size=64m"):
        driver = trial.start("engine.patience_s=5")
        time.sleep(trial.moment_s())
        with suppress(subprocess.CalledProcessError):  # busy: a file is open for writing
            _mount("-o", "remount,ro", disk)
        code = trial.expect(driver, 0, 2)
        trial.hits += code == 2
        _mount("-o", "remount,rw", disk)
        trial.finish()


class _small_disk:
    def __init__(self, trial: Trial, options: str) -> None:
        self.disk, self.trial, self.options = trial.folder / "disk", trial, options

    def __enter__(self) -> None:
        self.disk.mkdir()
        _mount("-t", "tmpfs", "-o", self.options, "tmpfs", str(self.disk))
        self.trial.run = str(self.disk / "run")

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "--lazy", str(self.disk)], check=True)


def _mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True, capture_output=True)


@cache
def can_do(fault: str) -> bool:
    """Whether this user may do that to a run: mount a small disk, make a memory group."""
    if "memory" in fault:
        return can_be_scarce()
    return "disk" not in fault or _can_mount()


@cache
def _can_mount() -> bool:
    import tempfile

    if os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True
        )
        if done.returncode == 0:
            subprocess.run(["umount", folder], check=True)
        return done.returncode == 0


def symlinks_in_output(trial: Trial) -> None:
    """The run is a link to another disk, so are its folders; the driver dies and is run again."""
    elsewhere = trial.folder / "elsewhere"
    elsewhere.mkdir()
    (trial.folder / "run").symlink_to(elsewhere, target_is_directory=True)
    for name in trial.dice.sample(["latents", "images", "commits"], 2):
        (trial.folder / name).mkdir()
        (elsewhere / name).symlink_to(trial.folder / name, target_is_directory=True)
    driver = trial.start()
    time.sleep(trial.moment_s())
    driver.send(signal.SIGKILL)
    trial.hits += driver.end() == -signal.SIGKILL
    trial.finish()


# ---------------------------------------------------------------------------- S3


def _weather(way: str, share: float) -> Callable[[Trial], None]:
    def fault(trial: Trial) -> None:
        trial.run = f"{trial.site.server.make_bucket()}/run"
        length_s = trial.dice.uniform(2.0, 8.0)
        with trial.site.proxy.under(Weather(way, trial.seed, share, length_s)) as weather:
            driver = trial.start(**trial.site.s3)
            trial.expect(driver)
            trial.hits += weather.hits
        trial.finish(**trial.site.s3)

    return fault


def s3_late_marker(trial: Trial) -> None:
    """The marker of one driver hangs in the network until another driver has finished the run."""
    trial.run = f"{trial.site.server.make_bucket()}/run"
    proxy = trial.site.proxy
    proxy.delay_s = trial.dice.uniform(1.0, 4.0)
    with proxy.under(Weather("late-marker", trial.seed, 1.0, 3.0)) as weather:
        late = trial.start(**trial.site.s3)
        wait_for(lambda: weather.hits or not late.process.is_alive(), 60, "a marker")
        proxy.weather = None
        other = trial.start(*_other(trial), **trial.site.s3)
        trial.expect(other)
        trial.expect(late)
        trial.hits += weather.hits
    trial.finish(**trial.site.s3)


def s3_driver_killed(trial: Trial) -> None:
    """SIGKILL while an object is on its way."""
    trial.run = f"{trial.site.server.make_bucket()}/run"
    with trial.site.proxy.under(Weather("slow", trial.seed, 0.3, 30.0)):
        driver = trial.start(**trial.site.s3)
        time.sleep(2 * trial.moment_s())
        driver.send(signal.SIGKILL)
        trial.hits += driver.end() == -signal.SIGKILL
    trial.finish(**trial.site.s3)


# ---------------------------------------------------------------------------- pictures


def poison_picture(trial: Trial) -> None:
    """A picture that ends every process that touches it: its shard is given up, all others are
    done; once it is cured, the run is whole."""
    trial.kind = "invert"
    shard = trial.dice.randrange(NUM_SHARDS)
    sick = trial.start(*RAY, "engine.max_attempts=2", REFINERY_CRASH=f"in_decode:{shard}")
    trial.expect(sick, 1)
    if f"{shard:05d}" not in sick.said:
        trial.problems.append(f"shard {shard} is not named: {sick.said[-300:]}")
    trial.hits += 1
    trial.finish()


# ---------------------------------------------------------------------------- Ray


def _with_worker(trial: Trial, *sets: str) -> Driver:
    """A driver with a Ray of its own, some time after its worker has come."""
    driver = trial.start(*RAY, "engine.max_attempts=6", *sets)
    wait_for(
        lambda: named(driver.pid, "ray::PoolActor") or not driver.process.is_alive(),
        300,
        "a worker",
    )
    time.sleep(trial.moment_s())
    return driver


def worker_out_of_memory(trial: Trial) -> None:
    """The kernel's out-of-memory killer ends the worker. Ray starts another one, which has enough;
    or all that come die, until the command gives up and says why."""
    is_lasting = trial.dice.random() < 0.4
    with Scarcity(trial.mark) as scarcity:
        driver = _with_worker(trial, "engine.patience_s=30")
        scarcity.put(*named(driver.pid, "ray::PoolActor"))
        deadline = time.monotonic() + PATIENCE_S
        while is_lasting and driver.process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.1)
            scarcity.put(*named(driver.pid, "ray::PoolActor"))
        code = trial.expect(driver, 0, 1, 2)
        kills = scarcity.kills
    trial.hits += kills
    is_told = re.search("worker.* died|no worker came up", " ".join(driver.said.split()))
    if is_lasting and kills and (code not in (1, 2) or not is_told):
        trial.problems.append(f"exit code {code} after {kills} deaths: {driver.said[-300:]}")
    elif code == 1 and not is_lasting:
        trial.problems.append(f"a shard was given up after {kills} deaths: {driver.said[-300:]}")
    _look(trial, driver, code)


def _look(trial: Trial, driver: Driver, code: int) -> None:
    """After a driver with a Ray of its own: at once, or where Ray did not come up again in its
    time, and the command said so, after another run."""
    if code == 0:
        trial.check(driver)
    else:
        trial.finish()


def _in_ray(part: str, number: signal.Signals) -> Callable[[Trial], None]:
    def fault(trial: Trial) -> None:
        driver = _with_worker(trial)
        found = [driver.pid] if part == "driver" else named(driver.pid, part)
        send(found[:1], number)
        trial.hits += len(found[:1])
        if part == "driver":
            driver.end()
            time.sleep(5)
            trial.finish()
        else:
            _look(trial, driver, trial.expect(driver, 0, 2))

    return fault


# ---------------------------------------------------------------------------- all

QUICK: dict[str, Callable[[Trial], None]] = {
    "driver-killed": driver_killed,
    "driver-terminated": driver_terminated,
    "driver-stopped": driver_stopped,
    "crash-point": crash_point,
    "two-drivers": two_drivers,
    "clock-jump": clock_jump,
    "symlinks-in-output": symlinks_in_output,
    "s3-503-burst": _weather("503", 0.3),
    "s3-reset": _weather("reset", 0.2),
    "s3-truncated": _weather("truncate", 0.3),
    "s3-slow": _weather("slow", 0.3),
    "s3-outage": _weather("outage", 1.0),
    "s3-lost-acknowledgement": _weather("lost-ack", 0.4),
    "s3-expired-credentials": _weather("expired", 1.0),
    "s3-late-marker": s3_late_marker,
    "s3-driver-killed": s3_driver_killed,
    "adapt-killed": _adapting(signal.SIGKILL),
    "adapt-terminated": _adapting(signal.SIGTERM),
    "adapt-stopped": _adapting(signal.SIGSTOP),
}
"""Drivers with the inline engine: seconds a trial."""
ROOTS: dict[str, Callable[[Trial], None]] = {
    "disk-full": disk_full,
    "disk-read-only": disk_read_only,
    "out-of-memory": out_of_memory,
}
"""Need the right to mount, or to make memory groups."""
RAYS: dict[str, Callable[[Trial], None]] = {
    "poison-picture": poison_picture,
    "worker-killed": _in_ray("ray::PoolActor", signal.SIGKILL),
    "worker-out-of-memory": worker_out_of_memory,
    "worker-stopped": _in_ray("ray::PoolActor", signal.SIGSTOP),
    "raylet-killed": _in_ray("raylet", signal.SIGKILL),
    "raylet-stopped": _in_ray("raylet", signal.SIGSTOP),
    "gcs-killed": _in_ray("gcs_server", signal.SIGKILL),
    "gcs-stopped": _in_ray("gcs_server", signal.SIGSTOP),
    "ray-driver-killed": _in_ray("driver", signal.SIGKILL),
}
"""Each starts a Ray: half a minute a trial."""
