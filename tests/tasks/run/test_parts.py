"""Layout and bytes of the parts, and who can open them."""

import io
import json
from pathlib import Path

import duckdb
import numpy as np
import pandas
import polars
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pyarrow.dataset import dataset

from models.errors import ShardError
from tasks.job import OutputConfig
from tasks.run.parts import (
    Layout,
    images_table,
    latents_table,
    residuals_table,
    to_npy,
    to_parquet,
    write_parts,
)
from tasks.run.rows import Row, encode_picture
from tasks.run.run_json import RunHandle

SHAPE = (6, 16)


def make_layout(**output: object) -> Layout:
    return Layout(
        method="e4e+wplus",
        metrics=("mse", "trunk_distance"),
        shape=SHAPE,
        output=OutputConfig(**output),
    )


def make_rows(count: int = 5, failed: tuple[int, ...] = (2,), doors: bool = False) -> list[Row]:
    """Rows k4, k3, ... (not sorted), some failed."""
    rows = []
    for index in reversed(range(count)):
        rng = np.random.default_rng(index)
        row = Row(sample_key=f"k{index}", image_uri=f"in/k{index}", image_sha256="ab", seed=2**62)
        if index in failed:
            row.fail("decode", "cut off")
            rows.append(row)
            continue
        row.w_plus = rng.standard_normal(SHAPE).astype(np.float32)
        row.metrics = {"mse": index / 10, "trunk_distance": 0.5}
        pixels = np.full((4, 4, 3), index * 10 % 256, np.uint8)
        row.pictures = {name: encode_picture(pixels, "png") for name in ("input", "inversion")}
        if doors:
            row.doors = {"noise_0": rng.standard_normal((1, 4, 4)).astype(np.float16)}
        rows.append(row)
    return rows


@pytest.fixture
def handle(tmp_path: Path) -> RunHandle:
    return RunHandle(uri=str(tmp_path), run_id="r1")


@pytest.fixture
def files(handle: RunHandle) -> dict[str, str]:
    """Paths of the three parts of five rows."""
    parts = write_parts(make_rows(doors=True), make_layout(), handle, 3, "abc")
    return {kind: f"{handle.uri}/{part.path}" for kind, part in parts.items()}


def test_columns(files: dict[str, str]) -> None:
    assert files["latents"].endswith("/latents/00003-abc.parquet")
    table = pq.read_table(files["latents"])
    assert table.column_names == [
        "sample_key",
        "image_uri",
        "image_sha256",
        "status",
        "error_kind",
        "error",
        "method",
        "w_plus",
        "mse",
        "trunk_distance",
        "seed",
        "run_id",
    ]
    assert table["sample_key"].to_pylist() == ["k0", "k1", "k2", "k3", "k4"]
    field = table.schema.field("w_plus")
    assert field.type == pa.list_(pa.float32(), 96)
    assert json.loads(field.metadata[b"shape"]) == [6, 16]
    expected = {row.sample_key: row.w_plus for row in make_rows()}
    for key, value in zip(
        table["sample_key"].to_pylist(), table["w_plus"].to_pylist(), strict=True
    ):
        if key == "k2":
            assert value is None
        else:
            np.testing.assert_array_equal(np.float32(value), expected[key].reshape(-1))
    assert table["mse"].to_pylist()[2] is None
    assert table["mse"].to_pylist()[4] == np.float32(0.4)
    assert table["status"].to_pylist() == ["ok", "ok", "failed", "ok", "ok"]
    assert table["seed"].to_pylist() == [2**62] * 5
    assert pq.read_table(files["images"])["sample_key"].to_pylist() == ["k0", "k1", "k3", "k4"]
    assert pq.read_table(files["residuals"]).column_names == ["sample_key", "noise_0"]


def test_encodings(files: dict[str, str]) -> None:
    def column(kind: str, path: str) -> pq.ColumnChunkMetaData:
        group = pq.ParquetFile(files[kind]).metadata.row_group(0)
        chunks = [group.column(i) for i in range(group.num_columns)]
        return next(chunk for chunk in chunks if chunk.path_in_schema == path)

    codes = column("latents", "w_plus.list.element")
    assert (codes.compression, codes.statistics) == ("UNCOMPRESSED", None)
    assert set(codes.encodings) == {"RLE", "PLAIN"}
    key = column("latents", "sample_key")
    assert (key.statistics.min, key.statistics.max) == ("k0", "k4")
    assert key.has_offset_index
    assert column("images", "input.bytes").compression == "UNCOMPRESSED"
    assert column("images", "sample_key").statistics.max == "k4"
    noise = column("residuals", "noise_0.list.element")
    assert noise.compression == "ZSTD"
    assert "BYTE_STREAM_SPLIT" not in noise.encodings


