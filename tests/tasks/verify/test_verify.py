"""A clean run is clean; every kind of damage is found and named."""

import dataclasses
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from models.errors import LedgerError
from models.stylegan2.generator import Generator
from tasks.job import InputConfig, JobConfig
from tasks.run.ledger import quarantine, read_marker, remove_orphans, seal
from tasks.run.marker import Part
from tasks.run.parts import to_parquet
from tasks.verify.run import verify
from tasks.work.invert import Inverter
from tests.tasks.small_run import (
    SmallRun,
    begin,
    make_job,
    put_marker,
    write_picture_table,
    write_pictures,
)


@pytest.fixture
def small(tmp_path: Path, job: JobConfig, face_bytes: list[bytes]) -> SmallRun:
    """A sealed run of two shards, 5 and 4 samples, the last one broken."""
    folder = write_pictures(tmp_path / "in", face_bytes)
    run = begin(str(tmp_path / "out"), str(folder), job, Inverter(job, "cpu")).finish()
    seal(run.uri)
    return run


def problems(run: SmallRun, deep: bool = True) -> str:
    return "\n".join(verify(run.uri, deep).problems)


def part_path(run: SmallRun, shard: int, kind: str) -> Path:
    marker = read_marker(run.uri, shard)
    assert marker is not None
    return Path(run.uri, marker.parts[kind].path)


def replace_part(
    run: SmallRun, shard: int, kind: str, change: Callable[[pa.Table], pa.Table]
) -> None:
    """Rewrite a part and its marker, so that size, hash and row count agree again."""
    marker = read_marker(run.uri, shard)
    path = Path(run.uri, marker.parts[kind].path)
    data = to_parquet(change(pq.read_table(path)), kind)
    path.write_bytes(data)
    import hashlib

    part = Part(
        path=marker.parts[kind].path,
        rows=pq.read_metadata(path).num_rows,
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
    )
    put_marker(run.uri, dataclasses.replace(marker, parts={**marker.parts, kind: part}))


def test_a_clean_run(small: SmallRun) -> None:
    for deep in (True, False):
        report = verify(small.uri, deep)
        assert report.is_clean, report.problems
        assert report.notes == []
        assert (report.num_shards, report.num_committed, report.rows, report.failed) == (2, 2, 9, 1)
        assert report.num_bytes == sum(
            path.stat().st_size for path in Path(small.uri).glob("*/*.parquet")
        )


def test_a_clean_run_in_object_storage(
    s3: str, tmp_path: Path, job: JobConfig, face_bytes: list[bytes]
) -> None:
    folder = write_pictures(tmp_path / "in", face_bytes[:3])
    run = begin(f"{s3}/run", str(folder), job, Inverter(job, "cpu")).finish()
    seal(run.uri)
    report = verify(run.uri)
    assert report.is_clean, report.problems
    assert report.rows == 4


def test_an_unfinished_run(small: SmallRun) -> None:
    Path(small.uri, "commits/00001.json").unlink()
    Path(small.uri, "_SEALED.json").unlink()
    report = verify(small.uri)
    assert report.problems == ["1 of 2 shards are not committed yet (00001); run its command again"]
    assert report.notes == [
        "the run is not sealed yet",
        "2 files belong to no commit (unfinished attempts); readers do not see them, and "
        "`refinery gc` removes them",
    ]


def test_a_shard_given_up(small: SmallRun) -> None:
    Path(small.uri, "commits/00001.json").unlink()
    quarantine(small.uri, 1, "tar x.tar is corrupt.", attempts=3)
    seal(small.uri)
    assert verify(small.uri).problems == [
        "shard 00001: given up after 3 attempts: tar x.tar is corrupt. Run again to retry it"
    ]


def test_a_flipped_byte(small: SmallRun) -> None:
    path = part_path(small, 0, "images")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert problems(small) == (
        f"shard 00000: images/{path.name} was changed: its sha256 is not the marker's. To redo the "
        "shard, delete it and run again"
    )
    assert problems(small, deep=False) == ""


