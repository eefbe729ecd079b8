"""One look at a run: sealed, at work, done again, copied; and what it costs of an object store."""

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from models.stylegan2.generator import Generator
from tasks.job import OutputConfig
from tasks.run import metadata
from tasks.run.compact import compact
from tasks.run.ledger import read_marker, seal
from tasks.run.metadata import read_snapshot, refresh_metadata, segment_rows, write_metadata
from tasks.run.query import query
from tasks.storage.files import join, list_files, read_bytes, write_bytes
from tasks.work.invert import Inverter
from tests.s3_proxy import S3Proxy, s3_proxy
from tests.s3_server import S3Server
from tests.tasks.small_run import SmallRun, begin, make_job, write_pictures

COUNT = "SELECT count(*) AS rows, count(DISTINCT sample_key) AS keys, sum(mse) AS mse FROM samples"
Begin = Callable[..., SmallRun]


@pytest.fixture
def start(tmp_path: Path, tiny_generator: Generator, face_bytes: list[bytes]) -> Begin:
    """Begin a run of two samples a shard over eight pictures and a broken file."""
    source = write_pictures(tmp_path / "in", face_bytes)

    def begin_run(uri: str | None = None, **output: Any) -> SmallRun:
        job = make_job(tiny_generator, tmp_path, output=OutputConfig(**output))
        inverter = Inverter(job, "cpu")
        return begin(uri or str(tmp_path / "run"), str(source), job, inverter, shard_size=2)

    return begin_run


def files(run_uri: str) -> list[str]:
    return [name for name, _, _ in list_files(join(run_uri, metadata.FOLDER))]


def from_parts(run_uri: str, sql: str) -> list[dict[str, Any]]:
    """The answer without the metadata file."""
    held = {name: read_bytes(join(run_uri, metadata.FOLDER, name)) for name in files(run_uri)}
    for name in held:
        Path(run_uri, metadata.FOLDER, name).unlink()
    try:
        return query(run_uri, sql).to_pylist()
    finally:
        for name, data in held.items():
            write_bytes(join(run_uri, metadata.FOLDER, name), data)


@pytest.mark.parametrize("latents", ["float32", "float16"])
def test_a_sealed_run_answers_from_one_file_as_from_its_parts(start: Begin, latents: str) -> None:
    run = start(latents=latents).finish()
    seal(run.uri)
    uri = write_metadata(run.uri)
    assert files(run.uri) == [Path(str(uri)).name]
    snapshot = read_snapshot(run.uri)
    assert snapshot.is_sealed
    assert snapshot.fresh is None
    assert [segment.is_whole for segment in snapshot.segments] == [True]
    for sql in ("SELECT * FROM latents ORDER BY sample_key", "SELECT * FROM shards ORDER BY shard"):
        assert query(run.uri, sql).to_pylist() == from_parts(run.uri, sql)
    assert write_metadata(run.uri) == uri  # nothing new, nothing written


def test_places_lead_to_the_codes(start: Begin) -> None:
    run = start(latents="float16").finish()
    write_metadata(run.uri)
    (segment,) = read_snapshot(run.uri).segments
    for row in segment_rows(segment).to_pylist():
        part = read_marker(run.uri, row["shard"]).parts["latents"]
        stored = pq.read_table(f"{run.uri}/{part.path}").to_pylist()
        (same,) = [other for other in stored if other["sample_key"] == row["sample_key"]]
        if row["status"] == "failed":
            assert row["position"] is row["code_at"] is same["w_plus"] is None
            continue
        data = Path(run.uri, part.path).read_bytes()[row["code_at"] :][: 8 * 16 * 2]
        np.testing.assert_array_equal(np.frombuffer(data, np.float16), same["w_plus"])
        good = [other["sample_key"] for other in stored if other["status"] == "ok"]
        assert good[row["position"]] == row["sample_key"]


