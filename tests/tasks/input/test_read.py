"""The three kinds of input give the same pictures, from every store."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tasks.input.read import RawSample, read_shard
from tasks.job import InputConfig
from tasks.run.manifest import plan_shards
from tasks.storage import files as storage
from tests.tasks.input_files import LANDMARKS, write_inputs

ALIGN = InputConfig(fit="align", detector="package.module:function")


@pytest.fixture
def folder(tmp_path: Path, face_bytes: list[bytes]) -> Path:
    write_inputs(tmp_path / "in", face_bytes)
    return tmp_path / "in"


def read_all(uri: str, config: InputConfig, shard_size: int = 3) -> Iterator[RawSample]:
    for spec in plan_shards(uri, shard_size, input=config):
        yield from read_shard(spec, config)


@pytest.mark.parametrize(
    ("name", "key", "place"),
    [
        ("loose", "{:03d}.png", "/loose/{:03d}.png"),
        ("data.tar", "data.tar:{:03d}", "/data.tar#{:03d}.png"),
        ("data.tar.gz", "data.tar.gz:{:03d}", "/data.tar.gz#{:03d}.png"),
        ("data.parquet", "data.parquet:{}", "/data.parquet#row={}"),
    ],
)
@pytest.mark.parametrize("shard_size", [1, 3, 4, 100])
def test_keys_places_and_bytes(
    name: str, key: str, place: str, shard_size: int, folder: Path, face_bytes: list[bytes]
) -> None:
    found = list(read_all(str(folder / name), ALIGN, shard_size))
    assert [sample.data for sample in found] == face_bytes
    assert [sample.key for sample in found] == [key.format(i) for i in range(8)]
    assert [sample.uri for sample in found] == [str(folder) + place.format(i) for i in range(8)]
    assert all(sample.error is None for sample in found)
    for sample in found:
        if name == "loose":
            assert sample.landmarks is None
        else:
            expected = np.array(LANDMARKS, np.float32).reshape(5, 2)
            np.testing.assert_array_equal(sample.landmarks, expected)


def test_landmarks_are_read_only_to_align(folder: Path) -> None:
    for name in ("data.tar", "data.parquet"):
        found = read_all(str(folder / name), InputConfig())
        assert [sample.landmarks for sample in found] == [None] * 8


def test_s3_gives_the_same_samples_as_local_files(folder: Path, s3: str) -> None:
    for name, _, _ in storage.list_files(str(folder)):
        storage.write_bytes(f"{s3}/in/{name}", (folder / name).read_bytes())
    for name in ("loose", "data.tar", "data.tar.gz", "data.parquet"):
        local = list(read_all(str(folder / name), ALIGN))
        remote = list(read_all(f"{s3}/in/{name}", ALIGN))
        assert len(local) == 8
        for a, b in zip(local, remote, strict=True):
            assert (a.key, a.data) == (b.key, b.data)
            assert b.uri == f"{s3}/in" + a.uri.removeprefix(str(folder))
            np.testing.assert_array_equal(a.landmarks, b.landmarks)


def test_a_mixed_prefix_has_no_key_twice(folder: Path) -> None:
    write_inputs(folder / "again", [b"x"] * 8)
    found = [sample.key for sample in read_all(str(folder), InputConfig())]
    assert len(found) == 64
    assert len(set(found)) == 64
    assert "again/data.tar:003" in found
    assert "again/data.parquet:3" in found


def test_limit_reads_the_first_samples(folder: Path, face_bytes: list[bytes]) -> None:
    for name in ("loose", "data.tar", "data.parquet"):
        for limit in (1, 4, 8):
            specs = plan_shards(str(folder / name), 3, limit)
            found = [s.data for spec in specs for s in read_shard(spec, InputConfig())]
            assert found == face_bytes[:limit]
