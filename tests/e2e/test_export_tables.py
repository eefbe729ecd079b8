"""Exports of a run's rows, opened by the tools they are for: the same rows."""

import io
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import lancedb
import numpy as np
import pytest
import webdataset
from deltalake import DeltaTable
from pyiceberg.catalog.sql import SqlCatalog
from pyiceberg.exceptions import NoSuchTableError

from pipeline.cli import run_app
from tasks.export import tables
from tasks.export.tables import FORMS, Samples, export_table
from tasks.run.marker import Marker
from tasks.run.query import query
from tasks.run.run_json import read_declared
from tests.conftest import make_tiny_generator
from tests.tasks.coded_run import write_coded_run


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run whose codes are stored in half precision; one sample has failed."""
    folder = tmp_path_factory.mktemp("halves")
    rng = np.random.default_rng(0)
    shards = [
        {f"s{shard}/a.b-{n}.png": rng.standard_normal((8, 16)) for n in range(3)}
        for shard in range(2)
    ]
    return write_coded_run(
        str(folder / "run"),
        make_tiny_generator(),
        folder,
        [*shards, {"zz.png": None}],
        latents="float16",
    )


def expected(run: str) -> dict[str, dict]:
    """What a run says of its samples, pictures included, by key."""
    rows = query(run, "SELECT * EXCLUDE (run_id) FROM latents").to_pylist()
    found = {row["sample_key"]: row for row in rows}
    if read_declared(run).pictures:
        for row in query(run, "SELECT sample_key, input, inversion FROM images").to_pylist():
            pictures = {name: row[name]["bytes"] for name in ("input", "inversion")}
            found[row["sample_key"]] |= pictures
    return found


def check(found: list[dict], run: str, *, with_failed: bool = True) -> None:
    wanted = expected(run)
    if not with_failed:
        wanted = {key: row for key, row in wanted.items() if row["status"] == "ok"}
    assert sorted(row["sample_key"] for row in found) == sorted(wanted)
    for row in found:
        original = wanted[row["sample_key"]]
        for name in ("status", "error", "error_kind", "image_uri", "psnr", "inversion", "input"):
            if name in original:
                assert row.get(name) == original[name], name
        code = (
            None if row.get("w_plus") is None else np.asarray(row["w_plus"], np.float32).reshape(-1)
        )
        if original["w_plus"] is None:
            assert code is None
        else:
            assert code == pytest.approx(np.array(original["w_plus"], np.float32), abs=0)


def read_webdataset(folder: str) -> list[dict]:
    shards = sorted(str(path) for path in Path(folder).glob("*.tar"))
    found = []
    for sample in webdataset.WebDataset(shards, shardshuffle=False):
        row = json.loads(sample["json"])
        row["w_plus"] = (
            np.load(io.BytesIO(sample["w_plus.npy"])) if "w_plus.npy" in sample else None
        )
        if row["w_plus"] is not None:
            assert row["w_plus"].shape == (8, 16)
        row |= {name[:-4]: data for name, data in sample.items() if name.endswith(".png")}
        found.append(row)
    return found


def read_hf(folder: str) -> list[dict]:
    found = datasets.load_dataset(folder, split="train", cache_dir=f"{folder}-cache")
    for name, feature in found.features.items():
        if isinstance(feature, datasets.Image):
            found = found.cast_column(name, datasets.Image(decode=False))
    return [{k: v["bytes"] if isinstance(v, dict) else v for k, v in row.items()} for row in found]


def read_delta(folder: str) -> list[dict]:
    return DeltaTable(folder).to_pyarrow_table().to_pylist()


def read_iceberg(folder: str) -> list[dict]:
    catalog = SqlCatalog("runs", uri=f"sqlite:///{folder}/catalog.db", warehouse=folder)
    found = catalog.load_table("runs.samples").scan().to_arrow().to_pylist()
    catalog.close()
    return found


def read_lance(folder: str) -> list[dict]:
    return lancedb.connect(folder).open_table("samples").to_arrow().to_pylist()


READERS = {
    "webdataset": read_webdataset,
    "hf": read_hf,
    "delta": read_delta,
    "iceberg": read_iceberg,
    "lance": read_lance,
}


@pytest.mark.filterwarnings("ignore")  # the tools' own
@pytest.mark.parametrize("form", FORMS)
def test_the_tool_sees_the_same_rows(
    form: str,
    undisturbed: str,
    halves: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, run in (("pictures", undisturbed), ("halves", halves)):
        out = str(tmp_path / name)
        assert run_app(["export", run, out, f"--{form}"]) == 0, capsys.readouterr().err
        count = len(expected(run)) - (form == "lance")
        assert f"{count} rows in" in capsys.readouterr().out
        check(READERS[form](out), run, with_failed=form != "lance")
        before = {path: path.stat().st_mtime_ns for path in Path(out).rglob("*") if path.is_file()}
        assert run_app(["export", run, out, f"--{form}"]) == 0  # nothing to do
        after = {path: path.stat().st_mtime_ns for path in Path(out).rglob("*") if path.is_file()}
        assert after == before


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", FORMS)
def test_an_interrupted_export_is_never_half_visible(
    form: str, halves: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, read = str(tmp_path / "out"), Samples.read
    for last in (2, 5):  # while the schema is made, and while rows are written
        calls = itertools.count(1)

        def fail_later(self: Samples, marker: Marker, calls: Any = calls, last: int = last) -> Any:
            if next(calls) == last:
                raise KeyboardInterrupt
            return read(self, marker)

        monkeypatch.setattr(Samples, "read", fail_later)
        if form == "webdataset" and last == 5:
            break  # it reads each of three shards once
        with pytest.raises(KeyboardInterrupt):
            export_table(halves, out, form)
        if form in tables.IN_PLACE:  # a catalogue without a table
            with pytest.raises(NoSuchTableError):
                READERS[form](out)
        else:
            assert not Path(out).exists()
    monkeypatch.setattr(Samples, "read", read)
    assert export_table(halves, out, form) == 7 - (form == "lance")
    check(READERS[form](out), halves, with_failed=form != "lance")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_finished_shards_are_kept(
    halves: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, done, read = str(tmp_path / "out"), [], Samples.read

    def fail_at_two(self: Samples, marker: Marker) -> Any:
        done.append(marker)
        if len(done) == 2:
            raise KeyboardInterrupt
        return read(self, marker)

    monkeypatch.setattr(Samples, "read", fail_at_two)
    with pytest.raises(KeyboardInterrupt):
        export_table(halves, out, "webdataset")
    first = tmp_path / ".out.partial" / "00000.tar"
    written = first.stat().st_ino
    export_table(halves, out, "webdataset")
    assert len(done) == 4  # the first shard was not read again
    assert Path(out, "00000.tar").stat().st_ino == written


def test_wrong_places_are_refused(
    halves: str, undisturbed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert run_app(["export", halves, out, "--webdataset"]) == 0
    for command, wanted in (
        (["export", halves, out, "--hf"], "holds something else"),
        (["export", undisturbed, out, "--webdataset"], "holds something else"),
        (["export", halves, "s3://bucket/x", "--hf"], "--hf writes to a local folder"),
        (["export", halves, out, "--hf", "--delta"], "--hf and --delta do not go together"),
        (["export", str(tmp_path / "no"), out, "--hf"], "no run here"),
    ):
        capsys.readouterr()
        assert run_app(command) == 2
        assert wanted in capsys.readouterr().err


def test_damage_is_named_whatever_the_tool_makes_of_it(
    halves: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(halves, run)
    part = next((run / "latents").glob("00001-*"))
    data = part.read_bytes()
    part.write_bytes(data[:300] + bytes(200) + data[500:])  # the footer is whole
    for form in ("delta", "lance"):
        capsys.readouterr()
        assert run_app(["export", str(run), str(tmp_path / form), f"--{form}"]) == 2
        assert part.name in capsys.readouterr().err
        assert not (tmp_path / form).exists()
