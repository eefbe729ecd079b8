"""SQL over committed parts, and its result as a file."""

from pathlib import Path

import numpy as np
import pytest

from models.errors import ConfigError, LedgerError
from models.stylegan2.generator import Generator
from tasks.job import JobConfig
from tasks.run.export import export
from tasks.run.ledger import read_marker
from tasks.run.query import query
from tasks.storage.files import read_bytes, remove
from tasks.work.invert import Inverter
from tests.tasks.small_run import SmallRun, begin, make_noise_job, write_pictures


@pytest.fixture
def small(tmp_path: Path, job: JobConfig, face_bytes: list[bytes]) -> SmallRun:
    """Two shards in a folder whose name holds every character that needs care."""
    folder = write_pictures(tmp_path / "in", face_bytes)
    out = tmp_path / "out [a-c] 'x' *"
    return begin(str(out), str(folder), job, Inverter(job, "cpu"))


def test_counts_and_joins(small: SmallRun) -> None:
    small.finish()
    table = query(
        small.uri,
        "SELECT status, count(*) AS n, count(w_plus) AS codes, avg(mse) AS mse FROM latents "
        "GROUP BY status ORDER BY status",
    )
    failed, good = table.to_pylist()
    assert (failed["status"], failed["n"], failed["codes"], failed["mse"]) == ("failed", 1, 0, None)
    assert (good["n"], good["codes"]) == (8, 8)
    joined = query(
        small.uri,
        "SELECT count(*) AS n, min(octet_length(inversion.bytes)) AS size "
        "FROM latents JOIN images USING (sample_key)",
    ).to_pylist()[0]
    assert joined["n"] == 8
    assert joined["size"] > 100


def test_committed_parts_only(small: SmallRun) -> None:
    small.run(0)
    marker = small.run(1)
    Path(small.uri, "latents", "00000-ffff.parquet").write_bytes(b"half a part")
    Path(small.uri, "commits/00001.json").unlink()
    assert query(small.uri, "SELECT count(*) AS n FROM latents").to_pylist() == [{"n": 5}]
    commits = query(small.uri, "SELECT * FROM shards").to_pylist()
    assert [(row["shard"], row["rows"], row["failed"]) for row in commits] == [(0, 5, 0)]
    assert commits[0]["invert_s"] > 0
    assert commits[0]["bytes"] > marker.parts["latents"].bytes
    assert commits[0]["run_id"] == small.handle.run_id


def test_similarity(small: SmallRun) -> None:
    small.finish()
    rows = query(
        small.uri, "SELECT sample_key, w_plus FROM latents WHERE status = 'ok'"
    ).to_pylist()
    codes = {row["sample_key"]: np.array(row["w_plus"]) for row in rows}
    query_code = codes["face-3.png"]
    cosine = {
        key: float(code @ query_code / np.linalg.norm(code) / np.linalg.norm(query_code))
        for key, code in codes.items()
    }
    found = query(small.uri, "SELECT * FROM nearest('face-3.png', 4)").to_pylist()
    assert [row["sample_key"] for row in found] == sorted(cosine, key=lambda key: -cosine[key])[:4]
    assert found[0]["sample_key"] == "face-3.png"
    for row in found:
        assert row["cosine"] == pytest.approx(cosine[row["sample_key"]], abs=1e-5)
        distance = np.linalg.norm(codes[row["sample_key"]] - query_code)
        assert row["distance"] == pytest.approx(distance, abs=1e-4)
    by_hand = query(
        small.uri,
        "SELECT sample_key, array_cosine_similarity(w_plus, (SELECT w_plus FROM latents "
        "WHERE sample_key = 'face-3.png')) AS cosine FROM latents ORDER BY cosine DESC NULLS LAST",
    ).to_pylist()
    assert by_hand[:4] == [{k: row[k] for k in ("sample_key", "cosine")} for row in found]
    assert by_hand[-1] == {"sample_key": "zz-0.png", "cosine": None}


