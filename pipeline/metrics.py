"""Metrics of a run for Prometheus: through Ray's endpoint on each node, and from the driver itself.

The driver knows all of it, because every result of a shard passes through it. Names on Ray's
endpoint begin with `ray_`; deploy/grafana.json and deploy/alerts.yaml take both.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, Protocol

from models.errors import ConfigError
from pipeline.config import EngineConfig
from pipeline.tally import Tally, TallySnapshot
from pipeline.worker import ShardResult

DEVICE_FREE_STAGES = ("read", "decode", "write")
"""Every other stage holds the device."""


@dataclass(frozen=True)
class Series:
    """One metric. A counter's name is exported with `_total` behind it."""

    kind: Literal["counter", "gauge"]
    help: str
    labels: tuple[str, ...] = ()


METRICS: Mapping[str, Series] = {
    "refinery_images": Series("counter", "Samples committed", ("status",)),
    "refinery_failures": Series("counter", "Failed samples, by their error_kind", ("kind",)),
    "refinery_bytes": Series("counter", "Bytes of committed parts"),
    "refinery_stage_seconds": Series("counter", "Busy seconds of all workers", ("stage",)),
    "refinery_shards": Series("counter", "Shards finished", ("outcome",)),
    "refinery_retries": Series("counter", "Attempts that are made again", ("reason",)),
    "refinery_shards_pending": Series("gauge", "Shards neither committed nor given up"),
    "refinery_shards_at_work": Series("gauge", "Shards that workers hold"),
    "refinery_images_at_work": Series("gauge", "Samples computed and not yet committed"),
    "refinery_workers": Series("gauge", "Workers that are up"),
    "refinery_device_busy_share": Series(
        "gauge", "Share of the workers' time in which a device was at work on committed shards"
    ),
}


class Sink(Protocol):
    """Where metrics go."""

    def add(self, name: str, value: float, labels: dict[str, str]) -> None: ...


class ExporterSink:
    """An HTTP endpoint of this process, `http://address:port/metrics`.

    Raises:
        ConfigError: the port is taken.
    """

    def __init__(self, address: str, port: int) -> None:
        from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

        registry = CollectorRegistry()
        kinds = {"counter": Counter, "gauge": Gauge}
        self._metrics = {
            name: kinds[metric.kind](name, metric.help, ("run", *metric.labels), registry=registry)
            for name, metric in METRICS.items()
        }
        try:
            self._server, self._thread = start_http_server(port, address, registry)
        except OSError as error:
            raise ConfigError(
                f"engine.metrics_port: nothing can listen on {address}:{port} ({error}); choose "
                "another port, or 0 for none"
            ) from error

    def add(self, name: str, value: float, labels: dict[str, str]) -> None:
        found = self._metrics[name].labels(**labels)
        found.inc(value) if METRICS[name].kind == "counter" else found.set(value)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class RaySink:
    """The metrics endpoint of this node's Ray; made inside a Ray session."""

    def __init__(self) -> None:
        from ray.util.metrics import Counter, Gauge

        kinds = {"counter": Counter, "gauge": Gauge}
        self._metrics = {
            name: kinds[metric.kind](name, metric.help, ("run", *metric.labels))
            for name, metric in METRICS.items()
        }

    def add(self, name: str, value: float, labels: dict[str, str]) -> None:
        metric = self._metrics[name]
        if METRICS[name].kind == "gauge":
            metric.set(value, labels)
        elif value > 0:
            metric.inc(value, labels)


class Metrics:
    """Counts results and snapshots of one run, for any number of sinks."""

    def __init__(self, run_id: str) -> None:
        self._run, self._device_s = run_id, 0.0
        self.sinks: list[Sink] = []

    def on_result(self, result: ShardResult, outcome: str) -> None:
        """One attempt has ended. Outcome: committed, retried, quarantined."""
        if outcome == "retried":
            self._add("refinery_retries", 1, reason=str(result.failure))
            return
        self._add("refinery_shards", 1, outcome=outcome)
        if outcome != "committed":
            return
        self._add("refinery_images", result.rows - result.failed, status="ok")
        self._add("refinery_images", result.failed, status="failed")
        self._add("refinery_bytes", result.bytes)
        for kind, number in result.failures.items():
            self._add("refinery_failures", number, kind=kind)
        for stage, seconds in result.seconds.items():
            self._add("refinery_stage_seconds", seconds, stage=stage)
            self._device_s += 0.0 if stage in DEVICE_FREE_STAGES else seconds

    def on_progress(self, snapshot: TallySnapshot) -> None:
        """How things stand."""
        pending = snapshot.shards_total - snapshot.shards_done - snapshot.shards_quarantined
        self._add("refinery_shards_pending", pending)
        self._add("refinery_shards_at_work", len(snapshot.at_work))
        self._add("refinery_images_at_work", sum(shard.rows for shard in snapshot.at_work))
        self._add("refinery_workers", snapshot.workers)
        worker_s = snapshot.seconds * max(snapshot.workers, 1)
        if worker_s > 0:
            self._add("refinery_device_busy_share", min(self._device_s / worker_s, 1.0))

    def _add(self, name: str, value: float, **labels: str) -> None:
        for sink in self.sinks:
            sink.add(name, value, {"run": self._run, **labels})


@contextmanager
def exported(tally: Tally, run_id: str, engine: EngineConfig) -> Iterator[None]:
    """Count what a tally books until the block ends, and export it where the engine says so.

    Raises:
        ConfigError: the port is taken.
    """
    metrics = Metrics(run_id)
    exporter = None
    if engine.metrics_port:
        exporter = ExporterSink(engine.metrics_address, engine.metrics_port)
        metrics.sinks.append(exporter)
    tally.listeners.append(metrics)
    tally.metrics = metrics
    try:
        yield
    finally:
        if exporter is not None:
            exporter.close()


@contextmanager
def exported_by_ray(metrics: Metrics | None) -> Iterator[None]:
    """Also through the Ray of this block."""
    if metrics is None:
        yield
        return
    sink = RaySink()
    metrics.sinks.append(sink)
    try:
        yield
    finally:
        metrics.sinks.remove(sink)