def test_a_cut_part(small: SmallRun) -> None:
    path = part_path(small, 1, "latents")
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    assert f"has {size - 1} bytes, the marker says {size}" in problems(small, deep=False)


def test_a_deleted_part(small: SmallRun) -> None:
    path = part_path(small, 1, "latents")
    path.unlink()
    for deep in (True, False):
        assert f"shard 00001: latents/{path.name} is missing" in problems(small, deep)


def with_column(table: pa.Table, name: str, values: list[str]) -> pa.Table:
    at = table.schema.get_field_index(name)
    return table.set_column(at, table.schema.field(at), pa.array(values))


def test_a_row_twice(small: SmallRun) -> None:
    replace_part(small, 0, "latents", lambda table: pa.concat_tables([table, table.slice(4, 1)]))
    text = problems(small)
    assert "the marker counts 6 rows in latents, expected 5 of 5 samples with 0 failures" in text
    assert "latents against the manifest: 1 samples twice (face-4.png)" in text
    assert "latents holds 6 rows with 0 failures, the marker says 5 with 0" in text


def test_a_row_lost(small: SmallRun) -> None:
    marker = read_marker(small.uri, 0)
    replace_part(small, 0, "latents", lambda table: table.slice(1))
    put_marker(
        small.uri, dataclasses.replace(read_marker(small.uri, 0), rows=4, seconds=marker.seconds)
    )
    text = problems(small)
    assert "latents against the manifest: 1 samples missing (face-0.png)" in text
    assert "images against the good rows of latents: 1 samples not expected (face-0.png)" in text
    assert "the manifest has 9 samples, the markers 8" in text


def test_a_foreign_row(small: SmallRun) -> None:
    def rename(table: pa.Table) -> pa.Table:
        return with_column(table, "sample_key", ["x", *table["sample_key"].to_pylist()[1:]])

    replace_part(small, 0, "latents", rename)
    text = problems(small)
    assert "latents against the manifest: 1 samples missing (face-0.png)" in text
    assert "latents against the manifest: 1 samples not expected (x)" in text


def test_a_failure_made_good(small: SmallRun) -> None:
    replace_part(small, 1, "latents", lambda table: with_column(table, "status", ["ok"] * 4))
    text = problems(small)
    assert "latents holds 4 rows with 0 failures, the marker says 4 with 1" in text
    assert "images against the good rows of latents: 1 samples missing (zz-0.png)" in text


def test_the_same_shard_committed_twice(small: SmallRun) -> None:
    """Shard 0's marker copied over shard 1's, as it is and under its number."""
    marker = read_marker(small.uri, 0)
    Path(small.uri, "commits/00001.json").write_bytes(marker.to_json())
    assert "commits/00001.json: damaged (it is of shard 00000)" in problems(small)
    put_marker(small.uri, dataclasses.replace(marker, shard=1))
    found = problems(small)
    assert "shard 00001: latents against the manifest: 4 samples missing" in found
    assert "shards 00000 and 00001 share 5 sample keys" in found


def test_rows_of_another_run(small: SmallRun) -> None:
    strangers = ["stranger"] * 5
    replace_part(small, 0, "latents", lambda table: with_column(table, "run_id", strangers))
    assert "latents holds rows of another run: stranger" in problems(small)
    marker = dataclasses.replace(read_marker(small.uri, 0), run_id="stranger")
    put_marker(small.uri, marker)
    assert "shard 00000: its marker is of run stranger, expected run" in problems(small)


def test_a_marker_without_manifest_entry(small: SmallRun) -> None:
    put_marker(small.uri, dataclasses.replace(read_marker(small.uri, 0), shard=7))
    assert problems(small).startswith(
        "shard 00007: committed, but the manifest has only shards 0 to 1"
    )


