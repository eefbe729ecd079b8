"""A run opened in Python."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader

import tasks
from models.checkpoints.load import load_generator
from models.errors import AssetError, ConfigError, LedgerError
from models.pictures import to_bytes
from tasks import open_run
from tasks.run import lookup
from tasks.run.metadata import write_metadata
from tasks.run.query import query
from tasks.run.stored import read_inversions
from tests.conftest import ROOT, make_tiny_generator
from tests.e2e.small_dataset import Dataset, run_inline


@pytest.fixture(scope="module", params=["float32", "float16"])
def uri(
    dataset: Dataset, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> str:
    """A sealed run of twelve samples, one of them failed, in six shards."""
    found = str(tmp_path_factory.mktemp("run") / "run")
    run_inline(dataset, found, f"output.latents={request.param}")
    return found


def stored(uri: str) -> dict[str, np.ndarray]:
    """Codes by key, as pyarrow reads the parts."""
    parts = [pq.read_table(path) for path in sorted(Path(uri, "latents").iterdir())]
    rows = [row for part in parts for row in part.to_pylist() if row["status"] == "ok"]
    return {r["sample_key"]: np.array(r["w_plus"], np.float32).reshape(8, 16) for r in rows}


def test_codes(uri: str) -> None:
    run, expected = open_run(uri), stored(uri)
    assert run.keys() == sorted(expected)
    assert len(run) == 12
    np.testing.assert_array_equal(run.code("face-04.png"), expected["face-04.png"])
    keys = ["face-09.png", "face-02.png", "face-09.png"]
    np.testing.assert_array_equal(run.codes(keys), np.stack([expected[key] for key in keys]))
    np.testing.assert_array_equal(run.codes(), np.stack(list(expected.values())))
    assert run.codes().dtype == np.float32
    assert run.codes([]).shape == (0, 8, 16)


def test_a_code_reads_its_own_bytes_alone(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run = open_run(uri)
    assert run.snapshot.codes is not None
    row_bytes = run.snapshot.codes.row_bytes
    read: list[int] = []
    original = lookup.read_range

    def count(uri: str, start: int, stop: int) -> bytes:
        read.append(stop - start)
        return original(uri, start, stop)

    monkeypatch.setattr(lookup, "read_range", count)
    run.code("face-04.png")
    assert read == [row_bytes]
    read.clear()
    sql = "SELECT sample_key, w_plus FROM latents WHERE status = 'ok' ORDER BY mse LIMIT 3"
    assert query(uri, sql).num_rows == 3
    assert sum(read) == 3 * row_bytes


def test_codes_of_parts_of_the_layout_before(uri: str, tmp_path: Path) -> None:
    """Compressed codes, which are no row of bytes: their row group is read."""
    import shutil

    old = tmp_path / "run"
    shutil.copytree(uri, old, ignore=shutil.ignore_patterns("metadata"))
    for path in sorted((old / "latents").iterdir()):
        table = pq.read_table(path)
        at = table.column_names.index("w_plus")
        field = table.schema.field(at)
        plain = field.with_metadata({b"shape": field.metadata[b"shape"]})
        pq.write_table(table.set_column(at, plain, table["w_plus"]), path, compression="zstd")
        marker = old / "commits" / f"{path.name[:5]}.json"
        found = next(Path(uri, "latents").glob(path.name)).stat().st_size
        marker.write_text(
            marker.read_text().replace(f'"bytes": {found},', f'"bytes": {path.stat().st_size},')
        )
    expected = stored(uri)
    for is_written in (False, True):
        if is_written:
            write_metadata(str(old))
        run = open_run(str(old))
        keys = ["face-08.png", "face-01.png"]
        np.testing.assert_array_equal(run.codes(keys), np.stack([expected[key] for key in keys]))
        np.testing.assert_array_equal(run.codes(), np.stack(list(expected.values())))


def test_rows(uri: str) -> None:
    run = open_run(uri)
    frame = run.pandas("SELECT sample_key, mse FROM samples WHERE mse > $least", least=0)
    assert isinstance(frame, pd.DataFrame)
    assert len(frame) == 11
    polars = run.polars("SELECT count(*) AS n FROM samples")
    assert isinstance(polars, pl.DataFrame)
    assert polars["n"].to_list() == [12]
    assert run.query().num_rows == 12
    mean = run.relation("SELECT * FROM samples").filter("status = 'ok'").aggregate("avg(mse) AS m")
    assert mean.to_arrow_table()["m"][0].as_py() == pytest.approx(frame["mse"].mean())


def test_pictures_and_inversions(uri: str, dataset: Dataset) -> None:
    run = open_run(uri)
    keys = ["face-03.png", "face-00.png"]
    pictures = run.pictures(keys)
    assert (pictures.shape, pictures.dtype) == ((2, 32, 32, 3), np.uint8)
    assert len(run.encoded(keys, "input")) == 2
    generator = make_tiny_generator()
    drawn = {
        key: image
        for batch in run.inversions(generator)
        for key, image in zip(
            batch.sample_keys, to_bytes(batch.inversion.render(generator)).numpy(), strict=True
        )
    }
    assert sorted(drawn) == run.keys()
    for key, picture in zip(keys, pictures, strict=True):
        # Of codes in half precision another level here and there: they were not scored as stored.
        assert np.abs(drawn[key].astype(int) - picture).max() <= 1
    with pytest.raises(ConfigError, match=r"no pictures 'inversions', only input, inversion"):
        run.pictures(keys, "inversions")
    with pytest.raises(AssetError, match="was made with generator"):
        next(iter(run.inversions(make_tiny_generator(seed=1))))


def test_keys_that_have_no_code(uri: str) -> None:
    run = open_run(uri)
    with pytest.raises(ConfigError, match=r"'zz-broken\.png' was not inverted: not a picture"):
        run.codes(["face-00.png", "zz-broken.png"])
    with pytest.raises(ConfigError, match=r"no sample 'face-1\.png'; did you mean 'face-01\.png'"):
        run.code("face-1.png")
    with pytest.raises(LedgerError, match="no run here"):
        open_run(uri + "/nowhere")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_torch_dataset(uri: str, workers: int) -> None:
    run, expected = open_run(uri), stored(uri)
    chosen = run.dataset("mse IS NOT NULL AND sample_key < 'face-07'", pictures=["inversion"])
    assert len(chosen) == 7
    how = {"multiprocessing_context": "spawn"} if workers else {}
    batches = list(DataLoader(chosen, batch_size=4, num_workers=workers, **how))
    assert [len(batch["sample_key"]) for batch in batches] == [4, 3]
    for batch in batches:
        codes = np.stack([expected[key] for key in batch["sample_key"]])
        torch.testing.assert_close(batch["w_plus"], torch.from_numpy(codes), rtol=0, atol=0)
        assert batch["inversion"].shape[1:] == (3, 32, 32)
        mse = run.query("SELECT mse FROM samples WHERE sample_key = $k", k=batch["sample_key"][0])
        assert float(batch["mse"][0]) == pytest.approx(mse["mse"][0].as_py())


def test_a_run_goes_on_after_it_was_opened(dataset: Dataset, tmp_path: Path) -> None:
    """What was opened stays as it was; `refresh` looks again."""
    out = str(tmp_path / "run")
    run_inline(dataset, out)
    marker = Path(out, "commits", "00003.json")
    text = marker.read_text()
    marker.unlink()
    before = open_run(out)
    assert len(before.keys()) == 9
    marker.write_text(text)
    assert len(before.keys()) == 9
    assert before.query("SELECT * FROM samples").num_rows == 10
    assert len(before.refresh().keys()) == 11


def test_importing_tasks_is_light() -> None:
    code = (
        "import sys, tasks; assert not {'pyarrow', 'numpy', 'duckdb'} & sys.modules.keys();"
        "from tasks import open_run; assert 'torch' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    with pytest.raises(AttributeError, match="no attribute 'close_run'"):
        _ = tasks.close_run


def test_the_doors_come_back_without_a_second_way(uri: str, dataset: Dataset) -> None:
    """`inversions` is `read_inversions`."""
    generator = load_generator(str(Path(dataset.config).parent / "tiny.safetensors"))
    ours = [batch.sample_keys for batch in open_run(uri).inversions(generator, batch=5)]
    assert ours == [batch.sample_keys for batch in read_inversions(uri, generator, batch=5)]
