"""Parquet: only what is needed is read; nulls are failed samples, damage is a failed shard."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from models.errors import ShardError
from tasks.input import parquet
from tasks.input.sample import CorruptFileError, RawSample
from tasks.job import InputConfig, ShardSpec
from tests.tasks.input_files import LANDMARKS


def write(path: Path, columns: dict[str, Any], group: int = 4) -> Path:
    pq.write_table(pa.table(columns), path, row_group_size=group)
    return path


def read(
    path: Path, start: int = 0, stop: int = 0, name: str | None = None, **settings: Any
) -> list[RawSample]:
    spec = ShardSpec(
        id=0,
        kind="parquet",
        uri=str(path),
        members=() if name is None else (name,),
        row_start=start,
        row_stop=stop,
    )
    return list(parquet.read_parquet(spec, InputConfig(**settings)))


@pytest.mark.parametrize(
    "kind",
    [
        pa.binary(),
        pa.large_binary(),
        pa.binary_view(),
        pa.binary(2),
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
        pa.struct([("path", pa.string()), ("bytes", pa.large_binary())]),
    ],
    ids=str,
)
def test_every_type_of_image_column(kind: pa.DataType, tmp_path: Path) -> None:
    values: list[Any] = [b"p%d" % index for index in range(10)]
    if pa.types.is_struct(kind):
        values = [{"bytes": value, "path": "x"} for value in values]
    path = write(tmp_path / "a.parquet", {"image": pa.array(values, kind)})
    for start, stop in ((0, 0), (0, 10), (3, 9), (4, 8), (5, 6), (9, 10)):
        found = read(path, start, stop)
        wanted = range(start, stop or 10)
        assert [sample.data for sample in found] == [b"p%d" % index for index in wanted]
        assert [sample.key for sample in found] == [f"a.parquet:{index}" for index in wanted]


def test_only_the_needed_row_groups_and_columns_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = {"image": [b"x"] * 12, "other": list(range(12)), "id": [str(i) for i in range(12)]}
    path = write(tmp_path / "a.parquet", columns)
    asked = []
    original = pq.ParquetFile.iter_batches

    def iter_batches(self: pq.ParquetFile, size: int, **options: Any) -> Any:
        asked.append((options["row_groups"], options["columns"]))
        return original(self, size, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", iter_batches)
    assert len(read(path, 5, 9, key_column="id")) == 4
    assert asked == [([1], ["image", "id"]), ([2], ["image", "id"])]


def test_nulls_are_failed_samples(tmp_path: Path) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    values = [
        {"bytes": b"x", "path": None},
        None,
        {"bytes": None, "path": None},
        {"bytes": None, "path": "dir/a.png"},
        {"bytes": b"", "path": None},
    ]
    found = read(write(tmp_path / "a.parquet", {"image": pa.array(values, kind)}))
    assert [sample.data for sample in found] == [b"x", None, None, None, b""]
    reasons = [str(sample.error) for sample in found[1:4]]
    assert reasons == [
        "the picture is null",
        "the picture is null",
        "no bytes in the row, only the path 'dir/a.png'",
    ]
    assert {sample.error.kind for sample in found if sample.error} == {"read"}


def test_keys_from_a_column(tmp_path: Path) -> None:
    columns = {"image": [b"x"] * 3, "id": [30, 10, 20], "s": ["a", "b", "a"], "n": ["a", None, "b"]}
    path = write(tmp_path / "a.parquet", columns)
    assert [sample.key for sample in read(path, key_column="id")] == ["30", "10", "20"]
    assert [sample.key for sample in read(path, name="in/a.parquet")][2] == "in/a.parquet:2"
    with pytest.raises(ShardError, match=r"row 2: column 's' 'a' is there twice"):
        read(path, key_column="s")
    with pytest.raises(ShardError, match=r"row 1: column 'n' is null"):
        read(path, key_column="n")


def test_keys_that_are_not_utf8_are_a_corrupt_file(tmp_path: Path) -> None:
    offsets = pa.py_buffer(np.array([0, 1, 2], np.int32))
    keys = pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"a\xff")])
    path = write(tmp_path / "a.parquet", {"image": [b"x"] * 2, "id": keys})
    with pytest.raises(CorruptFileError, match=r"a\.parquet is corrupt"):
        read(path, key_column="id")


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.float32()), pa.list_(pa.float64(), 10), pa.list_(pa.list_(pa.float64()))]
)
def test_landmarks(kind: pa.DataType, tmp_path: Path) -> None:
    pairs = np.reshape(LANDMARKS, (5, 2)).tolist()
    value = pairs if "list<" in str(kind.value_type) else LANDMARKS
    columns = {"image": [b"x"] * 2, "landmarks5": pa.array([value, None], kind)}
    found = read(write(tmp_path / "a.parquet", columns), fit="align")
    np.testing.assert_allclose(found[0].landmarks, np.reshape(LANDMARKS, (5, 2)), rtol=1e-6)
    assert found[1].landmarks is None


def test_bad_landmarks_are_failed_samples(tmp_path: Path) -> None:
    columns = {"image": [b"x", b"y"], "landmarks5": [LANDMARKS[:8], LANDMARKS]}
    found = read(write(tmp_path / "a.parquet", columns), fit="align")
    assert found[0].error is not None
    assert found[0].error.kind == "align"
    assert "shape [8]; expected five (x, y) pairs" in str(found[0].error)
    assert found[1].data == b"y"


def test_missing_column_names_those_there_are(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"picture": [b"x"], "age": [3]})
    with pytest.raises(ShardError, match=r"no column 'image'; it has picture, age\."):
        read(path)


def test_file_that_shrank_since_planning(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"image": [b"x"] * 3})
    with pytest.raises(ShardError, match="has 3 rows; the plan says 5"):
        read(path, 0, 5)


def test_damage(tmp_path: Path) -> None:
    rows = [np.random.default_rng(i).bytes(2000) for i in range(8)]
    data = write(tmp_path / "a.parquet", {"image": rows}).read_bytes()
    path = tmp_path / "bad.parquet"
    page = bytearray(data)
    page[4:40] = bytes(36)  # the first page's header
    for damaged in (b"", b"PAR1", data[:-6], data[: len(data) // 2], b"x" * 500, bytes(page)):
        path.write_bytes(damaged)
        with pytest.raises(ShardError, match=r"bad\.parquet is corrupt"):
            read(path)
    with pytest.raises(ShardError, match=r"none\.parquet: there is no such file"):
        read(tmp_path / "none.parquet")
