"""deploy/prefect.yaml against a real Prefect server on loopback: accepted, scheduled, completed."""

import json
import os
import shlex
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml

from models.checkpoints.native import save_generator
from models.stylegan2.generator import Generator
from tests.services.prefect_site import PrefectSite, prefect_site, server, wait_for_run
from tests.tasks.small_edit import write_direction

ROOT = Path(__file__).resolve().parents[2]
PREFECT_YAML = ROOT / "deploy" / "prefect.yaml"

CONFIG = """
generator = {generator!r}
perceptual = "none"
batch = 4

[[method]]
name = "wplus"
steps = 1

[engine]
kind = "inline"
shard_size = 4
"""


@pytest.fixture
def site(tmp_path: Path) -> Iterator[PrefectSite]:
    with prefect_site(tmp_path) as found, server(found):
        yield found


def write_job(folder: Path, generator: Generator, pictures: list[bytes]) -> tuple[Path, Path]:
    """Five pictures in a folder and the config of their inversion: the paths of both."""
    source, config = folder / "pictures", folder / "config.toml"
    source.mkdir()
    for index, data in enumerate(pictures[:5]):
        (source / f"{index}.png").write_bytes(data)
    weights = save_generator(generator, folder / "tiny.safetensors", {"terms": "test"})
    config.write_text(CONFIG.format(generator=str(weights)))
    return source, config


