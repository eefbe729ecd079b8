"""The small files of a run, edited by chance: the bad one is named, the rest works, no
traceback."""

import random
import shutil
from pathlib import Path

import pytest

from pipeline.cli import run_app
from pipeline.config import load_config
from pipeline.run import carry_out
from pipeline.status import read_status
from tasks.run import ledger
from tests.conftest import make_tiny_generator
from tests.e2e.small_dataset import write_dataset
from tests.fuzzing import mutate_record

SEED, MUTATIONS, SHARD = 20261126, 150, 2
FILES = (
    f"commits/{SHARD:05d}.json",
    f"commits/{SHARD:05d}.json",
    "run.json",
    "_SEALED.json",
    "failed/00005.json",
    "drivers/0001.json",
)
ROWS = "SELECT count(*) AS n FROM latents"
COMMANDS = (["query", ROWS], ["verify"], ["verify", "--no-deep"], ["query", ROWS], ["report"])


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory, face_bytes: list[bytes]) -> Path:
    """A sealed run of six shards of two samples; the last was given up."""
    folder = tmp_path_factory.mktemp("mutations")
    dataset = write_dataset(folder, make_tiny_generator(), face_bytes)
    run = folder / "run"
    carry_out(dataset.source, str(run), load_config(dataset.config, ["engine.kind=inline"]))
    (run / "commits/00005.json").unlink()
    ledger.quarantine(str(run), 5, "its worker died again and again")
    ledger.seal(str(run))
    return run


@pytest.mark.timeout(600)
def test_mutations(
    pristine: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    chance = random.Random(SEED)
    codes: dict[tuple[str, str, int], int] = {}
    run = tmp_path / "run"
    shutil.copytree(pristine, run)
    for number in range(MUTATIONS):
        name = FILES[number % len(FILES)]
        text, what = mutate_record((pristine / name).read_text(), chance)
        (run / name).write_bytes(text.encode("utf-8", "surrogatepass"))
        for verb, *rest in (["status"], COMMANDS[number // len(FILES) % len(COMMANDS)]):
            code = run_app([verb, str(run), *rest])
            out, err = capfd.readouterr()
            err += caplog.text  # on stderr, where no test listens
            caplog.clear()
            said = f"mutation {number} of {name} ({what}): {verb} -> {code}\n{out}{err}"
            assert code in (0, 1, 2), said
            assert "Traceback" not in err, said
            assert "internal error" not in err, said
            check(name, verb, code, out + err, said)
            codes[name, verb, code] = codes.get((name, verb, code), 0) + 1
        shutil.copy(pristine / name, run / name)
    # Each file was found damaged and found good, and never took the rest with it.
    assert codes["run.json", "status", 2] > 5
    assert codes[FILES[0], "query", 0] > 5
    assert codes["_SEALED.json", "verify", 1] > 5


def check(name: str, verb: str, code: int, text: str, said: str) -> None:
    """What the command may answer where this file is bad."""
    if name == "run.json":
        assert code != 2 or "run.json" in text, said
        return
    if verb == "status":
        assert code == 1, said  # a shard was given up, whatever else is wrong
        assert "its worker died again" in text or name.startswith("failed"), said
    if verb == "query" and code == 0:
        # 12 samples without the shard given up; without that of the bad marker, too.
        assert any(f" {rows} " in text for rows in (8, 10)), said
        is_left_out = " 8 " in text
        assert not is_left_out or name in text, said
    if code == 2:
        # The one part that a marker names cannot be found.
        assert name == FILES[0], said
        assert "nothing-here" in text or "latents/" in text or "images/" in text, said


def test_the_bad_one_is_named_and_the_rest_works(
    pristine: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = tmp_path / "run"
    shutil.copytree(pristine, run)
    (run / FILES[0]).write_text('{"shard": "two"}')
    (run / "_SEALED.json").write_text("[1, 2")
    assert run_app(["status", str(run)]) == 1
    out = capsys.readouterr().out
    assert "4 of 6 committed, 1 pending" in out
    assert "commits/00002.json: damaged (shard: Input should be a valid integer)" in out
    assert "_SEALED.json: damaged (Invalid JSON" in out
    assert run_app(["query", str(run), ROWS]) == 0
    assert " 8 " in capsys.readouterr().out
    assert f"left out: {run}/commits/00002.json" in caplog.text
    assert run_app(["report", str(run)]) == 0
    assert run_app(["verify", str(run)]) == 1
    capsys.readouterr()
    assert run_app(["query", str(run), "SELECT '\udcff'"]) == 2  # how Python hands over b"\xff"
    assert "no text in UTF-8 from character 8 on" in " ".join(capsys.readouterr().err.split())
    record = (run / "run.json").read_text()
    (run / "run.json").write_text(record.replace('"batch": 2', '"batch": "two"'))
    assert run_app(["retry", str(run)]) == 2
    assert "run.json: damaged, its config is of no invert job" in capsys.readouterr().err


def test_a_marker_without_a_moment_counts_and_has_no_pace(pristine: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(pristine, run)
    whole = read_status(str(run))
    path = run / FILES[0]
    path.write_text(path.read_text().replace("started_at", "begun_at"))
    found = read_status(str(run))
    assert (found.num_committed, found.rows, found.problems) == (5, 10, ())
    assert whole.images_per_s
    assert found.images_per_s
    for path in (run / "commits").iterdir():
        path.write_text(path.read_text().replace("started_at", "begun_at"))
    found = read_status(str(run))
    assert (found.rows, found.images_per_s) == (10, None)