def test_a_marker_that_leads_outside(small: SmallRun) -> None:
    marker = read_marker(small.uri, 0)
    part = dataclasses.replace(marker.parts["latents"], path="latents/../../secret.parquet")
    put_marker(small.uri, dataclasses.replace(marker, parts={"latents": part}))
    assert "commits/00000.json: damaged (parts.latents.path: String should match" in problems(small)


def test_damaged_records(small: SmallRun) -> None:
    Path(small.uri, "commits/00000.json").write_text("{}")
    Path(small.uri, "_SEALED.json").write_text("{}")
    text = problems(small)
    assert "commits/00000.json: damaged (shard: Field required)" in text
    assert "_SEALED.json: damaged" in text


def test_changed_run_json(small: SmallRun) -> None:
    path = Path(small.uri, "run.json")
    record = json.loads(path.read_text())
    record["config"]["seed"] = 7
    path.write_text(json.dumps(record))
    assert "run.json was changed after the run began" in problems(small)
    record["places"] = ["input.0.x"]
    path.write_text(json.dumps(record))
    assert "it says that 'input.0.x' is a place" in problems(small)


def test_changed_manifest(small: SmallRun) -> None:
    path = Path(small.uri, "manifest.parquet")
    pq.write_table(pq.read_table(path).slice(0, 1), path)
    assert "manifest.parquet is not the one the run began with: 1 shards" in problems(small)
    path.unlink()
    text = problems(small)
    assert "manifest cannot be opened" in text
    assert text.count("\n") == 0  # the parts are checked all the same


def test_seal_that_disagrees(small: SmallRun) -> None:
    path = Path(small.uri, "_SEALED.json")
    sealed = json.loads(path.read_text())
    sealed["parts"].pop()
    path.write_text(json.dumps(sealed))
    assert "_SEALED.json and the markers disagree about 1 parts (latents/00001" in problems(small)


def test_leftovers_are_a_note_until_sealing_removes_them(small: SmallRun) -> None:
    Path(small.uri, "latents", "00000-ffff.parquet").write_bytes(b"half")
    report = verify(small.uri)
    assert report.is_clean
    assert report.notes[0].startswith("1 files belong to no commit")
    remove_orphans(small.uri)
    assert verify(small.uri).notes == []


def test_keys_of_tars_and_columns_are_compared_with_the_input(
    tmp_path: Path, tiny_generator: Generator, face_bytes: list[bytes]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as tar:
        for index, data in enumerate(face_bytes[:3]):
            member = tarfile.TarInfo(f"{index}.png")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    write_picture_table(folder / "b.parquet", face_bytes[:2], ["u", "v"])
    for name, column, keys in [("a.tar", None, 3), ("b.parquet", "id", 2), ("b.parquet", None, 2)]:
        job = make_job(tiny_generator, tmp_path, input=InputConfig(key_column=column))
        out = str(tmp_path / f"out-{name}-{column}")
        run = begin(out, str(folder / name), job, Inverter(job, "cpu")).finish()
        seal(run.uri)
        report = verify(run.uri)
        assert (report.problems, report.notes, report.rows) == ([], [], keys)
        replace_part(run, 0, "latents", lambda table: table.slice(1))
        assert "latents against the manifest: 1 samples missing" in problems(run)


def test_an_input_that_is_gone_is_a_note(
    tmp_path: Path, job: JobConfig, face_bytes: list[bytes]
) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        member = tarfile.TarInfo("x.png")
        member.size = len(face_bytes[0])
        tar.addfile(member, io.BytesIO(face_bytes[0]))
    run = begin(str(tmp_path / "out"), str(path), job, Inverter(job, "cpu")).finish()
    seal(run.uri)
    path.unlink()
    report = verify(run.uri)
    assert report.is_clean
    assert "shard 00000: the input cannot be read, so its keys were not compared" in report.notes[0]


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="no run here"):
        verify(str(tmp_path))