def set_up(site: PrefectSite) -> None:
    """The commands of docs/operations.md that are given once, as they stand there."""
    block = (ROOT / "docs" / "operations.md").read_text().split("export PREFECT_API_URL=")[1]
    lines = [line for line in block.split("```")[0].splitlines() if line.startswith("prefect ")]
    assert lines.pop().startswith("prefect worker start --pool refinery --type process")
    assert len(lines) == 4
    for line in lines:
        words = [w.replace("deploy/", f"{ROOT}/deploy/") for w in shlex.split(line)[1:]]
        site.command(*(word for word in words if word != "--no-prompt"))


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_scheduled_run_of_the_shipped_deployment_completes(
    site: PrefectSite, tmp_path: Path, tiny_generator: Generator, face_bytes: list[bytes]
) -> None:
    # The file as it is shipped is accepted.
    shipped = yaml.safe_load(PREFECT_YAML.read_text())
    pool = shipped["deployments"][0]["work_pool"]["name"]
    set_up(site)
    made = {a["name"]: a for a in site.api("/automations/filter", {})}
    assert made.keys() == {"end-dead-runs", "end-lost-starts"}
    assert all(a["actions"][0]["state"] == "CRASHED" for a in made.values())
    nightly = site.api("/deployments/name/invert-dataset/nightly-inversion")
    assert nightly["entrypoint"] == shipped["deployments"][0]["entrypoint"]
    assert nightly["parameters"] == shipped["deployments"][0]["parameters"]
    assert nightly["concurrency_options"]["collision_strategy"] == "ENQUEUE"
    assert nightly["global_concurrency_limit"]["limit"] == 1
    assert [s["schedule"]["cron"] for s in nightly["schedules"]] == ["30 1 * * *"]
    assert [s["schedule"]["timezone"] for s in nightly["schedules"]] == ["Etc/UTC"]
    for flow, name in (
        ("nightly-domains", "nightly-domains"),
        ("adapt-domain", "adapt"),
        ("edit-dataset", "edit"),
        ("fit-directions", "directions"),
    ):
        found = site.api(f"/deployments/name/{flow}/{name}")
        (wanted,) = (d for d in shipped["deployments"] if d["name"] == name)
        assert found["parameters"] == wanted.get("parameters", {})
        assert found["parameter_openapi_schema"]["properties"].keys() >= found["parameters"].keys()
        assert not [s for s in found["schedules"] if s["active"]]

    # The same file, with a small job and a schedule that is due in a moment.
    runs = tmp_path / "runs"
    pictures, config = write_job(tmp_path, tiny_generator, face_bytes)
    soon = shipped["deployments"][0] | {
        "parameters": {
            "input_uri": str(pictures),
            "output_uri": str(runs / "faces-{date}"),
            "config": str(config),
        },
        "schedules": [
            {
                # The second firing is for a machine so busy that it misses the first.
                "interval": 45,
                "anchor_date": (datetime.now(UTC) + timedelta(seconds=10)).isoformat(),
                "slug": "soon",
            }
        ],
    }
    soon_yaml = tmp_path / "prefect.yaml"
    soon_yaml.write_text(yaml.safe_dump(shipped | {"deployments": [soon]}))
    # As compose.yaml does it: one parameter from the command line, the others from the file.
    site.command(
        *("deploy", "--name", "nightly-inversion", "--prefect-file", str(soon_yaml)),
        *("--param", 'overrides=["seed=7"]'),
    )
    changed = site.api("/deployments/name/invert-dataset/nightly-inversion")
    assert changed["id"] == nightly["id"]
    assert changed["parameters"]["overrides"] == ["seed=7"]
    assert changed["parameters"]["input_uri"] == str(pictures)

    arguments = ("worker", "start", "--pool", pool, "--type", "process")
    with site.running("worker", *arguments):
        finished = wait_for_run(site, nightly["id"], patience_s=300)
    assert finished["state_type"] == "COMPLETED", site.log("worker")
    assert finished["auto_scheduled"] is True
    (run,) = runs.iterdir()
    assert finished["name"] == str(run)
    assert finished["expected_start_time"][:10] == run.name.removeprefix("faces-")
    sealed = json.loads((run / "_SEALED.json").read_text())
    assert (sealed["rows"], sealed["failed"], sealed["num_shards"]) == (5, 0, 2)
    assert json.loads((run / "run.json").read_text())["config"]["seed"] == 7


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.skipif("REFINERY_SOAK" not in os.environ, reason="minutes: REFINERY_SOAK=1")
def test_every_shipped_deployment_runs(
    site: PrefectSite, tmp_path: Path, tiny_generator: Generator, face_bytes: list[bytes]
) -> None:
    set_up(site)
    pictures, config = write_job(tmp_path, tiny_generator, face_bytes)
    generator = tmp_path / "tiny.safetensors"
    place, adaptation = tmp_path / "place", tmp_path / "adapt.toml"
    adaptation.write_text(
        f'generator = "{generator}"\nout = "{place}/domains"\nsteps = 2\nbatch = 2\n'
        "validation_every = 1\nvalidation_codes = 2\nrank = 1\n"
        f'[[domain]]\nname = "oil"\nreferences = "{pictures}"\n'
    )
    turn = write_direction(tiny_generator, tmp_path / "turn.json")
    plain = ["engine.kind=inline", "perceptual=none", "attributes=none"]
    night = {"input_uri": str(pictures), "output_uri": f"{place}/faces", "config": str(config)}
    later = {
        "edit-dataset/edit": {
            "source_uri": f"{place}/faces",
            "output_uri": f"{place}/older",
            "wishes": {"edits": [f"{turn}=+1"]},
            "overrides": plain,
        },
        "fit-directions/directions": {
            "way": "sefa",
            "overrides": [f"generator={generator}", f"out={place}/found", "count=2", "layers=[1]"],
        },
        "adapt-domain/adapt": {"config": str(adaptation)},
        "nightly-domains/nightly-domains": {
            "adapt_config": str(adaptation),
            "source_uri": f"{place}/faces",
            "output_uri": f"{place}/styles",
            "overrides": plain,
        },
    }
    shipped = yaml.safe_load(PREFECT_YAML.read_text())["deployments"]
    assert {name.partition("/")[2] for name in later} | {"nightly-inversion"} == {
        deployment["name"] for deployment in shipped
    }

    def complete(name: str, parameters: Mapping[str, object]) -> None:
        deployment = site.api(f"/deployments/name/{name}")["id"]
        words = [f"--param={key}={json.dumps(value)}" for key, value in parameters.items()]
        site.command("deployment", "run", name, *words)
        finished = wait_for_run(site, deployment, patience_s=300)
        assert finished["state_type"] == "COMPLETED", site.log("worker")

    with site.running("worker", "worker", "start", "--pool", "refinery", "--type", "process"):
        complete("invert-dataset/nightly-inversion", night)
        for name, parameters in later.items():
            complete(name, parameters)
    for name in ("faces", "older", "styles"):
        assert json.loads((place / name / "_SEALED.json").read_text())["rows"] == 5
    assert sorted(path.name for path in (place / "found").iterdir()) == [
        "sefa-0.json",
        "sefa-1.json",
    ]
    assert (place / "domains" / "oil" / "tokens.safetensors").is_file()
