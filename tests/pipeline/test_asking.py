"""The commands that ask runs, as a user types them: answers, files, and what they refuse."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.cli import run_app
from tasks import open_run
from tests.conftest import ROOT, make_tiny_generator
from tests.e2e.small_dataset import Dataset, run_inline, write_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, face_bytes: list[bytes]) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("dataset"), make_tiny_generator(), face_bytes)


@pytest.fixture(scope="module")
def root(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two nights over the same pictures: one step of a search, and three."""
    folder = tmp_path_factory.mktemp("runs")
    run_inline(dataset, str(folder / "monday"))
    run_inline(dataset, str(folder / "tuesday"), "method.0.steps=3", "output.latents=float16")
    return folder


def ask(*tokens: object) -> int:
    return run_app([str(token) for token in tokens])


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    path = tmp_path / "secret.csv"
    path.write_text("word\nswordfish\n")
    return path


ATTACKS = {
    "read": "SELECT * FROM read_csv('{secret}')",
    "by name": "SELECT * FROM '{secret}'",
    "passwd": "SELECT * FROM read_csv('/etc/passwd')",
    "environment": "SELECT * FROM read_text('/proc/self/environ')",
    "blob": "SELECT * FROM read_blob('{secret}')",
    "listing": "SELECT * FROM glob('/etc/*')",
    "sniff": "FROM sniff_csv('{secret}')",
    "metadata": "SELECT * FROM parquet_metadata('{secret}')",
    "past a part": "SELECT * FROM read_text('{part}/../../../../../../etc/passwd')",
    "in a macro": "SELECT * FROM query('SELECT * FROM read_csv(''{secret}'')')",
    "in a subquery": "SELECT (SELECT content FROM read_text('{secret}'))",
    "copy": "COPY (SELECT 1) TO '{out}'",
    "copy over a part": "COPY (SELECT 1 AS a) TO '{part}' (FORMAT parquet, USE_TMP_FILE false)",
    "explained copy": "EXPLAIN ANALYZE COPY (SELECT 1) TO '{part}' (USE_TMP_FILE false)",
    "attach": "ATTACH '{out}' AS other",
    "export": "EXPORT DATABASE '{out}'",
    "install": "INSTALL httpfs",
    "load": "LOAD httpfs",
    "settings": "SET enable_external_access = true",
    "stacked": "SELECT 1; COPY (SELECT 1) TO '{out}'",
    "stacked settings": "SET lock_configuration = false; SELECT * FROM read_csv('{secret}')",
    "pragma": "PRAGMA database_list",
    "call": "CALL pragma_version()",
    "drop": "DROP VIEW samples",
    "create": "CREATE TABLE samples AS SELECT 1",
    "secrets": "CREATE SECRET (TYPE s3, PROVIDER credential_chain)",
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS.keys())
def test_a_statement_reads_the_run_and_nothing_else(
    attack: str, root: Path, secret: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    part = sorted((root / "monday" / "latents").iterdir())[0]
    before, there = part.read_bytes(), set(tmp_path.rglob("*"))
    sql = attack.format(secret=secret, out=tmp_path / "out", part=part)

    code = ask("query", root / "monday", sql)

    printed = capfd.readouterr()
    assert code == 2, printed
    assert "swordfish" not in printed.out + printed.err
    assert "root:" not in printed.out + printed.err
    assert printed.err.startswith("error: query:"), printed.err
    assert printed.err.count("\n") == 1, printed.err
    assert part.read_bytes() == before
    assert set(tmp_path.rglob("*")) == there


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["SELECT psnrr FROM samples"], "did you mean 'psnr'?"),
        (["SELECT w_plus FROM samples"], "it is a column of latents"),
        (["SELECT * FROM sample"], "did you mean 'samples'?"),
        (["SELEC 1"], 'syntax error at or near "SELEC"'),
        (["SELECT * FROM samples WHERE psnr > $least"], "least"),
        (["SELECT 1", "--param", "least"], "--param least: expected NAME=VALUE"),
        (["SELECT 1", "--table", "samples=a.csv"], "samples is a view of the run"),
        (["SELECT 1", "--table", "people=nowhere.csv"], "cannot read nowhere.csv"),
        (["SELECT 1", "--table", "people=people.xlsx"], "expected a file ending in .csv"),
        (["SELECT 1", "--out", "/nowhere/a.csv"], "there is no folder /nowhere"),
        (["SELECT 1", "--out", "a.xlsx"], "expected a name ending in .csv"),
        (["SELECT 1", "--to-tensor", "a.csv"], "expected a name ending in .npy"),
        (["SELECT 1 AS one", "--to-tensor", "a.npy"], "expected one column of vectors"),
    ],
)
def test_a_mistake_is_one_line_with_the_nearest_name(
    root: Path,
    tmp_path: Path,
    tokens: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ask("query", root / "monday", *tokens) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_parameters_and_a_table_of_the_users(root: Path, tmp_path: Path) -> None:
    (tmp_path / "people.csv").write_text("file,age\nface-00.png,71\nface-01.png,30\n")
    out = tmp_path / "old.json"
    sql = (
        "SELECT sample_key, age FROM samples JOIN people ON file = sample_key "
        "WHERE age > $least AND status = $status"
    )
    people = f"people={tmp_path}/people.csv"
    wishes = ["--table", people, "--param", "least=60", "--param", "status=ok", "--out", out]
    assert ask("query", root / "monday", sql, *wishes) == 0
    assert json.loads(out.read_text()) == [{"sample_key": "face-00.png", "age": 71}]


def test_one_run_or_many(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "means.parquet"
    sql = "SELECT run, count(*) AS n, avg(mse) AS mse FROM samples GROUP BY run ORDER BY run"
    assert ask("query", root, sql, "--out", out) == 0
    monday, tuesday = pq.read_table(out).to_pylist()
    assert (monday["run"], tuesday["run"]) == ("monday", "tuesday")
    assert monday["n"] == tuesday["n"] == 12
    assert tuesday["mse"] < monday["mse"]


def test_codes_as_a_tensor(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "codes.npy"
    sql = "SELECT sample_key, w_plus FROM latents WHERE status = 'ok' ORDER BY sample_key"
    assert ask("query", root / "tuesday", sql, "--to-tensor", out) == 0
    found = np.load(out)
    assert found.shape == (11, 8, 16)
    part = pq.read_table(sorted((root / "tuesday" / "latents").iterdir())[0])
    np.testing.assert_array_equal(found[0].reshape(-1), part["w_plus"][0].as_py())
    assert (tmp_path / "codes.keys.csv").read_text().splitlines()[:2] == [
        "sample_key",
        "face-00.png",
    ]


def test_a_data_set_of_pictures(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    sql = "SELECT sample_key, psnr, inversion FROM images JOIN samples USING (sample_key, run)"
    assert (
        ask("query", root / "tuesday", f"{sql} ORDER BY 1", "--to-dataset", tmp_path / "set") == 0
    )
    cache = str(tmp_path / "cache")
    found = datasets.load_dataset(str(tmp_path / "set"), split="train", cache_dir=cache)
    assert found["sample_key"][:] == [f"face-{number:02d}.png" for number in range(11)]
    wanted = open_run(str(root / "tuesday")).pictures(["face-00.png"], "inversion")[0]
    np.testing.assert_array_equal(np.asarray(found[0]["inversion"]), wanted)


def test_runs(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask("runs", root) == 0
    printed = capsys.readouterr().out
    assert "monday" in printed
    assert "wplus" in printed
    out = tmp_path / "runs.parquet"
    assert ask("runs", root, "--out", out) == 0
    rows = pq.read_table(out).to_pylist()
    assert [(r["run"], r["state"], r["rows"], r["failed"], r["committed"]) for r in rows] == [
        ("monday", "sealed", 12, 1, 6),
        ("tuesday", "sealed", 12, 1, 6),
    ]
    assert all(row["worker_s"] > 0 for row in rows)
    assert ask("runs", tmp_path) == 2
    assert "no run here or in a folder below" in capsys.readouterr().err


def test_diff(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    strip, out = tmp_path / "strip.png", tmp_path / "changed.parquet"
    places = (root / "monday", root / "tuesday")
    assert ask("diff", *places, "--strip", strip, "--out", out, "--top", 3) == 0
    printed = capsys.readouterr().out
    assert "other values" in printed
    assert "drifted" in printed
    changed = pq.read_table(out)
    assert changed.num_rows == 11
    assert changed["change"].to_pylist() == sorted(changed["change"].to_pylist(), reverse=True)
    with Image.open(strip) as image:
        assert image.size[0] == 3 * 100  # input, A, B
        assert len(np.unique(np.asarray(image).reshape(-1, 3), axis=0)) > 100
    assert ask("diff", places[0], places[0]) == 0
    assert "equal" in capsys.readouterr().out


def test_reproduce(root: Path, dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask("reproduce", root / "monday", "face-03.png") == 0
    printed = capsys.readouterr().out
    assert printed.count("same bytes") == 9  # status, input, code, four scores, two pictures
    assert "face-03.png, sha256" in printed
    assert ask("reproduce", root / "monday", "zz-broken.png") == 0
    assert ask("reproduce", root / "monday", "face-3.png") == 2
    assert "did you mean 'face-03.png'?" in capsys.readouterr().err
    picture = Path(dataset.source, "face-05.png")
    before = picture.read_bytes()
    try:
        picture.write_bytes(Path(dataset.source, "face-04.png").read_bytes())
        assert ask("reproduce", root / "monday", "face-05.png") == 1
        assert "image_sha256" in capsys.readouterr().out
    finally:
        picture.write_bytes(before)


def test_names_that_look_like_markup_are_printed_as_they_are(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(root / "monday", tmp_path / "[red]night")

    assert ask("query", run, 'SELECT 1 AS "[bold]one[/x]"') == 0
    assert "[bold]one[/x]" in capsys.readouterr().out
    assert ask("verify", run) == 0
    assert f"{run}: clean" in capsys.readouterr().out


def test_nothing_heavy_is_loaded(root: Path) -> None:
    """Not even pandas, which is installed here, for a question or a list of runs."""
    a, b = str(root / "monday"), str(root / "tuesday")
    code = (
        "import sys; from pipeline.cli import run_app\n"
        f"assert run_app(['query', {a!r}, 'SELECT * FROM samples LIMIT 1']) == 0\n"
        f"assert run_app(['runs', {str(root)!r}]) == 0\n"
        "grouped = 'SELECT status, count(*) FROM samples GROUP BY ALL'\n"
        f"assert run_app(['query', {a!r}, grouped]) == 0\n"
        f"assert run_app(['query', {a!r}, 'SELECT w_plus FROM latents LIMIT 1']) == 0\n"
        "assert not {'pandas', 'PIL'} & sys.modules.keys()\n"
        "import pyarrow; assert pyarrow.table({'a': [1]}).to_pandas().shape == (1, 1)\n"
        f"assert run_app(['diff', {a!r}, {b!r}]) == 0\n"
        "assert not {'torch', 'ray', 'prefect'} & sys.modules.keys()"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"leaked" not in done.stderr


def test_a_table_of_any_kind(root: Path, tmp_path: Path) -> None:
    rows = pa.table({"file": ["face-00.png"], "age": [71]})
    pq.write_table(rows, tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text('{"file": "face-00.png", "age": 71}\n')
    with pa.OSFile(str(tmp_path / "a.arrow"), "w") as file, pa.ipc.new_file(file, rows.schema) as w:
        w.write_table(rows)
    for name in ("a.parquet", "a.jsonl", "a.arrow"):
        out = tmp_path / "found.csv"
        wishes = ("--table", f"t={tmp_path / name}", "--out", out)
        assert ask("query", root / "monday", "FROM t", *wishes) == 0
        assert out.read_text() == "file,age\nface-00.png,71\n"


def test_a_run_that_is_not_there(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask("query", root / "munday", "SELECT 1") == 2
    printed = capsys.readouterr().err
    assert f"did you mean {root}/monday?" in printed
    assert printed.count("\n") == 1
