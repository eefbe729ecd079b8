"""The Prefect flow on a temporary server: states, artifacts, the day in the output's name."""

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    FlowRunFilter,
    FlowRunFilterId,
    TaskRunFilter,
)
from prefect.client.schemas.objects import Artifact, FlowRun
from prefect.client.schemas.sorting import ArtifactSort, FlowRunSort
from prefect.testing.utilities import prefect_test_harness

from models.editing.direction import load_direction
from models.errors import ConfigError, LedgerError
from pipeline import flows
from pipeline.config import EngineConfig, load_config
from pipeline.edit_flows import fit_directions, nightly_domains
from pipeline.flows import IncompleteRun, gpus_wanted, invert_dataset, listening, run_over_run
from pipeline.tally import TallySnapshot
from tasks.run.query import query
from tests.e2e.small_dataset import Dataset, fingerprint, write_tars


@pytest.fixture(scope="module", autouse=True)
def prefect_server() -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=100):
        yield


def flow_runs() -> list[FlowRun]:
    with get_client(sync_client=True) as client:
        return client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=100)


def artifacts(flow_run: FlowRun) -> dict[str, Artifact]:
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(
            flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run.id])),
            artifact_filter=ArtifactFilter(),
            task_run_filter=TaskRunFilter(),
            sort=ArtifactSort.ID_DESC,
            limit=100,
            offset=0,
        )
    return {a.key: a for a in found if a.key}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_kind_without_a_flow_of_its_own(calm: dict[str, str], tmp_path: Path) -> None:
    out = str(tmp_path / "scores-{date}")
    sets = ["perceptual=none", "batch=2", "engine.kind=inline"]
    summary = run_over_run("rescore", calm["invert"], out, None, sets)
    assert summary.is_clean
    assert fingerprint(summary.outcome.run_uri) == fingerprint(calm["rescore"])
    (run, *_) = flow_runs()
    assert (run.state_name, run.parameters["kind"]) == ("Completed", "rescore")
    assert "summary" in artifacts(run)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_flow_completes_and_shows_the_run(
    dataset: Dataset, undisturbed: str, tmp_path: Path
) -> None:
    seen: list[TallySnapshot] = []
    with listening(seen.append):
        summary = invert_dataset(
            dataset.source, str(tmp_path / "{date}"), dataset.config, ["engine.kind=inline"]
        )
    (run,) = tmp_path.iterdir()
    assert len(run.name) == len("2026-01-31")
    assert summary.outcome.run_uri == str(run)
    assert fingerprint(str(run)) == fingerprint(undisturbed)
    assert (seen[-1].shards_done, seen[-1].rows_failed) == (6, 1)

    (flow_run,) = (f for f in flow_runs() if f.name == str(run))
    assert flow_run.state is not None
    assert flow_run.state.is_completed()
    found = artifacts(flow_run)
    assert set(found) == {"progress", "summary", "preview"}
    assert found["progress"].data == 100.0
    assert '"value": 12' in str(found["summary"].data)
    prefix, _, data = str(found["preview"].data).partition(",")
    assert prefix == "data:image/png;base64"
    # Two pictures of the first shard, inputs above inversions.
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (192, 192)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_flow_fails_when_a_shard_was_quarantined(
    dataset: Dataset, tmp_path: Path, face_bytes: list[bytes]
) -> None:
    source, run = write_tars(tmp_path / "tars", face_bytes), str(tmp_path / "run")
    with pytest.raises(IncompleteRun, match="1 of 2 shards quarantined, ") as caught:
        invert_dataset(str(source), run, dataset.config, ["engine.kind=inline"])
    assert caught.value.summary.outcome.rows == 3
    (flow_run,) = (f for f in flow_runs() if f.name == run)
    assert flow_run.state is not None
    assert flow_run.state.is_failed()
    assert "quarantined 00000" in str(artifacts(flow_run)["summary"].data)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_errors_of_ours_pass_through_at_once(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"engine\.actor: unknown key"):
        invert_dataset(dataset.source, str(tmp_path), dataset.config, ["engine.actor=1"])


