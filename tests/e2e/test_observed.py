"""What a run tells while it works: metrics that are scraped, a log and progress in its folder,
`refinery status`."""

import json
import re
import time
import urllib.request
from pathlib import Path

import pytest

from pipeline.cli import run_app
from pipeline.config import load_config
from pipeline.metrics import METRICS
from pipeline.run import carry_out, finish, plan
from pipeline.run_log import read_progress
from pipeline.status import read_status
from pipeline.tally import TallySnapshot
from tasks.run.ledger import read_markers
from tests.e2e.small_dataset import NUM_SHARDS, Dataset, write_tars
from tests.services.prefect_site import free_port

LINE = re.compile(r"^(?:ray_)?(refinery_\w+)\{(.*)\} (\S+)$", re.M)


def scraped(url: str) -> dict[tuple[str, str], float]:
    """Values by name and the label besides the run."""
    with urllib.request.urlopen(url, timeout=10) as response:
        text = response.read().decode()
    own = {label for metric in METRICS.values() for label in metric.labels}
    found: dict[tuple[str, str], float] = {}
    for name, labels, value in LINE.findall(text):
        pairs = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        if not name.endswith("_created"):
            found[name, "".join(v for k, v in pairs.items() if k in own)] = float(value)
    return found


def events(run: str) -> list[dict[str, object]]:
    files = sorted((Path(run) / "logs").glob("*/*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_metrics_without_ray(dataset: Dataset, tmp_path: Path) -> None:
    run, port = str(tmp_path / "run"), free_port()
    seen: list[dict[tuple[str, str], float]] = []
    computed: list[int] = []

    def look(snapshot: TallySnapshot) -> None:
        computed.append(sum(shard.rows for shard in snapshot.at_work))
        if snapshot.rows_now:
            seen.append(scraped(f"http://127.0.0.1:{port}/metrics"))

    sets = ["engine.kind=inline", f"engine.metrics_port={port}", "batch=1"]
    plan(dataset.source, run, load_config(dataset.config, sets))

    def look_while_served(snapshot: TallySnapshot) -> None:
        if snapshot.shards_done < NUM_SHARDS:  # after the last one the endpoint closes
            look(snapshot)

    finish(run, load_config(dataset.config, sets).engine, look_while_served)
    last, markers = seen[-1], read_markers(run)
    done = [markers[shard] for shard in range(NUM_SHARDS - 1)]
    assert last["refinery_images_total", "ok"] == sum(m.rows - m.failed for m in done) == 10
    assert last["refinery_shards_total", "committed"] == 5
    wanted = sum(part.bytes for marker in done for part in marker.parts.values())
    assert last["refinery_bytes_total", ""] == wanted
    spent = sum(marker.seconds["invert"] for marker in done)
    assert last["refinery_stage_seconds_total", "invert"] == pytest.approx(spent)
    assert last["refinery_shards_pending", ""] == 1
    assert last["refinery_workers", ""] == 1
    assert 0 < last["refinery_device_busy_share", ""] <= 1
    assert 1 in computed  # half a shard: progress inside one
    with pytest.raises(OSError, match="refused"):
        scraped(f"http://127.0.0.1:{port}/metrics")


def test_a_taken_port_is_the_users_mistake(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import socket

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        words = ["invert", dataset.source, str(tmp_path / "run"), "--config", dataset.config]
        words += ["--engine", "inline", "--no-flow", f"--set=engine.metrics_port={port}"]
        assert run_app(words) == 2
    assert f"nothing can listen on 127.0.0.1:{port}" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("local_ray")
def test_metrics_through_ray(dataset: Dataset, tmp_path: Path) -> None:
    import ray

    carry_out(
        dataset.source, str(tmp_path / "run"), load_config(dataset.config, ["engine.actors=1"])
    )
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    deadline = time.monotonic() + 60
    while (found := scraped(url)).get(("refinery_images_total", "ok"), 0) < 11:
        assert time.monotonic() < deadline, found
        time.sleep(1)
    assert found["refinery_images_total", "failed"] == 1
    assert found["refinery_shards_total", "committed"] == 6
    assert found["refinery_failures_total", "decode"] == 1


def test_the_log_stays_with_the_run(
    dataset: Dataset, tmp_path: Path, face_bytes: list[bytes]
) -> None:
    source, run = write_tars(tmp_path / "tars", face_bytes), str(tmp_path / "run")
    carry_out(str(source), run, load_config(dataset.config, ["engine.kind=inline"]))
    told = events(run)
    assert {event["run"] for event in told} == {read_status(run).run_id}
    (committed,) = (event for event in told if event["event"] == "committed")
    marker = read_markers(run)[1]
    assert (committed["shard"], committed["attempt"]) == (1, marker.attempt)
    assert (committed["rows"], committed["failed"]) == (3, 0)
    (given_up,) = (event for event in told if event["event"] == "quarantined")
    assert (given_up["shard"], given_up["failure"]) == (0, "damaged")
    assert any(event["event"] == "log" and event["level"] == "WARNING" for event in told)
    assert told[-1]["event"] == "finished"
    assert read_progress(run) is None  # nobody is at work


def test_status_watch_ends_with_the_seal(
    undisturbed: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_app(["status", undisturbed, "--watch"]) == 0
    assert "6 of 6 committed" in capsys.readouterr().out
