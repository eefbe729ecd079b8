"""One or two actors or a loop, local files or S3, worker killed or not: the same bytes."""

from pathlib import Path

import pytest

from pipeline.config import load_config
from pipeline.run import carry_out
from tasks.run.ledger import read_markers
from tasks.storage.crash import POINTS
from tests.e2e.small_dataset import Dataset, fingerprint, rows, run_inline


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("local_ray")
def test_one_actor_killed_at_each_of_six_points(
    dataset: Dataset, undisturbed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = str(tmp_path / "run")
    tokens = {point: tmp_path / point for point in POINTS}
    crashes = [f"{point}:{shard}:{tokens[point]}" for shard, point in enumerate(POINTS)]
    monkeypatch.setenv("REFINERY_CRASH", ";".join(crashes))
    config = load_config(dataset.config, ["engine.actors=1", "engine.max_attempts=8"])
    summary = carry_out(dataset.source, run, config)
    assert all(token.exists() for token in tokens.values())
    assert summary.is_clean
    assert (summary.outcome.rows, summary.outcome.failed) == (12, 1)
    assert fingerprint(run) == fingerprint(undisturbed)
    assert rows(run).equals(rows(undisturbed))


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("local_ray")
def test_two_actors_writing_to_s3(dataset: Dataset, undisturbed: str, s3: str) -> None:
    run = f"{s3}/runs/one"
    summary = carry_out(dataset.source, run, load_config(dataset.config, ["engine.actors=2"]))
    assert summary.is_clean
    assert summary.report_uri == f"{run}/report.html"
    assert fingerprint(run) == fingerprint(undisturbed)
    assert rows(run).equals(rows(undisturbed))
    assert {m.device for m in read_markers(run).values()} == {"cpu"}


def test_pictures_from_s3(
    dataset: Dataset, undisturbed: str, s3: str, face_bytes: list[bytes]
) -> None:
    from tasks.storage.files import write_bytes

    for path in sorted(Path(dataset.source).iterdir()):
        write_bytes(f"{s3}/in/{path.name}", path.read_bytes())
    moved = Dataset(source=f"{s3}/in", config=dataset.config)
    summary = run_inline(moved, f"{s3}/out")
    assert summary.is_clean
    # Where a picture lies is a column and part of the run's identity; all else is equal.
    place = "image_uri, run_id"
    assert rows(f"{s3}/out", without=place).equals(rows(undisturbed, without=place))
    images = [parts["images"] for parts in fingerprint(undisturbed).values()]
    assert [parts["images"] for parts in fingerprint(f"{s3}/out").values()] == images