def test_gpu_quota() -> None:
    assert gpus_wanted(EngineConfig(gpus_per_actor=0, actors=8)) == 0
    assert gpus_wanted(EngineConfig(gpus_per_actor=1, actors=8)) == 8
    assert gpus_wanted(EngineConfig(gpus_per_actor=0.25, actors=6)) == 2
    assert gpus_wanted(EngineConfig(gpus_per_actor="auto", actors=3, address="auto")) == 3
    assert gpus_wanted(EngineConfig(kind="inline", gpus_per_actor=1, actors=8)) == 1


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_storage_that_comes_back_is_waited_for(
    dataset: Dataset, undisturbed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_plan, tries = flows.stages.plan, []

    def plan(*args: Any, **kwargs: Any) -> Any:
        tries.append(args)
        if len(tries) == 1:
            raise LedgerError("no answer") from ConnectionError()
        return real_plan(*args, **kwargs)

    monkeypatch.setattr(flows.stages, "plan", plan)
    monkeypatch.setattr(flows, "plan_run", flows.plan_run.with_options(retry_delay_seconds=0))
    run = str(tmp_path / "run")
    invert_dataset(dataset.source, run, dataset.config, ["engine.kind=inline"])
    assert len(tries) == 2
    assert fingerprint(run) == fingerprint(undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_refusal_is_not_retried(
    dataset: Dataset, undisturbed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_plan, tries = flows.stages.plan, []

    def plan(*args: Any, **kwargs: Any) -> Any:
        tries.append(args)
        return real_plan(*args, **kwargs)

    monkeypatch.setattr(flows.stages, "plan", plan)
    with pytest.raises(LedgerError, match=r"config\.seed: 0 in the run, 1 now"):
        invert_dataset(
            dataset.source, undisturbed, dataset.config, ["engine.kind=inline", "seed=1"]
        )
    assert len(tries) == 1


# ------------------------------------------------------------------ over stored codes


@pytest.fixture
def adaptation(dataset: Dataset, tmp_path: Path, face_bytes: list[bytes]) -> str:
    """The config of a job of two steps on the dataset's generator."""
    references = tmp_path / "references"
    references.mkdir()
    for index, data in enumerate(face_bytes[:3]):
        (references / f"{index}.png").write_bytes(data)
    path = tmp_path / "adapt.toml"
    generator = load_config(dataset.config).job.generator
    path.write_text(
        f'generator = "{generator}"\nout = "{tmp_path}/domains"\nsteps = 2\nbatch = 2\n'
        "validation_every = 1\nvalidation_codes = 2\nrank = 1\n"
        f'[[domain]]\nname = "Oil 1"\nreferences = "{references}"\n'
    )
    return str(path)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_night_of_restyling(adaptation: str, undisturbed: str, tmp_path: Path) -> None:
    out = str(tmp_path / "{date}")
    sets = ["engine.kind=inline", "perceptual=none", "attributes=none"]
    summary = nightly_domains(adaptation, undisturbed, out, 0.5, sets)
    assert (summary.outcome.rows, summary.outcome.failed) == (12, 1)
    names = query(summary.outcome.run_uri, "SELECT * FROM images LIMIT 0").column_names
    assert names == ["sample_key", "input", "inversion", "Oil-1~0.5", "run"]
    assert Path(tmp_path / "domains" / "Oil 1" / "tokens.safetensors").is_file()

    mine = [
        f for f in flow_runs() if str(f.parameters.get("output_uri", "")).startswith(str(tmp_path))
    ]
    runs = {f.flow_id: f for f in mine}
    assert len(runs) == 2  # the night, and its edits
    assert all(f.state is not None and f.state.is_completed() for f in runs.values())
    (learnt,) = (f for f in flow_runs() if f.parameters.get("config") == adaptation)
    found = artifacts(learnt)
    assert set(found) == {"progress", "domains", "oil-1"}
    assert found["progress"].data == 100.0
    assert '"name": "Oil 1"' in str(found["domains"].data)
    (edits,) = (f for f in runs.values() if f.parameters.get("wishes"))
    assert set(artifacts(edits)) == {"progress", "summary", "preview"}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_directions_are_fitted_by_a_flow(dataset: Dataset, tmp_path: Path) -> None:
    generator = load_config(dataset.config).job.generator
    sets = [f"generator={generator}", f"out={tmp_path}", "count=2", "layers=[1, 2]"]
    found = fit_directions("sefa", None, sets)
    assert found == [str(tmp_path / "sefa-0.json"), str(tmp_path / "sefa-1.json")]
    assert load_direction(found[0]).layers == (1, 2)
    with pytest.raises(ConfigError, match=r"unknown way; did you mean 'sefa'"):
        fit_directions("sefaa")
