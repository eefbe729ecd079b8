"""Stored pictures by key, and thumbnails that are made once."""

import io
import logging
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tasks.browse.pictures import FOLDER, SIDE_PX, Pictures, media_type, reduced
from tasks.run import ledger
from tasks.run.marker import Part
from tasks.run.rows import Row
from tests.tasks.report.test_report import make_rows, make_run

HOSTILE = ("../../etc/passwd", "a'b\"<c>", "עברית", "\U0001f600")


def small_run(uri: str, size: int) -> str:
    def rows_of(shard: int) -> list[Row]:
        rows = make_rows(shard, "face-", "broken", size)
        for row, key in zip(rows, HOSTILE, strict=False):
            row.sample_key = f"{key}{shard}"
        return sorted(rows, key=lambda row: row.sample_key)

    return make_run(uri, shards=2, rows_of=rows_of)


def shape(encoded: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(encoded)) as image:
        return image.size


def test_small_pictures_are_their_own_thumbnails(tmp_path: Path) -> None:
    uri = small_run(str(tmp_path / "run"), 64)
    pictures = Pictures(uri, ledger.read_markers(uri))

    for shard in (0, 1):
        for key in HOSTILE:
            stored = pictures.stored(shard, f"{key}{shard}", "inversion")
            assert stored is not None
            assert pictures.thumbnail(shard, f"{key}{shard}", "inversion") == stored
            assert pictures.stored(1 - shard, f"{key}{shard}", "inversion") is None
    assert pictures.stored(0, "nobody", "inversion") is None
    assert pictures.stored(0, f"{HOSTILE[0]}0", "no such column") is None
    assert pictures.stored(99, f"{HOSTILE[0]}0", "inversion") is None
    assert not (tmp_path / "run" / FOLDER).exists()


def test_large_ones_are_reduced_once_and_kept_beside_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = small_run(str(tmp_path / "run"), 400)
    key = f"{HOSTILE[0]}0"
    first = Pictures(uri, ledger.read_markers(uri)).thumbnail(0, key, "input")

    assert first is not None
    assert shape(first) == (SIDE_PX, SIDE_PX)
    kept = sorted(path.name for path in (tmp_path / "run" / FOLDER).iterdir())
    assert kept == ["00000-a0-1-0.parquet"]
    # Where they are kept nothing is decoded again.
    monkeypatch.setattr("tasks.browse.pictures.reduced", None)
    again = Pictures(uri, ledger.read_markers(uri))
    assert again.thumbnail(0, key, "input") == first
    assert not (tmp_path / "etc").exists()


def test_keys_are_found_in_a_part_that_is_not_sorted(tmp_path: Path) -> None:
    """Row groups may overlap where several shards stand in one part."""
    keys = ["a", "z", "b", "y"]
    pictures = [{"bytes": b"\x89PNG\r\n" + key.encode(), "path": key} for key in keys]
    path = tmp_path / "images/all.parquet"
    path.parent.mkdir()
    pq.write_table(pa.table({"sample_key": keys, "input": pictures}), path, row_group_size=2)
    part = Part(path="images/all.parquet", rows=4, bytes=path.stat().st_size, sha256="00" * 32)
    uri = small_run(str(tmp_path), 64)
    marker = replace(ledger.read_markers(uri)[0], parts={"images": part})

    found = Pictures(uri, {0: marker})

    assert [found.stored(0, key, "input") for key in keys] == [p["bytes"] for p in pictures]


@pytest.mark.parametrize("store", ["folder", "memory"])
def test_a_store_that_cannot_be_written_keeps_them_in_memory(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    store: str,
) -> None:
    place = str(tmp_path / "run") if store == "folder" else "memory://browse-pictures/run"
    uri = small_run(place, 400)

    def refuse(*args: object, **options: object) -> None:
        from models.errors import LedgerError

        raise LedgerError("read-only")

    monkeypatch.setattr("tasks.browse.pictures.write_bytes", refuse)
    pictures = Pictures(uri, ledger.read_markers(uri))
    try:
        with caplog.at_level(logging.WARNING):
            found = [pictures.thumbnail(0, f"{HOSTILE[0]}0", "input") for _ in range(3)]
        assert found[0] is not None
        assert found[0] is found[1] is found[2]
        assert [record.message for record in caplog.records] == [
            "thumbnails are kept in memory only: read-only"
        ]
    finally:
        if store == "memory":
            fsspec.filesystem("memory").rm("/browse-pictures", recursive=True)


def test_what_is_no_picture_is_none() -> None:
    assert reduced(b"<svg onload=alert(1)>") is None
    assert media_type(b"<html>") is None
    assert media_type(b"") is None
    buffer = io.BytesIO()
    Image.new("RGBA", (600, 300), (255, 0, 0, 128)).save(buffer, "PNG")
    small = reduced(buffer.getvalue())
    assert small is not None
    assert media_type(small) == "image/webp"
    assert shape(small) == (SIDE_PX, SIDE_PX // 2)
    with Image.open(io.BytesIO(small)) as image:
        middle = np.asarray(image.convert("RGB"))[48, 96].astype(int)
    np.testing.assert_allclose(middle, (255, 127, 127), atol=6)  # laid on white
