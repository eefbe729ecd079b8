"""Which columns a statement only passes on, and that the answer does not depend on it."""

import json
from pathlib import Path

import duckdb
import pytest

from tasks.run.large import find_large
from tasks.run.lookup import CODES
from tasks.run.metadata import Snapshot, read_snapshot
from tasks.run.passing import used_columns
from tasks.run.views import Session
from tests.conftest import make_tiny_generator
from tests.e2e.small_dataset import run_inline, write_dataset

COLUMNS = ("w_plus", "input", "inversion")


def used(sql: str) -> set[str] | None:
    ((text,),) = duckdb.execute("SELECT json_serialize_sql($1)", [sql]).fetchall()
    tree = json.loads(text)
    assert not tree["error"], text
    return used_columns(tree["statements"][0], COLUMNS)


PASSING = (
    "SELECT sample_key, w_plus FROM latents WHERE psnr > 3 ORDER BY psnr LIMIT 3",
    "SELECT * FROM latents ORDER BY sample_key LIMIT 3",
    "SELECT l.* FROM latents l ORDER BY l.sample_key",
    "SELECT l.w_plus AS code, i.inversion FROM latents l JOIN images i USING (sample_key) "
    "ORDER BY sample_key",
    "SELECT sample_key, w_plus FROM latents LEFT JOIN shards USING (shard) ORDER BY sample_key",
    "SELECT i.sample_key, input, w_plus FROM images i LEFT JOIN latents l ON i.sample_key = "
    "l.sample_key AND l.psnr > 9 ORDER BY i.sample_key",
    "WITH best AS (SELECT sample_key FROM samples ORDER BY psnr DESC LIMIT 2) SELECT sample_key, "
    "inversion FROM images WHERE sample_key IN (SELECT sample_key FROM best) ORDER BY sample_key",
    "SELECT sample_key, avg(mse) AS mse FROM samples GROUP BY sample_key ORDER BY sample_key",
    "SELECT * EXCLUDE (seed) FROM latents WHERE status = 'failed'",
    "SELECT count(*) AS n FROM latents",
    "SELECT W_PLUS FROM latents ORDER BY sample_key",
    "SELECT sample_key, w_plus FROM latents WHERE false",
)
USING = (
    "SELECT sample_key, w_plus[1] AS first FROM latents ORDER BY sample_key",
    "SELECT sample_key, w_plus FROM latents ORDER BY w_plus DESC NULLS LAST, sample_key",
    "SELECT w_plus AS code, code[2] AS second FROM latents ORDER BY sample_key",
    "SELECT sample_key, w_plus AS z FROM latents ORDER BY z NULLS LAST, sample_key",
    "SELECT DISTINCT w_plus FROM latents ORDER BY w_plus NULLS LAST",
    "SELECT w_plus, count(*) AS n FROM latents GROUP BY w_plus ORDER BY ALL",
    "SELECT w_plus, count(*) AS n FROM latents GROUP BY ALL ORDER BY 1",
    "SELECT count(w_plus) AS n, count(DISTINCT w_plus) AS different FROM latents",
    "SELECT a.sample_key FROM latents a JOIN latents b USING (w_plus) ORDER BY ALL",
    "SELECT sample_key FROM latents NATURAL JOIN (SELECT w_plus FROM latents LIMIT 1) ORDER BY 1",
    "SELECT w_plus FROM latents UNION SELECT w_plus FROM latents ORDER BY 1",
    "SELECT * FROM (SELECT * FROM latents ORDER BY sample_key) LIMIT 2",
    "WITH q AS (SELECT sample_key, w_plus AS v FROM latents) SELECT sample_key, v[3] AS third "
    "FROM q ORDER BY 1",
    "SELECT t FROM latents AS t(a, b) ORDER BY a",
    "SELECT l FROM latents l ORDER BY l.sample_key",
    "SELECT to_json(images) AS row FROM images ORDER BY sample_key",
    "SELECT * REPLACE (w_plus[1] AS w_plus) FROM latents ORDER BY sample_key",
    "SELECT * RENAME (w_plus AS v) FROM latents ORDER BY v NULLS LAST, sample_key",
    "SELECT sample_key, inversion.path AS path FROM images ORDER BY sample_key",
    "SELECT max(COLUMNS('w_.*')) AS largest FROM latents",
    "SELECT sample_key, (SELECT w_plus FROM latents ORDER BY sample_key LIMIT 1) AS first "
    "FROM latents ORDER BY 1",
    "SELECT sample_key, typeof(w_plus) AS type FROM latents ORDER BY sample_key",
    "SELECT sample_key, {'code': w_plus} AS boxed FROM latents ORDER BY sample_key",
    "SELECT sample_key, row_number() OVER (ORDER BY w_plus, sample_key) AS place FROM latents "
    "ORDER BY sample_key",
    "SELECT sample_key FROM latents WHERE w_plus IS NOT NULL ORDER BY sample_key",
    "SELECT unnest(w_plus) AS value FROM latents ORDER BY sample_key LIMIT 3",
    "FROM nearest('face-02.png', 3)",
    "DESCRIBE latents",
)


@pytest.fixture(scope="module")
def snapshots(
    tmp_path_factory: pytest.TempPathFactory, face_bytes: list[bytes]
) -> dict[str, Snapshot]:
    """A run whose metadata lie in one file."""
    folder: Path = tmp_path_factory.mktemp("passing")
    dataset = write_dataset(folder, make_tiny_generator(), face_bytes)
    run_inline(dataset, str(folder / "run"), "output.latents=float16")
    return {"run": read_snapshot(str(folder / "run"))}


def test_the_large_columns(snapshots: dict[str, Snapshot]) -> None:
    found = {column.name: column.view for column in find_large(list(snapshots.values()))}
    assert found == {CODES: "latents", "input": "images", "inversion": "images"}


@pytest.mark.parametrize("sql", PASSING)
def test_passed_on(sql: str) -> None:
    assert used(sql) == set()


@pytest.mark.parametrize("sql", [sql for sql in USING if not sql.startswith("DESCRIBE")])
def test_used(sql: str) -> None:
    assert used(sql) != set()


def test_only_what_is_used_comes_from_the_parts() -> None:
    sql = "SELECT l.sample_key, l.w_plus FROM latents l JOIN images i USING (sample_key) WHERE "
    assert used(f"{sql} octet_length(i.inversion.bytes) > 3") == {"inversion"}
    assert used(f"{sql} l.w_plus[1] > 0") == {"w_plus"}


def test_questions_of_small_views_leave_the_parts_alone(snapshots: dict[str, Snapshot]) -> None:
    session = Session(snapshots)
    grouped = "SELECT status, count(*) FROM {} GROUP BY ALL"
    assert session._used(grouped.format("samples")) == set()
    assert session._used(grouped.format("Latents")) == {"latents", "images"}
    assert session._used("SELECT * FROM query_table('latents')") == {"latents", "images"}
    session.close()


@pytest.mark.parametrize("sql", [*PASSING, *USING])
def test_answers_are_those_of_the_parts(
    sql: str, snapshots: dict[str, Snapshot], monkeypatch: pytest.MonkeyPatch
) -> None:
    passing, computing = Session(snapshots), Session(snapshots)
    everything = {"latents", "images"}
    monkeypatch.setattr(computing, "_used", lambda sql: everything)
    found, expected = passing.ask(sql), computing.ask(sql)
    assert found.column_names == expected.column_names
    assert found.to_pylist() == expected.to_pylist()
    assert found.num_rows > 0 or "false" in sql
    for session in (passing, computing):
        session.close()
