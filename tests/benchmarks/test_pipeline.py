"""The pipeline's benchmark runs, and compares equal work."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.pipeline import compare


@pytest.mark.slow
def test_both_do_the_same_pictures(tmp_path: Path, face_bytes: list[bytes]) -> None:
    pq.write_table(pa.table({"image": face_bytes[:8]}), tmp_path / "train64-000.parquet")
    found = compare(tmp_path, 8, 1, ["inline"])
    row = found["engines"]["inline"]
    assert found["images"] == 8
    assert row["workers"] == 1
    assert row["pipeline / bare"] == pytest.approx(
        row["pipeline_images_per_s"] / row["bare_images_per_s"]
    )
    assert row["pipeline / bare, CPU"] > 0
    assert row["start_up"]["wall_s"] > 0
