"""Edit runs on every engine, killed at any point: the same rows and bytes."""

import hashlib
import shutil
from pathlib import Path

import pytest

from models.stylegan2.generator import Generator
from pipeline.cli import run_app
from pipeline.edit import Wishes, load_edit_config
from pipeline.run import carry_out
from tasks.run.ledger import committed
from tasks.run.query import query
from tasks.run.run_json import read_run
from tasks.storage.crash import POINTS
from tests.e2e.small_dataset import NUM_SHARDS, edit_config, fingerprint, rows

REACHED = tuple(point for point in POINTS if point != "in_decode")


@pytest.fixture
def edited(calm: dict[str, str]) -> str:
    return calm["edit"]


def test_what_an_edit_run_holds(edited: str) -> None:
    names = query(edited, "SELECT * FROM images LIMIT 0").column_names
    assert names == ["sample_key", "input", "inversion", "turn-1", "turn+1", "oil~0.7", "run"]
    counts = query(edited, "SELECT variant, count(*) AS n FROM edits GROUP BY 1 ORDER BY 1")
    assert counts.to_pylist() == [{"variant": v, "n": 11} for v in ("oil~0.7", "turn+1", "turn-1")]
    failed = query(edited, "SELECT error_kind FROM latents WHERE status = 'failed'").to_pylist()
    assert failed == [{"error_kind": "decode"}]
    page = Path(edited, "report.html").read_text()
    assert '<th scope="col">oil~0.7</th>' in page
    assert "domain oil 0.7" in page


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("local_ray")
def test_actors_killed_at_each_point(
    undisturbed: str,
    edited: str,
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = str(tmp_path / "run")
    tokens = {point: tmp_path / point for point in REACHED}
    crashes = [f"{point}:{shard}:{tokens[point]}" for shard, point in enumerate(REACHED)]
    monkeypatch.setenv("REFINERY_CRASH", ";".join(crashes))
    sets = ("engine.actors=2", "engine.max_attempts=8")
    summary = carry_out(undisturbed, run, edit_config(undisturbed, place, *sets))
    assert all(token.exists() for token in tokens.values())
    assert summary.is_clean
    assert len(committed(run)) == NUM_SHARDS
    assert fingerprint(run) == fingerprint(edited)
    assert rows(run).equals(rows(edited))


def test_from_s3_to_s3(
    undisturbed: str, edited: str, place: Path, s3: str, tiny_generator: Generator
) -> None:
    from tasks.storage.files import write_bytes

    source = f"{s3}/run"
    for path in Path(undisturbed).rglob("*"):
        if path.is_file():
            write_bytes(f"{source}/{path.relative_to(undisturbed)}", path.read_bytes())
    for path in (place / "oil").iterdir():
        write_bytes(f"{s3}/oil/{path.name}", path.read_bytes())
    write_bytes(f"{s3}/turn.json", (place / "turn.json").read_bytes())
    wishes = Wishes(
        edits=[f"{s3}/turn.json=-1:1:2"], domains=[f"{s3}/oil"], strength=0.7, is_each=True
    )
    plain = ["perceptual=none", "attributes=none", "batch=2", "engine.kind=inline"]
    summary = carry_out(source, f"{s3}/out", load_edit_config(source, None, plain, wishes))
    assert summary.is_clean
    assert rows(f"{s3}/out", "run_id").equals(rows(edited, "run_id"))
    images = [parts["images"] for parts in fingerprint(edited).values() if "images" in parts]
    found = [parts["images"] for parts in fingerprint(f"{s3}/out").values() if "images" in parts]
    assert found == images


def test_the_command(
    undisturbed: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = ["--set", "attributes=none", "--set", "perceptual=none", "--engine", "inline"]
    command = ["edit", undisturbed, str(tmp_path / "out"), "--edit", f"{place}/turn.json=+2"]
    assert run_app([*command, *sets, "--no-flow"]) == 0
    assert "12 in 6 shards, 1 failed" in capsys.readouterr().out
    assert run_app([*command, *sets, "--no-flow"]) == 0
    assert "0 rows in 0:00:00" in capsys.readouterr().out
    other = [*command[:-1], f"{place}/turn.json=+3", *sets, "--no-flow"]
    assert run_app(other) == 2
    error = capsys.readouterr().err
    assert "config.variants.0.edits.0.strength: 2.0 in the run, 3.0 now" in error


def test_a_table_of_domains_is_obeyed(
    undisturbed: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "table.csv"
    table.write_text(f"sample_key,domain,strength\nface-00.png,{place}/oil,0.8\n")
    monkeypatch.chdir(tmp_path)
    command = ["edit", undisturbed, "out", "--assigned", "table.csv", "--engine", "inline"]
    command += ["--no-flow", "--set", "attributes=none", "--set", "perceptual=none"]
    assert run_app(command) == 0
    pictures = query("out", "SELECT sample_key, inversion, assigned FROM images").to_pylist()
    changed = [
        p["sample_key"] for p in pictures if p["inversion"]["bytes"] != p["assigned"]["bytes"]
    ]
    assert (len(pictures), changed) == (11, ["face-00.png"])
    digest = hashlib.sha256(table.read_bytes()).hexdigest()
    assert digest in read_run("out")["weights"].values()
    # Another table at the same place is another run.
    table.write_text(f"sample_key,domain,strength\nface-00.png,{place}/oil,0.4\n")
    assert run_app(command) == 2


def test_a_run_goes_on_after_everything_has_moved(
    undisturbed: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, out = tmp_path / "first", tmp_path / "second", str(tmp_path / "out")
    shutil.copytree(undisturbed, first / "run")
    for name in ("turn.json", "oil"):
        copy = shutil.copytree if (place / name).is_dir() else shutil.copy
        copy(place / name, first / name)

    def command(folder: Path) -> list[str]:
        edits = ["--edit", f"{folder}/turn.json=+2", "--domain", f"{folder}/oil"]
        plain = ["--set", "attributes=none", "--set", "perceptual=none", "--engine", "inline"]
        return ["edit", f"{folder}/run", out, *edits, *plain, "--no-flow"]

    assert run_app(command(first)) == 0
    before, run_id = fingerprint(out), read_run(out)["run_id"]
    first.rename(second)
    Path(out, "commits", "00001.json").unlink()
    capsys.readouterr()
    assert run_app(command(second)) == 0
    assert "verify clean" in " ".join(capsys.readouterr().out.split())
    assert fingerprint(out) == before
    assert (read_run(out)["run_id"], read_run(out)["config"]["source"]) == (
        run_id,
        f"{second}/run",
    )


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--edit", "agee=+2"], "direction 'agee' is unknown"),
        (["--domain", "impastoo"], "domain 'impastoo'"),
        (["--edit", "age"], "expected NAME=STRENGTH"),
        ([], "nothing to make"),
    ],
)
def test_what_is_wrong_is_said_before_any_work(
    arguments: list[str],
    reason: str,
    undisturbed: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    assert run_app(["edit", undisturbed, str(out), *arguments, "--no-flow"]) == 2
    assert reason in capsys.readouterr().err
    assert not out.exists()