def test_the_footer_says_order_and_shape(files: dict[str, str]) -> None:
    footer = pq.ParquetFile(files["latents"]).metadata
    assert json.loads(footer.metadata[b"w_plus_shape"]) == [6, 16]
    for kind in ("latents", "images", "residuals"):
        footer = pq.ParquetFile(files[kind]).metadata
        order = footer.row_group(0).sorting_columns
        assert [footer.schema.column(each.column_index).path for each in order] == ["sample_key"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_readers_of_folders_open_latents_as_it_is(
    files: dict[str, str], handle: RunHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_rows(3)
    for row in rows:
        row.sample_key = f"m{row.sample_key}"
    write_parts(rows, make_layout(), handle, 4, "def")
    keys = ["k0", "k1", "k2", "k3", "k4", "mk0", "mk1", "mk2"]
    folder = str(Path(files["latents"]).parent)
    found = dataset(folder, format="parquet").to_table().sort_by("sample_key")
    assert found["sample_key"].to_pylist() == keys
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    cache = f"{handle.uri}/hf"
    loaded = datasets.load_dataset(folder, split="train", cache_dir=cache)
    assert sorted(loaded["sample_key"]) == keys
    assert loaded.features["w_plus"] == datasets.List(datasets.Value("float32"), length=96)


def test_half_precision_codes(tmp_path: Path, handle: RunHandle) -> None:
    layout = make_layout(latents="float16")
    part = write_parts(make_rows(), layout, handle, 0, "a")["latents"]
    path = f"{handle.uri}/{part.path}"
    field = pq.read_schema(path).field("w_plus")
    assert field.type == pa.list_(pa.float16(), 96)
    found = duckdb.sql(f"SELECT w_plus FROM '{path}' WHERE sample_key = 'k4'").fetchall()[0][0]
    np.testing.assert_allclose(found, make_rows()[0].w_plus.reshape(-1), rtol=5e-4)


def test_same_rows_same_bytes(handle: RunHandle) -> None:
    rows = make_rows(doors=True)
    first = write_parts(rows, make_layout(), handle, 3, "one")
    second = write_parts(rows[::-1], make_layout(), handle, 4, "two")
    assert [part.sha256 for part in first.values()] == [part.sha256 for part in second.values()]
    assert first["latents"].path != second["latents"].path


RECORDED = (
    "26.0.1",
    {
        "latents": "61f0ecc5582733db329657c6cc411375b0cd005e976c4abb3eb2d9dee6758a9d",
        "images": "67dca73b6c4de010d56e91a8adcc1ab52781ab9745889071f69d89dbda6801ea",
        "residuals": "270d1945627240dd1ddfd0f8974db14c69a557ad3b141956b3c07d14382814a7",
    },
)
"""PyArrow of constraints.txt, and the parts of these rows."""


@pytest.mark.skipif(pa.__version__ != RECORDED[0], reason=f"recorded with PyArrow {RECORDED[0]}")
def test_parts_are_those_that_were_recorded(handle: RunHandle) -> None:
    """A refactor leaves every byte as it was."""
    made = write_parts(make_rows(doors=True), make_layout(), handle, 3, "one")
    assert {kind: part.sha256 for kind, part in made.items()} == RECORDED[1]


def test_vectors_are_what_numpy_saves() -> None:
    rows = np.random.default_rng(0).standard_normal((7, 1280)).astype(np.float16)
    saved = io.BytesIO()
    np.save(saved, rows)
    assert to_npy(list(rows)) == saved.getvalue()


@pytest.mark.parametrize(
    ("shape", "rows"), [((1, 512), 1024), ((18, 512), 128), ((10, 128), 1024), ((14, 512), 256)]
)
def test_row_groups_of_codes(shape: tuple[int, int], rows: int) -> None:
    count = 1100
    flat = np.zeros(count * shape[0] * shape[1], np.float32)
    codes = pa.FixedSizeListArray.from_arrays(pa.array(flat), shape[0] * shape[1])
    table = pa.table({"sample_key": [f"{i:05d}" for i in range(count)], "w_plus": codes})
    file = pq.ParquetFile(io.BytesIO(to_parquet(table, "latents")))
    assert file.metadata.row_group(0).num_rows == rows


def test_row_groups_of_pictures() -> None:
    rows = make_rows(300, failed=())
    file = pq.ParquetFile(io.BytesIO(to_parquet(images_table(rows, make_layout()), "images")))
    assert [file.metadata.row_group(i).num_rows for i in range(3)] == [128, 128, 44]


def test_a_part_without_rows_is_not_written(handle: RunHandle) -> None:
    assert write_parts([], make_layout(), handle, 0, "a") == {}
    all_failed = make_rows(2, failed=(0, 1))
    assert list(write_parts(all_failed, make_layout(), handle, 1, "a")) == ["latents"]
    assert list(write_parts(make_rows(), make_layout(pictures=()), handle, 2, "a")) == ["latents"]


def test_two_samples_of_one_key(handle: RunHandle) -> None:
    rows = make_rows()
    rows[0].sample_key = "k1"
    with pytest.raises(ShardError, match=r"shard 00007: two samples have the key 'k1' \(in/k"):
        write_parts(rows, make_layout(), handle, 7, "a")
    assert not list(Path(handle.uri).rglob("*.parquet"))


@pytest.mark.parametrize(("name", "exact"), [("png", True), ("webp", True), ("jpeg", False)])
def test_picture_formats(name: str, exact: bool) -> None:
    grid = np.linspace(0, 255, 32 * 32 * 3).reshape(32, 32, 3).astype(np.uint8)
    data = encode_picture(grid, name)
    assert data == encode_picture(grid, name)
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.format == name.upper()
        difference = np.abs(np.asarray(picture).astype(int) - grid).max()
    assert difference == 0 if exact else 0 < difference < 16


def test_duckdb_opens_all(files: dict[str, str]) -> None:
    found = duckdb.sql(
        f"""SELECT l.sample_key, len(w_plus), octet_length(i.inversion.bytes), len(r.noise_0)
        FROM '{files["latents"]}' l LEFT JOIN '{files["images"]}' i USING (sample_key)
        LEFT JOIN '{files["residuals"]}' r USING (sample_key) ORDER BY 1"""
    ).fetchall()
    size = len(encode_picture(np.zeros((4, 4, 3), np.uint8), "png"))
    assert found[0] == ("k0", 96, size, 16)
    assert found[2] == ("k2", None, None, None)


def test_pandas_opens_all(files: dict[str, str]) -> None:
    frame = pandas.read_parquet(files["latents"])
    assert frame["w_plus"][0].shape == (96,)
    assert frame["w_plus"].isna().tolist() == [False, False, True, False, False]
    assert frame["mse"].sum() == pytest.approx(0.8)
    pictures = pandas.read_parquet(files["images"])
    assert Image.open(io.BytesIO(pictures["input"][3]["bytes"])).getpixel((0, 0)) == (40, 40, 40)
    assert pandas.read_parquet(files["residuals"])["noise_0"][0].dtype == np.float16


def test_polars_opens_all(files: dict[str, str]) -> None:
    frame = polars.read_parquet(files["latents"])
    assert frame.schema["w_plus"] == polars.Array(polars.Float32, 96)
    assert frame["w_plus"].null_count() == 1
    assert frame["mse"].sum() == pytest.approx(0.8)
    pictures = polars.read_parquet(files["images"])
    assert pictures["inversion"].struct.field("path").to_list()[0] == "k0.inversion.png"
    assert polars.read_parquet(files["residuals"]).height == 4


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_datasets_opens_all_and_decodes_pictures(
    files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    datasets.disable_progress_bars()

    def load(kind: str) -> datasets.Dataset:
        return datasets.load_dataset(
            "parquet", data_files=files[kind], split="train", cache_dir=str(tmp_path / "hf")
        )

    codes = load("latents")
    assert codes.features["w_plus"] == datasets.List(datasets.Value("float32"), length=96)
    assert len(codes[0]["w_plus"]) == 96
    assert codes[2]["w_plus"] is None
    assert codes[2]["status"] == "failed"
    pictures = load("images")
    assert pictures.features["input"] == datasets.Image()
    assert pictures[3]["inversion"].getpixel((1, 1)) == (40, 40, 40)
    assert len(load("residuals")[0]["noise_0"]) == 16


def test_tables_hold_no_trace_of_the_attempt() -> None:
    rows, layout = make_rows(doors=True), make_layout()
    good = [row for row in rows if row.error_kind is None]
    tables = [
        latents_table(rows, layout, "r1"),
        images_table(good, layout),
        residuals_table(good),
    ]
    for table, kind in zip(tables, ("latents", "images", "residuals"), strict=True):
        keys = set(pq.ParquetFile(io.BytesIO(to_parquet(table, kind))).metadata.metadata or {})
        assert keys <= {b"huggingface", b"ARROW:schema", b"w_plus_shape"}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_code_is_one_read(tmp_path: Path, handle: RunHandle, dtype: str) -> None:
    """The promise of `layout` = `rows`: the last bytes of the chunk, without the failed rows."""
    layout = make_layout(latents=dtype)
    rows = make_rows()
    part = write_parts(rows, layout, handle, 0, "a")["latents"]
    data = Path(handle.uri, part.path).read_bytes()
    file = pq.ParquetFile(pa.BufferReader(data))
    assert file.schema_arrow.field("w_plus").metadata[b"layout"] == b"rows"
    group = file.metadata.row_group(0)
    (chunk,) = (
        c for c in map(group.column, range(group.num_columns)) if "w_plus" in c.path_in_schema
    )
    end = chunk.data_page_offset + chunk.total_compressed_size
    good = [row for row in sorted(rows, key=lambda row: row.sample_key) if row.w_plus is not None]
    assert 0 < len(good) < len(rows)
    expected = np.stack([row.w_plus for row in good]).astype(dtype)
    found = np.frombuffer(data[end - expected.nbytes : end], dtype).reshape(expected.shape)
    np.testing.assert_array_equal(found, expected)
