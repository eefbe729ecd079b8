"""An answer as files."""

import base64
import csv
import io
import json
import math
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.numpy

from models.errors import ConfigError
from tasks.run.export import export, export_dataset, export_tensor


@pytest.fixture
def table() -> pa.Table:
    return duckdb.sql(
        """SELECT * FROM (VALUES
        ('a,"b"', 0.5, [1.5, -2]::FLOAT[2], {'bytes': '\\x00\\xFF'::BLOB, 'path': 'p'},
        DATE '2024-02-29'),
        ('ü', 'inf'::DOUBLE, NULL, NULL, NULL)) AS t(name, value, code, picture, day)"""
    ).to_arrow_table()


def test_csv(table: pa.Table, tmp_path: Path) -> None:
    export(table, str(tmp_path / "t.csv"))
    first, second = csv.DictReader(io.StringIO((tmp_path / "t.csv").read_text()))
    assert first["name"] == 'a,"b"'
    assert json.loads(first["code"]) == [1.5, -2.0]
    assert json.loads(first["picture"]) == {"bytes": "AP8=", "path": "p"}
    assert first["day"] == "2024-02-29"
    assert list(second.values()) == ["ü", "", "", "", ""]


def test_json(table: pa.Table, tmp_path: Path) -> None:
    export(table, str(tmp_path / "t.json"))
    first, second = json.loads((tmp_path / "t.json").read_text())
    assert first["code"] == [1.5, -2.0]
    assert base64.b64decode(first["picture"]["bytes"]) == b"\x00\xff"
    assert second == {"name": "ü", "value": None, "code": None, "picture": None, "day": None}
    export(table.slice(0, 0), str(tmp_path / "none.json"))
    assert json.loads((tmp_path / "none.json").read_text()) == []


def test_parquet(table: pa.Table, tmp_path: Path) -> None:
    export(table, str(tmp_path / "t.parquet"))
    found = pq.read_table(tmp_path / "t.parquet")
    assert found.to_pylist() == table.to_pylist()
    assert found["value"].to_pylist()[1] == math.inf
    assert found.schema.field("code").type.value_field.name == "element"


def test_unknown_ending(table: pa.Table, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected a name ending in \.csv, \.json, \.parquet"):
        export(table, str(tmp_path / "t.xlsx"))
    with pytest.raises(ConfigError, match=r"there is no folder .*nowhere; make it first"):
        export(table, str(tmp_path / "nowhere" / "t.csv"))


def test_arrow(table: pa.Table, tmp_path: Path) -> None:
    export(table, str(tmp_path / "t.arrow"))
    with pa.OSFile(str(tmp_path / "t.arrow")) as file:
        assert pa.ipc.open_file(file).read_all() == table


@pytest.fixture
def codes() -> pa.Table:
    """Two codes of shape [3, 2], as an answer has them."""
    values = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(12, dtype=np.float32)), 6)
    field = pa.field("w_plus", values.type, metadata={"shape": "[3, 2]"})
    keys = pa.field("sample_key", pa.string())
    return pa.table([["a", "b,c"], values], schema=pa.schema([keys, field]))


def test_tensors_with_their_keys_beside(codes: pa.Table, tmp_path: Path) -> None:
    expected = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    keys = export_tensor(codes, str(tmp_path / "codes.npy"))
    np.testing.assert_array_equal(np.load(tmp_path / "codes.npy"), expected)
    assert Path(keys).name == "codes.keys.csv"
    assert Path(keys).read_text() == 'sample_key\na\n"b,c"\n'
    export_tensor(codes, str(tmp_path / "codes.safetensors"))
    found = safetensors.numpy.load_file(tmp_path / "codes.safetensors")
    np.testing.assert_array_equal(found["w_plus"], expected)


def test_tensors_of_rows_without_a_code_are_refused(codes: pa.Table, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected one column of vectors.*none among sample_key"):
        export_tensor(codes.select(["sample_key"]), str(tmp_path / "codes.npy"))
    gap = codes.take(pa.array([0, 1, None]))
    with pytest.raises(ConfigError, match=r"row 2 has no w_plus.*WHERE status = 'ok'"):
        export_tensor(gap, str(tmp_path / "codes.npy"))
    assert list(tmp_path.iterdir()) == []


def test_a_data_set_that_hugging_face_opens(
    table: pa.Table, tmp_path: Path, face_bytes: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pictures = pa.array([{"bytes": face_bytes[0], "path": None}, None], kind)
    rows = table.select(["name", "value", "code"]).append_column("picture", pictures)
    files = export_dataset(rows, str(tmp_path / "set"))
    assert [Path(file).name for file in files] == ["train-00000-of-00001.parquet"]
    cache = str(tmp_path / "cache")
    found = datasets.load_dataset(str(tmp_path / "set"), split="train", cache_dir=cache)
    assert found[0]["picture"].size == (48, 48)
    assert found["name"][:] == ['a,"b"', "ü"]
    assert found["code"][:] == [[1.5, -2.0], None]
    with pytest.raises(ConfigError, match="holds a data set already"):
        export_dataset(rows, str(tmp_path / "set"))
