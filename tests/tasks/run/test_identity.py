"""The id of a run is of contents; runs of version 1 are still the same runs."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from models.errors import LedgerError
from tasks.edit_job import BlendConfig, EditJobConfig, StrengthConfig, VariantConfig
from tasks.job import InputConfig, Job, JobConfig, MethodConfig, OutputConfig
from tasks.run.identity import identity_digest, make_identity, places
from tasks.run.manifest import ManifestInfo
from tasks.run.run_json import create_run, read_declared, read_run
from tasks.work.kinds import load_job
from tests.tasks.small_run import DECLARED

INFO = ManifestInfo(3, 10, 1000, "now" * 20, "m" * 64)
INVERSION = JobConfig(
    generator="weights/faces.safetensors",
    methods=(
        MethodConfig(name="e4e", settings={"checkpoint": "weights/e4e.safetensors"}),
        MethodConfig(name="wplus", settings={"steps": 20, "space": "w"}),
    ),
    input=InputConfig(fit="align", template="t.json"),
    output=OutputConfig(pictures=("inversion",), latents="float16"),
    batch=8,
    seed=3,
)
EDITS = EditJobConfig(
    source="runs/faces",
    source_run="ab12",
    generator="weights/faces.safetensors",
    method="e4e+wplus",
    variants=(
        VariantConfig(
            name="older",
            edits=(StrengthConfig(name="directions/age.json", strength=2.0),),
            domains=(StrengthConfig(name="impasto", strength=0.5),),
            blends=(BlendConfig(sample_key="a/b.png", share=0.25, rows=(1, 2)),),
            residual=0.5,
        ),
    ),
    attributes="none",
)
HASHES = {
    "invert": {"generator": "a" * 64, "methods.0.e4e.e4e": "b" * 64},
    "edit": {
        "generator": "a" * 64,
        "source": "ab12",
        "directions.directions/age.json": "c" * 64,
        "domains.impasto": "d" * 64,
        "samples.a/b.png": "e" * 64,
    },
}
CASES = [
    (INVERSION, "2507682f25e9025f", ("read", "decode", "invert", "score", "write")),
    (EDITS, "53950e358a67af39", ("read", "edit", "score", "write")),
]


def digest(job: Job, hashes: dict[str, str]) -> str:
    return identity_digest(make_identity(job, INFO, hashes))


@pytest.mark.parametrize(("job", "run_id", "stages"), CASES)
def test_a_recorded_run_of_version_1_goes_on(
    job: Job, run_id: str, stages: tuple[str, ...], tmp_path: Path
) -> None:
    """The files were written by the code of version 1."""
    recorded = Path(__file__).with_name(f"version_1_{job.kind}.json")
    path = tmp_path / "run.json"
    shutil.copy(recorded, path)
    handle = create_run(str(tmp_path), job, INFO, HASHES[job.kind], "0.1.0", DECLARED)
    assert handle.run_id == run_id == identity_digest(read_run(str(tmp_path)))
    assert path.read_bytes() == recorded.read_bytes()
    batch = read_run(str(tmp_path))["config"]["batch"]
    assert load_job(str(tmp_path)) == dataclasses.replace(job, batch=batch)
    assert (read_declared(str(tmp_path)).kind, read_declared(str(tmp_path)).stages) == (
        job.kind,
        stages,
    )
    other = dataclasses.replace(job, batch=9)
    with pytest.raises(LedgerError, match=r"config\.batch: \d+ in the run, 9 now"):
        create_run(str(tmp_path), other, INFO, HASHES[job.kind], "0.1.0", DECLARED)


def test_the_places_of_each_job() -> None:
    assert set(places(INVERSION)) == {
        "generator",
        "identity",
        "input.template",
        "methods.0.settings.checkpoint",
    }
    assert set(places(EDITS)) == {
        "generator",
        "identity",
        "source",
        "domain_folders",
        "variants.0.edits.0.name",
        "variants.0.domains.0.name",
        "variants.0.assigned",
    }


def test_a_run_goes_on_in_smaller_batches(tmp_path: Path) -> None:
    """Only the batch may change, and what the workers read is the new one."""
    first = create_run(str(tmp_path), INVERSION, INFO, HASHES["invert"], "1", DECLARED)
    smaller = dataclasses.replace(INVERSION, batch=2)
    assert create_run(str(tmp_path), smaller, INFO, HASHES["invert"], "1", DECLARED) == first
    assert load_job(str(tmp_path)).batch == 2
    assert identity_digest(read_run(str(tmp_path))) == first.run_id


def test_settings_that_came_later_leave_earlier_runs_alone() -> None:
    def known(job: JobConfig, version: int) -> dict[str, object]:
        return make_identity(job, INFO, HASHES["invert"], version)["config"]["input"]

    assert "max_bytes" not in known(INVERSION, 2)
    assert known(INVERSION, 3)["max_bytes"] == InputConfig().max_bytes
    changed = dataclasses.replace(INVERSION, input=InputConfig(max_bytes=5))
    assert known(changed, 2)["max_bytes"] == 5  # another run


def test_what_moved_is_the_same_run(tmp_path: Path) -> None:
    (variant,) = EDITS.variants
    edits = (StrengthConfig(name="s3://b/age.json", strength=2.0),)
    moved = dataclasses.replace(
        EDITS, source="s3://b/faces", variants=(dataclasses.replace(variant, edits=edits),)
    )
    hashes = {k.replace("directions/age", "s3://b/age"): v for k, v in HASHES["edit"].items()}
    assert "directions.s3://b/age.json" in hashes
    first = create_run(str(tmp_path), EDITS, INFO, HASHES["edit"], "1", DECLARED)
    created = read_run(str(tmp_path))["created_at"]
    second = create_run(str(tmp_path), moved, INFO, hashes, "1", DECLARED)
    assert second == first
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["config"]["source"] == "s3://b/faces"
    assert (record["weights"], record["created_at"]) == (hashes, created)
    assert identity_digest(record) == first.run_id


@pytest.mark.parametrize("name", ["generator", "directions.directions/age.json", "domains.impasto"])
def test_what_lies_at_a_place_decides(name: str) -> None:
    other = HASHES["edit"] | {name: "f" * 64}
    assert digest(EDITS, other) != digest(EDITS, HASHES["edit"])


def test_which_direction_stands_where_decides() -> None:
    def edits(*names: str) -> EditJobConfig:
        made = tuple(
            VariantConfig(name=f"v{i}", edits=(StrengthConfig(name=name),))
            for i, name in enumerate(names)
        )
        return dataclasses.replace(EDITS, variants=made)

    hashes = {"generator": "a" * 64, "directions.x": "1" * 64, "directions.y": "2" * 64}
    orders = [("x", "y", "x"), ("x", "y", "y"), ("y", "x", "y"), ("x", "x", "y")]
    assert len({digest(edits(*names), hashes) for names in orders}) == 4
    renamed = {"generator": "a" * 64, "directions.p": "1" * 64, "directions.q": "2" * 64}
    assert digest(edits("p", "q", "p"), renamed) == digest(edits("x", "y", "x"), hashes)


@pytest.mark.parametrize(
    "changes", [{"perceptual": "none"}, {"attributes": "auto"}, {"source_run": "cd"}]
)
def test_settings_decide(changes: dict[str, object]) -> None:
    changed = dataclasses.replace(EDITS, **changes)
    assert digest(changed, HASHES["edit"]) != digest(EDITS, HASHES["edit"])
