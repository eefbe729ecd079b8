"""Measured speeds and sizes for a plan."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from models.errors import ConfigError, ShardError
from tasks.job import JobConfig
from tasks.run.marker import Marker
from tasks.work import probe as probing
from tasks.work.invert import Inverter
from tasks.work.probe import probe
from tests.tasks.small_run import begin, write_pictures


def test_counts_bytes_and_speeds(
    job: JobConfig, tmp_path: Path, face_bytes: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_pictures(tmp_path / "in", face_bytes)
    inverter = Inverter(job, "cpu")
    sizes = []
    original = inverter.work
    inverter.work = lambda batch: (sizes.append(len(batch)), original(batch))[1]
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = sorted(tmp_path.iterdir())
    found = probe(job, str(folder), 6, "cpu", 256, inverter=inverter)
    assert sizes == [3, 3, 3]  # a warm-up batch, then six pictures
    assert (found.num_images, found.num_failed, found.device) == (6, 0, "cpu")
    assert sorted(tmp_path.iterdir()) == before
    assert set(found.images_per_s) == {"read", "decode", "invert", "score", "write", "total"}
    assert (
        0
        < found.images_per_s["total"]
        < min(speed for stage, speed in found.images_per_s.items() if stage != "total")
    )
    run = begin(str(tmp_path / "out"), str(folder), job, inverter, shard_size=6)
    parts = run.run(0).parts
    expected = sum(part.bytes for part in parts.values()) / 6
    assert found.bytes_per_image == pytest.approx(expected, rel=1e-3)
    assert found.row_bytes == 4 * found.bytes_per_image  # no smaller shards to compare with


def test_a_short_look_is_followed_by_a_longer_one(
    job: JobConfig, tmp_path: Path, face_bytes: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many batches as fill the time at the pace of the first ones, as far as there are any."""
    folder = write_pictures(tmp_path / "in", [face_bytes[0]] * 29)
    inverter = Inverter(job, "cpu")
    asked = []
    original = probing._run

    def run(*args: Any) -> tuple[list[Marker], float]:
        markers, _ = original(*args)
        markers = [replace(each, memory_bytes=10**9 + 10**7 * each.rows) for each in markers]
        asked.append(sum(marker.rows for marker in markers))
        return markers, 0.2 * asked[-1]

    monkeypatch.setattr(probing, "_run", run)
    monkeypatch.setattr(probing, "LEAST_S", 4.0)
    found = probe(job, str(folder), None, "cpu", 256, inverter=inverter)
    assert asked == [3, 12, 21]  # 12 pictures in 2.4 s: four batches, seven fill 4 s
    assert found.images_per_s["total"] == pytest.approx(5)
    assert (found.rows_held, found.row_bytes) == (21, 10**7)


def test_more_pictures_asked_for_than_there_are(
    job: JobConfig, tmp_path: Path, face_bytes: list[bytes]
) -> None:
    folder = write_pictures(tmp_path / "in", face_bytes[:2])
    found = probe(job, str(folder), 100, "cpu", 256)
    assert (found.num_images, found.num_failed) == (3, 1)


def test_nothing_to_probe(job: JobConfig, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    inverter = Inverter(job, "cpu")
    with pytest.raises(ConfigError, match="no pictures in"):
        probe(job, str(tmp_path / "in"), 4, "cpu", 256, inverter=inverter)
    with pytest.raises(ConfigError, match="at least one picture"):
        probe(job, str(tmp_path / "in"), 0, "cpu", 256, inverter=inverter)
    (tmp_path / "in" / "a.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(ShardError, match=r"a\.tar is corrupt"):
        probe(job, str(tmp_path / "in"), 4, "cpu", 256, inverter=inverter)