def test_answers_while_a_run_is_at_work(start: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader asks as quickly as it can, while shards are committed and files are written."""
    monkeypatch.setattr(metadata, "EVERY", 2)
    run = start()
    run.run(0)
    seen: list[dict[str, Any]] = []
    problems: list[BaseException] = []
    is_over = threading.Event()

    def read() -> None:
        try:
            while not is_over.is_set():
                seen.extend(query(run.uri, COUNT).to_pylist())
        except BaseException as problem:
            problems.append(problem)

    reader = threading.Thread(target=read)
    reader.start()
    for shard in range(1, 5):
        run.run(shard)
        refresh_metadata(run.uri)
    seal(run.uri)
    write_metadata(run.uri)
    is_over.set()
    reader.join()
    seen += query(run.uri, COUNT).to_pylist()
    assert problems == []
    assert all(row["rows"] == row["keys"] for row in seen)
    counts = [row["rows"] for row in seen]
    assert counts == sorted(counts)
    assert set(counts) <= {2, 4, 6, 8, 9}
    assert counts[-1] == 9


def test_files_are_folded_together(start: Begin) -> None:
    run = start()
    names = []
    for shard in range(5):
        run.run(shard)
        refresh_metadata(run.uri)
        names.append([name.partition("-")[0] for name in sorted(files(run.uri))])
    assert names == [
        ["000001"],
        ["000002"],
        ["000001", "000002"],
        ["000004"] if names[3] == ["000004"] else ["000002", "000002"],
        names[4],
    ]
    assert query(run.uri, COUNT).to_pylist()[0]["keys"] == 9
    write_metadata(run.uri)
    assert [name.partition("-")[0] for name in files(run.uri)] == ["000005"]


def test_a_shard_that_was_done_again_counts_once(start: Begin) -> None:
    run = start().finish()
    write_metadata(run.uri)
    before = query(run.uri, "SELECT * FROM latents ORDER BY sample_key")
    old = read_marker(run.uri, 1)
    Path(run.uri, "commits/00001.json").unlink()
    gone = query(run.uri, "SELECT DISTINCT shard FROM samples ORDER BY shard")["shard"].to_pylist()
    assert gone == [0, 2, 3, 4]
    again = run.run(1)
    assert again.attempt != old.attempt
    for part in old.parts.values():
        Path(run.uri, part.path).unlink()
    assert query(run.uri, COUNT).to_pylist()[0] == {
        "rows": 9,
        "keys": 9,
        "mse": pytest.approx(sum(value or 0 for value in before["mse"].to_pylist()), rel=1e-6),
    }
    assert query(run.uri, "SELECT * FROM latents ORDER BY sample_key").equals(before)
    attempts = query(run.uri, "SELECT attempt FROM shards WHERE shard = 1")["attempt"].to_pylist()
    assert attempts == [again.attempt]


def test_a_copy_of_a_run_uses_its_file(start: Begin, tmp_path: Path) -> None:
    """Other times on its files, the same markers; writing it again saves reading those."""
    run = start().finish()
    uri = write_metadata(run.uri)
    copy = str(tmp_path / "copy")
    shutil.copytree(run.uri, copy, copy_function=shutil.copyfile)
    snapshot = read_snapshot(copy)
    assert snapshot.fresh is None
    assert [segment.is_whole for segment in snapshot.segments] == [True]
    assert Path(str(write_metadata(copy))).name != Path(str(uri)).name
    (segment,) = read_snapshot(copy).segments
    assert segment.tags == snapshot.tags


def test_a_reader_keeps_what_a_run_has_not_written(
    start: Begin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "EVERY", 3)
    monkeypatch.setenv("REFINERY_CACHE", str(tmp_path / "cache"))
    run = start().finish()
    expected = query(run.uri, COUNT).to_pylist()
    assert files(run.uri) == []
    kept = read_snapshot(run.uri)
    assert kept.fresh is None
    assert kept.segments[0].uri.startswith(str(tmp_path / "cache"))
    assert query(run.uri, COUNT).to_pylist() == expected


def test_shards_that_share_parts_answer_as_before(start: Begin) -> None:
    run = start(latents="float16").finish()
    seal(run.uri)
    write_metadata(run.uri)
    sql = "SELECT * EXCLUDE (shard) FROM latents ORDER BY sample_key"
    pictures = "SELECT * FROM images ORDER BY sample_key"
    before = query(run.uri, sql), query(run.uri, pictures)
    compact(run.uri)
    assert query(run.uri, "SELECT count(*) AS n FROM shards").to_pylist() == [{"n": 1}]
    for is_written in (False, True):
        if is_written:
            seal(run.uri)
            write_metadata(run.uri)
        assert query(run.uri, sql).equals(before[0])
        assert query(run.uri, pictures).equals(before[1])


def test_a_foreign_file_is_named_and_left_out(
    start: Begin, caplog: pytest.LogCaptureFixture
) -> None:
    run = start().finish()
    expected = query(run.uri, COUNT)
    write_bytes(join(run.uri, metadata.FOLDER, "000005-abc.parquet"), b"PAR1 no, not this")
    assert query(run.uri, COUNT).equals(expected)
    assert "000005-abc.parquet" in caplog.text


# ---------------------------------------------------------------------------- object storage


@pytest.fixture
def proxy(
    s3: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, S3Proxy]]:
    """A bucket, and the proxy before it."""
    with s3_proxy(s3_server.endpoint) as found:
        monkeypatch.setenv("AWS_ENDPOINT_URL", found.endpoint)
        yield s3, found


def test_requests_to_the_store_are_few(start: Begin, proxy: tuple[str, S3Proxy]) -> None:
    bucket, store = proxy
    run = start(f"{bucket}/run").finish()
    seal(run.uri)
    write_metadata(run.uri)
    store.forget()
    sql = "SELECT method, avg(mse) AS mse FROM samples WHERE psnr > 0 GROUP BY method"
    assert query(run.uri, sql).num_rows == 1
    # run.json twice (is it a run?), three listings, the seal, the file with all rows.
    assert store.requests.total() <= 8, store.paths

    store.forget()
    found = query(run.uri, "SELECT * FROM latents WHERE sample_key = 'face-3.png'").to_pylist()
    assert len(found[0]["w_plus"]) == 8 * 16
    assert store.requests.total() <= 9, store.paths

    store.forget()
    sql = "SELECT sample_key, inversion FROM images JOIN samples USING (sample_key, run) "
    assert query(run.uri, f"{sql} ORDER BY mse LIMIT 2").num_rows == 2
    assert store.requests.total() <= 12, store.paths


def test_a_run_at_work_costs_a_few_requests_a_shard(
    start: Begin, proxy: tuple[str, S3Proxy]
) -> None:
    bucket, store = proxy
    run = start(f"{bucket}/run").finish()
    store.forget()
    assert query(run.uri, COUNT).to_pylist()[0]["keys"] == 9
    # A marker is one GET, a small part is one.
    assert store.requests.total() <= 7 + 2 * 5, store.paths


def test_answers_that_break_off_are_asked_for_again(
    start: Begin, proxy: tuple[str, S3Proxy]
) -> None:
    bucket, store = proxy
    run = start(f"{bucket}/run").finish()
    expected = query(run.uri, "SELECT * FROM latents ORDER BY sample_key")
    pictures = query(run.uri, "SELECT * FROM images ORDER BY sample_key")
    for is_written in (False, True):
        if is_written:
            write_metadata(run.uri)
        # More often than s3fs asks again by itself.
        store.breaks_off.update({"/latents/": 7, "/metadata/": 7})
        assert query(run.uri, "SELECT * FROM latents ORDER BY sample_key").equals(expected)
        assert store.breaks_off["/latents/"] == 0
        assert store.breaks_off["/metadata/"] == (0 if is_written else 7)
        store.breaks_off.clear()
        # Computed by DuckDB from the parts: its reads too.
        store.breaks_off["/images/"] = 7
        sql = "SELECT sample_key, octet_length(inversion.bytes) AS size FROM images ORDER BY ALL"
        sizes = query(run.uri, sql)["size"].to_pylist()
        assert sizes == [len(row["inversion"]["bytes"]) for row in pictures.to_pylist()]
        assert store.breaks_off["/images/"] == 0
        store.breaks_off.clear()
