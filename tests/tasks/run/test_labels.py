"""Labels by sample key: every kind of file, and what is said when they do not fit the run."""

import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from models.errors import AssetError, ConfigError
from tasks.run.labels import joined, read_labels


def test_keys_from_a_column(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("key,age,smile\nx.png,31,0.5\ny.png,,1\n7,40,0\n")
    found = read_labels([str(tmp_path / "a.csv")], ["age", "smile"], "key")
    assert found["x.png"] == {"age": 31.0, "smile": 0.5}
    assert math.isnan(found["y.png"]["age"])
    assert found["y.png"]["smile"] == 1.0
    assert set(found) == {"x.png", "y.png", "7"}
    pq.write_table(pa.table({"id": [3, 4], "old": [True, None]}), tmp_path / "b.parquet")
    found = read_labels([str(tmp_path / "b.parquet")], ["old"], "id")
    assert found["3"] == {"old": 1.0}
    assert math.isnan(found["4"]["old"])


def test_keys_from_file_and_row(tmp_path: Path) -> None:
    """As a run over one file, and as one over a folder, names its samples."""
    (tmp_path / "sub").mkdir()
    for name, first in (("b.parquet", 10), ("sub/a.parquet", 20)):
        pq.write_table(pa.table({"age": [first, first + 1]}), tmp_path / name)
    (tmp_path / "notes.txt").write_text("no labels")
    found = read_labels([str(tmp_path)], ["age"], None)
    assert {key: row["age"] for key, row in found.items()} == {
        "b.parquet:0": 10.0,
        "b.parquet:1": 11.0,
        "sub/a.parquet:0": 20.0,
        "sub/a.parquet:1": 21.0,
    }
    alone = read_labels([str(tmp_path / "sub/a.parquet")], ["age"], None)
    assert list(alone) == ["a.parquet:0", "a.parquet:1"]


def test_remote_files(s3: str) -> None:
    from tasks.storage.files import join, write_bytes

    write_bytes(join(s3, "labels/a.csv"), b"key,age\nx,5\n")
    found = read_labels([join(s3, "labels")], ["age"], "key")
    assert found == {"x": {"age": 5.0}}


def test_the_join_keeps_the_order_of_the_samples() -> None:
    labels = {"a": {"age": 1.0}, "b": {"age": 2.0}}
    assert joined(labels, ["b", "c", "a"], "run") == [{"age": 2.0}, None, {"age": 1.0}]
    with pytest.raises(
        ConfigError, match=r"none of the 2 keys is a sample of run: .* like 'a', .* like 'c'"
    ):
        joined(labels, ["c", "d"], "run")


def test_what_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"age": [1, 2], "name": ["x", "x"]}), path)
    with pytest.raises(ConfigError, match="no column 'smile'; it has age, name"):
        read_labels([str(path)], ["smile"], None)
    with pytest.raises(ConfigError, match="column 'name' is string; expected numbers"):
        read_labels([str(path)], ["name"], None)
    with pytest.raises(ConfigError, match="the key 'x' is there twice"):
        read_labels([str(path)], ["age"], "name")
    with pytest.raises(AssetError, match="no such folder, or no file in it that ends in"):
        read_labels([str(tmp_path / "none")], ["age"], None)
    for name in ("none.parquet", "none.csv"):
        with pytest.raises(AssetError, match=name):
            read_labels([str(tmp_path / name)], ["age"], None)
    path.write_bytes(b"PAR1 damaged PAR1")
    with pytest.raises(AssetError, match=r"a\.parquet"):
        read_labels([str(path)], ["age"], None)
