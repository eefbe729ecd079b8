"""Edit runs on every engine, killed at any point: the same rows and bytes."""

import hashlib
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest

from models.stylegan2.generator import Generator
from pipeline.cli import run_app
from pipeline.config import RunConfig
from pipeline.edit import Wishes, load_edit_config
from pipeline.run import Summary, carry_out, verify
from tasks.edit_job import EditJobConfig
from tasks.run.ledger import committed, read_run
from tasks.run.query import query
from tasks.storage.crash import EXIT_CODE, POINTS
from tests.conftest import make_tiny_generator
from tests.e2e.small_dataset import NUM_SHARDS, fingerprint, rows
from tests.tasks.small_edit import write_direction, write_domain

REACHED = tuple(point for point in POINTS if point != "in_decode")


def config_of(source: str, place: Path, *sets: str) -> RunConfig[EditJobConfig]:
    wishes = Wishes(
        edits=[f"{place}/turn.json=-1:1:2"], domains=[f"{place}/oil"], strength=0.7, is_each=True
    )
    plain = ["perceptual=none", "attributes=none", "batch=2", "engine.retry_wait_s=0.1"]
    return load_edit_config(source, None, [*plain, *sets], wishes)


def edit_inline(source: str, out: str, place: Path) -> Summary:
    return carry_out(source, out, config_of(source, place, "engine.kind=inline"))


def crash_edit(crash: str, source: str, out: str, place: Path) -> None:
    """The body of a driver process that is to die at a crash point."""
    os.environ["REFINERY_CRASH"] = crash
    edit_inline(source, out, place)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, generator = tmp_path_factory.mktemp("place"), make_tiny_generator()
    write_direction(generator, folder / "turn.json")
    write_domain(generator, folder / "oil")
    return folder


@pytest.fixture(scope="module")
def edited(undisturbed: str, place: Path) -> str:
    """A finished edit run that nothing happened to, on the inline engine."""
    run = str(place / "edited")
    summary = edit_inline(undisturbed, run, place)
    assert summary.is_clean
    assert (summary.outcome.rows, summary.outcome.failed) == (12, 1)
    return run


def test_what_an_edit_run_holds(edited: str) -> None:
    names = query(edited, "SELECT * FROM images LIMIT 0").column_names
    assert names == ["sample_key", "input", "inversion", "turn-1", "turn+1", "oil~0.7"]
    counts = query(edited, "SELECT variant, count(*) AS n FROM edits GROUP BY 1 ORDER BY 1")
    assert counts.to_pylist() == [{"variant": v, "n": 11} for v in ("oil~0.7", "turn+1", "turn-1")]
    failed = query(edited, "SELECT error_kind FROM latents WHERE status = 'failed'").to_pylist()
    assert failed == [{"error_kind": "decode"}]
    page = Path(edited, "report.html").read_text()
    assert '<th scope="col">oil~0.7</th>' in page
    assert "domain oil 0.7" in page


@pytest.fixture(scope="module")
def processes() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.e2e.small_dataset", "tasks.work.edit"])
    return context


@pytest.mark.parametrize("point", REACHED)
def test_driver_killed(
    point: str,
    processes: multiprocessing.context.ForkServerContext,
    undisturbed: str,
    edited: str,
    place: Path,
    tmp_path: Path,
) -> None:
    run = str(tmp_path / "run")
    crash = f"{point}:2:{tmp_path / 'token'}"
    driver = processes.Process(target=crash_edit, args=(crash, undisturbed, run, place))
    driver.start()
    driver.join(60)
    assert driver.exitcode == EXIT_CODE
    assert committed(run) == ({0, 1, 2} if point == "after_marker" else {0, 1})

    assert edit_inline(undisturbed, run, place).is_clean
    assert fingerprint(run) == fingerprint(edited)
    assert rows(run).equals(rows(edited))
    assert verify(run).problems == []


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
    summary = carry_out(undisturbed, run, config_of(undisturbed, place, *sets))
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
    assert "verify     clean" in " ".join(capsys.readouterr().out.split("\t"))
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
