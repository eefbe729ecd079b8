"""deploy/compose.yaml: loopback only, one image, parts that wait for each other."""

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.config import load_config
from pipeline.prefect_leases import COME_BACK_S

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "deploy" / "compose.yaml").read_text()


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    return yaml.safe_load(TEXT)["services"]


def test_every_port_is_published_on_loopback_only(services: dict[str, Any]) -> None:
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert len(ports) == 2
    for port in ports:
        assert re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port), port


def test_every_service_is_our_image_from_our_dockerfile(services: dict[str, Any]) -> None:
    for name, service in services.items():
        assert service["image"].startswith("style-refinery:0.1.0-"), name
        dockerfile = ROOT / "deploy" / service["build"]["context"] / service["build"]["dockerfile"]
        assert dockerfile.resolve() == ROOT / "deploy" / "Dockerfile"


def test_services_wait_for_what_they_need(services: dict[str, Any]) -> None:
    server, setup, worker = (
        services[n] for n in ("prefect-server", "prefect-setup", "prefect-worker")
    )
    assert server["healthcheck"]["test"][-1] == "http://127.0.0.1:4200/api/health"
    assert setup["depends_on"]["prefect-server"]["condition"] == "service_healthy"
    waits_for = worker["depends_on"]["prefect-setup"]["condition"]
    assert waits_for == "service_completed_successfully"
    for client in (setup, worker):
        assert client["environment"]["PREFECT_API_URL"] == "http://prefect-server:4200/api"


def test_set_up_names_what_prefect_yaml_uses(services: dict[str, Any]) -> None:
    shipped = yaml.safe_load((ROOT / "deploy" / "prefect.yaml").read_text())["deployments"]
    deployment = shipped[0]  # compose sets up the nightly inversion
    assert {d["work_pool"]["name"] for d in shipped} == {deployment["work_pool"]["name"]}
    (script,) = services["prefect-setup"]["command"]
    pool = deployment["work_pool"]["name"]
    assert f"work-pool create {pool} --type process" in script
    assert f"--name {deployment['name']} " in script
    worker = services["prefect-worker"]["command"]
    assert worker[worker.index("--pool") + 1] == pool
    from pipeline.flows import GPU_LIMIT

    assert f"gcl create {GPU_LIMIT} " in script


def test_a_dead_night_does_not_keep_its_slot(services: dict[str, Any]) -> None:
    storage = services["prefect-server"]["environment"]["PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE"]
    assert hasattr(importlib.import_module(storage), "ConcurrencyLeaseStorage")
    assert storage in (ROOT / "docs" / "operations.md").read_text()
    (script,) = services["prefect-setup"]["command"]
    automations = yaml.safe_load((ROOT / "deploy" / "automations.yaml").read_text())["automations"]
    for automation in automations:  # made anew at every `up`, not once more
        assert f"automation delete {automation['name']} || true" in script
    assert "automation create --from-file /etc/refinery/automations.yaml" in script
    shipped = yaml.safe_load((ROOT / "deploy" / "prefect.yaml").read_text())["deployments"]
    environments = [d["work_pool"]["job_variables"]["env"] for d in shipped]
    beats = {int(env["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"]) for env in environments}
    assert len(beats) == 1
    for automation in automations:
        # Even where the server died before it kept what it had said itself, the living are heard.
        assert "prefect.flow-run.heartbeat" in automation["trigger"]["expect"]
    (dead,) = (a for a in automations if a["name"] == "end-dead-runs")
    assert dead["trigger"]["within"] >= 120 + 3 * max(beats)  # a server away for two minutes
    for env in environments:  # Prefect waits 2^n s, and a fifth, before try n + 1
        assert 1.2 * 2 ** int(env["PREFECT_CLIENT_MAX_RETRIES"]) < COME_BACK_S


def test_default_overrides_fit_a_machine_without_a_gpu() -> None:
    overrides = json.loads(re.search(r"\$\{OVERRIDES:-(\[.*?\])\}", TEXT)[1])
    engine = load_config(str(ROOT / "deploy" / "nightly.toml"), overrides).engine
    assert engine.actors == 1
    assert engine.gpus_per_actor == 0


def test_optional_store_is_off_by_default(services: dict[str, Any]) -> None:
    assert [n for n, s in services.items() if "profiles" in s] == ["s3"]
    assert services["s3"]["build"]["args"]["EXTRAS"] == "dev"