def test_half_precision_codes_and_noise(
    tmp_path: Path, tiny_generator: Generator, face_bytes: list[bytes]
) -> None:
    job = make_noise_job(tiny_generator, tmp_path, pictures=(), latents="float16")
    folder = write_pictures(tmp_path / "in", face_bytes[:3])
    run = begin(str(tmp_path / "out"), str(folder), job, Inverter(job, "cpu")).finish()
    assert query(run.uri, "SELECT count(*) AS n FROM nearest('face-0.png', 9)").to_pylist() == [
        {"n": 3}
    ]
    found = query(run.uri, "SELECT len(noise_0) AS n FROM residuals").to_pylist()
    assert found == [{"n": 16}] * 3
    with pytest.raises(ConfigError, match="Views: latents, residuals, runs"):
        query(run.uri, "SELECT * FROM images")


def test_object_storage(s3: str, tmp_path: Path, job: JobConfig, face_bytes: list[bytes]) -> None:
    folder = write_pictures(tmp_path / "in", face_bytes[:4])
    run = begin(f"{s3}/runs/[1]", str(folder), job, Inverter(job, "cpu"), shard_size=2).finish()
    table = query(run.uri, "SELECT sample_key, mse FROM latents ORDER BY sample_key")
    assert table.num_rows == 5
    export(table, f"{s3}/tables/mse.csv")
    lines = read_bytes(f"{s3}/tables/mse.csv").decode().splitlines()
    assert lines[0] == "sample_key,mse"
    assert lines[-1] == "zz-0.png,"


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("SELEC 1", "syntax error"),
        ("SELECT nope FROM latents", "nope"),
        ("SELECT * FROM markers", "markers does not exist"),
        ("SELECT 'x'::DATE", "invalid date"),
    ],
)
def test_wrong_sql_is_explained(small: SmallRun, sql: str, message: str) -> None:
    small.run(0)
    with pytest.raises(ConfigError, match=f"{message}.*Views: images, latents, runs"):
        query(small.uri, sql)


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("-- nothing", "holds no statement"),
        ("SELECT 1; SELECT 2", "2 statements"),
        ("DROP VIEW samples", "expected one SELECT, found DROP"),
        ("PRAGMA version", "found PRAGMA"),
        ("EXPLAIN ANALYZE DROP VIEW samples", "found DROP"),
    ],
)
def test_one_select_and_nothing_else(small: SmallRun, sql: str, message: str) -> None:
    small.run(0)
    with pytest.raises(ConfigError, match=message):
        query(small.uri, sql)
    assert query(small.uri, "EXPLAIN SELECT 1 AS one").num_rows == 1


def test_nothing_committed(small: SmallRun) -> None:
    with pytest.raises(LedgerError, match="nothing to query, 0 of 2 shards are committed"):
        query(small.uri, "SELECT 1")


def test_a_part_that_is_gone(small: SmallRun) -> None:
    marker = small.run(0)
    Path(small.uri, marker.parts["latents"].path).unlink()
    with pytest.raises(LedgerError, match="run `refinery verify`"):
        query(small.uri, "SELECT count(*) FROM latents")


def test_a_remote_part_that_is_gone(
    tmp_path: Path, job: JobConfig, face_bytes: list[bytes]
) -> None:
    folder = write_pictures(tmp_path / "in", face_bytes[:4])
    uri = f"memory://{tmp_path.name}/run [1]"
    run = begin(uri, str(folder), job, Inverter(job, "cpu"), shard_size=2).finish()
    assert query(uri, "SELECT count(*) AS n FROM images").to_pylist() == [{"n": 4}]
    path = read_marker(uri, 1).parts["latents"].path
    remove([f"{uri}/{path}"])
    with pytest.raises(LedgerError, match=rf"{path} is missing although it is committed"):
        query(run.uri, "SELECT count(sample_key) FROM latents")
