"""Commands, their output and exit codes, in this process."""

import dataclasses
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from models.checkpoints.load import LOADERS, load_generator
from models.errors import LedgerError
from models.stylegan2.generator import Generator, weights_hash
from pipeline import cli, faults, worker
from pipeline import run as stages
from pipeline.cli import app, run_app
from pipeline.commands.jobs import begin_flow
from pipeline.commands.terminal import JobOptions
from pipeline.config import load_config
from pipeline.method_table import field_docs
from pipeline.run import carry_out
from tasks.report.words import size
from tasks.run.ledger import read_markers, read_seal
from tasks.run.prediction import read_prediction
from tasks.run.query import query
from tests.e2e.small_dataset import Dataset


@pytest.fixture(scope="module")
def run(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = str(tmp_path_factory.mktemp("cli-run") / "run")
    carry_out(dataset.source, out, load_config(dataset.config, ["engine.kind=inline"]))
    return out


def test_help_is_immediate_and_loads_nothing_heavy() -> None:
    code = (
        "import sys; from pipeline.cli import app; app(['--help'], result_action='return_value');"
        "sys.exit(bool({'torch', 'ray', 'prefect', 'pyarrow', 'pydantic'} & set(sys.modules)))"
    )
    started = time.process_time(), time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in (
        "demo",
        "plan",
        "invert",
        "rescore",
        "status",
        "verify",
        "query",
        "report",
        "methods",
    ):
        assert command in done.stdout
    assert time.monotonic() - started[1] < 10  # 0.3 s on an idle machine


@pytest.mark.parametrize("command", ["status", "verify", "query", "methods"])
def test_looking_does_not_wait_for_torch(command: str, run: str) -> None:
    more = {"query": [run, "SELECT 1"], "methods": []}
    tokens = [command, *more.get(command, [run])]
    code = (
        f"import sys; from pipeline.cli import run_app; assert run_app({tokens!r}) == 0;"
        "sys.exit(bool({'torch', 'ray', 'prefect'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_worker_does_not_wait_for_what_it_does_not_use() -> None:
    code = (
        "import sys, pyarrow; import tasks.work.invert; from pipeline.start import spare_pandas;"
        "spare_pandas(); pyarrow.array([1]); sys.exit(bool({'pandas', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("threads", "loads"), [(1, 1), (2, 2)])
def test_inline_the_models_that_were_hashed_do_the_work(
    threads: int, loads: int, dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But where the work asks for others."""
    made: list[object] = []
    for module in (stages, worker):
        real = module.load_station
        monkeypatch.setattr(
            module, "load_station", lambda *args, real=real: made.append(1) or real(*args)
        )
    command = ["invert", dataset.source, str(tmp_path / "out"), "--config", dataset.config]
    more = ["--limit", "2", "--engine", "inline", "--no-flow", "--set", f"engine.threads={threads}"]
    assert run_app([*command, *more]) == 0
    assert len(made) == loads


def test_a_private_server_starts_only_when_asked_for(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise AssertionError("a private server")

    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    monkeypatch.setattr("pipeline.prefect_server.start_server", fail)
    command = ["invert", dataset.source, str(tmp_path / "out"), "--config", dataset.config]
    assert run_app([*command, "--limit", "2", "--engine", "inline"]) == 0
    assert begin_flow(JobOptions()) == (False, None)
    with pytest.raises(AssertionError, match="a private server"):
        begin_flow(JobOptions(flow=True))


def test_a_server_that_is_named_records_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:4200/api")
    assert begin_flow(JobOptions()) == (True, None)
    assert begin_flow(JobOptions(flow=False)) == (False, None)


def test_an_outage_at_the_end_of_a_run_is_waited_for(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    real_seal, answers = stages.seal, iter([False, False, True])

    def seal(run_uri: str) -> str:
        if next(answers):
            return real_seal(run_uri)
        raise LedgerError(f"{run_uri}: no answer") from ConnectionError("refused")

    monkeypatch.setattr(stages, "seal", seal)
    monkeypatch.setattr(faults.time, "sleep", waits.append)
    config = load_config(dataset.config, ["engine.kind=inline"])
    assert carry_out(dataset.source, str(tmp_path / "run"), config, limit=2).is_clean
    assert waits == list(faults.OUTAGE_WAITS_S[:2])


def test_what_no_wait_mends_ends_the_run_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults.time, "sleep", lambda _: pytest.fail("waited"))
    with pytest.raises(LedgerError, match="damaged"):
        faults.patiently(lambda: (_ for _ in ()).throw(LedgerError("damaged")))


@pytest.mark.parametrize(
    "command", ["demo", "plan", "invert", "rescore", "status", "verify", "query", "report", "train"]
)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"refinery {command}" in out
    assert app[command].help.strip().splitlines()[0] in " ".join(out.split())


def test_dry_run_does_nothing(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    flags = ["--config", dataset.config, "--method", "wplus", "--set", "method.0.steps=7"]
    assert run_app(["invert", dataset.source, str(out), *flags, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "6 (files 6)" in text
    assert "images   12" in text
    assert "steps = 7" in text
    assert 'perceptual = "none"' in text
    assert not out.exists()


def test_plan_warns_of_shards_that_cannot_be_done_in_time(
    dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["plan", dataset.source, "--config", dataset.config, "--probe", "2"]
    command += ["--engine", "inline"]
    assert run_app([*command, "--set", "engine.shard_timeout_s=0.001"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "warning a batch of" in text
    assert "Set engine.shard_timeout_s to at least" in text
    assert run_app(command) == 0
    assert "warning" not in capsys.readouterr().out


def test_plan_measures_and_the_run_keeps_it(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, flags = str(tmp_path / "run"), ["--config", dataset.config, "--engine", "inline"]
    asked = ["--probe", "4", "--price-per-hour", "3600"]
    assert run_app(["plan", dataset.source, out, *flags, *asked]) == 0
    text = capsys.readouterr().out
    said = read_prediction(out)
    assert said is not None
    assert (said.made_by, said.rows, said.workers) == ("refinery plan", 12, 1)
    assert f"{said.seconds:.2f} at 3600 an hour" in text
    assert run_app(["invert", dataset.source, out, *flags, "--no-flow"]) == 0
    summary = capsys.readouterr().out
    markers = read_markers(out).values()
    taken = sum(part.bytes for marker in markers for part in marker.parts.values())
    # What is written does not depend on the load: it is as large as was said.
    assert 0.8 < taken / said.bytes < 1.25
    peak = max(marker.memory_bytes for marker in markers)
    assert 0.5 < peak / said.memory_bytes < 2
    for name, value, before in (
        ("disk", size(taken), size(said.bytes)),
        ("memory of a worker", size(peak), size(said.memory_bytes)),
    ):
        line = next(line for line in summary.splitlines() if line.startswith(name))
        assert f"{value} (predicted {before}, " in line
        assert f"{value} (predicted {before}, " in (Path(out) / "report.html").read_text()
    assert read_prediction(out) == said
    seal = read_seal(out)
    assert seal is not None
    kept = seal.get("forecast", {})
    assert kept.keys() == {"time", "disk", "memory of a worker"}
    assert kept["disk"] == {"predicted": said.bytes, "took": taken}
    assert kept["time"]["predicted"] == said.seconds


def test_plan_measures(dataset: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--config", dataset.config, "--engine", "inline"]
    assert run_app(["plan", dataset.source, *flags, "--probe", "4"]) == 0
    text = capsys.readouterr().out
    assert "4 images on cpu, 0 failed" in text
    assert "CPU-core hours" in text
    assert "images/s" in text
    assert "an image)" in text


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files of generators that this process reads, in order."""
    found: list[Path] = []
    generator, discriminator = LOADERS["native"]

    def counted(path: Path) -> Generator:
        found.append(path)
        return generator(path)

    monkeypatch.setitem(LOADERS, "native", (counted, discriminator))
    return found


@pytest.mark.parametrize("flags", [["--probe", "2"], ["--probe", "0"]])
def test_plan_loads_the_generator_once(
    dataset: Dataset, tmp_path: Path, loads: list[Path], flags: list[str]
) -> None:
    config = tmp_path / "config.toml"
    written = Path(dataset.config).read_text()
    config.write_text(re.sub("shard_size = .*", 'shard_size = "auto"', written))
    command = ["plan", dataset.source, "--config", str(config), "--engine", "inline"]
    assert run_app([*command, *flags]) == 0
    assert len(loads) == 1


def test_a_run_and_its_edits_load_the_generator_once_each(
    dataset: Dataset, tmp_path: Path, loads: list[Path]
) -> None:
    run, edits = str(tmp_path / "run"), str(tmp_path / "edits")
    flags = ["--engine", "inline", "--no-flow"]
    config = ["--set", "generator=faces64", "--set", "perceptual=none", "--method", "e4e"]
    assert run_app(["invert", dataset.source, run, *config, *flags, "--limit", "2"]) == 0
    assert len(loads) == 1
    assert run_app(["edit", run, edits, "--edit", "age=+2", *flags]) == 0
    assert len(loads) == 2
    (row,) = query(edits, "SELECT min(age) AS age FROM latents WHERE status = 'ok'").to_pylist()
    assert 10 < row["age"] < 100  # the bundled scorer is known by the generator's hash


def test_status_verify_and_report(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(["status", run]) == 0
    text = capsys.readouterr().out
    assert "6 of 6 committed, 0 pending" in text
    assert "12 of 12" in text
    assert "1 (decode 1)" in text
    assert run_app(["verify", run]) == 0
    assert f"{run}: clean" in capsys.readouterr().out
    assert run_app(["report", run]) == 0
    assert capsys.readouterr().out.strip() == f"{run}/report.html"


def test_a_damaged_part_is_found(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "run")
    carry_out(dataset.source, out, load_config(dataset.config, ["engine.kind=inline"]), limit=2)
    (part,) = (tmp_path / "run" / "latents").iterdir()
    part.write_bytes(part.read_bytes()[:-1] + b"?")
    assert run_app(["verify", out]) == 1
    assert part.name in capsys.readouterr().out


def test_query_prints_and_exports(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sql = "SELECT status, count(*) AS n FROM latents GROUP BY status ORDER BY status"
    assert run_app(["query", run, sql]) == 0
    text = capsys.readouterr().out
    assert "failed" in text
    assert "11" in text
    assert run_app(["query", run, sql, "--out", str(tmp_path / "n.json")]) == 0
    assert json.loads((tmp_path / "n.json").read_text()) == [
        {"status": "failed", "n": 1},
        {"status": "ok", "n": 11},
    ]
    assert "2 rows written" in capsys.readouterr().out
    assert run_app(["query", run, "SELEC 1"]) == 2
    assert "Views: images, latents, runs, samples, shards" in capsys.readouterr().err


def test_wide_results_are_shown_one_value_a_line(
    run: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli.console, "_width", 80)
    assert run_app(["query", run, "SELECT * FROM latents ORDER BY sample_key LIMIT 1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("sample_key" in line and "face-00.png" in line for line in lines)
    assert any("w_plus" in line and "... 128]" in line for line in lines)


def test_methods_lists_settings_with_their_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(["methods"]) == 0
    text = capsys.readouterr().out
    assert "steps = 100" in text
    assert "Updates for each picture" in text
    assert "checkpoint = None" in text


def test_field_docs_are_read_from_the_source() -> None:
    from models.inversion.wplus import WPlusConfig

    docs = field_docs(WPlusConfig)
    assert docs["perceptual_weight"] == "Weight of the perceptual distance."
    assert set(docs) == {field.name for field in dataclasses.fields(WPlusConfig)}


def test_convert(dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(load_config(dataset.config).job.generator)
    target = tmp_path / "tiny.pt"
    assert run_app(["convert", source, str(target)]) == 0
    assert str(target) in capsys.readouterr().out
    assert weights_hash(load_generator(target)) == weights_hash(load_generator(source))
    assert run_app(["convert", source, str(tmp_path / "tiny.onnx")]) == 2
    assert "expected .safetensors" in capsys.readouterr().err


def test_statistics(dataset: Dataset, tmp_path: Path) -> None:
    from models.statistics import load_statistics

    source = load_config(dataset.config).job.generator
    target = tmp_path / "statistics.safetensors"
    assert run_app(["statistics", source, str(target), "--samples", "64"]) == 0
    assert load_statistics(target).generator_hash == weights_hash(load_generator(source))


def test_errors_of_ours_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(["status", "/no/such/run"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: /no/such/run: no run here")
    assert len(err.splitlines()) == 1


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(["status", "/no/such/run", "--debug"]) == 2
    err = capsys.readouterr().err
    assert LedgerError.__name__ in err
    assert "read_run" in err


def test_bugs_and_interrupts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr("pipeline.status.read_status", fail)
    error: BaseException = RuntimeError("unforeseen")
    assert run_app(["status", "x"]) == 3
    assert "internal error (RuntimeError): unforeseen" in capsys.readouterr().err
    error = KeyboardInterrupt()
    assert run_app(["status", "x"]) == 130
    assert "run again to go on" in capsys.readouterr().err


LEAVING = """
import atexit, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from pipeline import cli

idle = ThreadPoolExecutor(1)
idle.submit(int).result()
threading.Thread(target=lambda: (time.sleep(0.5), print("thread"))).start()
atexit.register(lambda: print("atexit", threading.active_count()))
cli.run_app = lambda tokens: print("command") or 3
cli.main()
"""


def test_the_process_ends_with_all_that_it_owes(tmp_path: Path) -> None:
    """It leaves without the interpreter's own end."""
    ended = subprocess.run([sys.executable, "-c", LEAVING], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (3, "")
    assert ended.stdout.splitlines() == ["command", "thread", "atexit 1"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_a_full_disk_under_the_output_is_told() -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "pipeline.cli", "methods"]
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 2
    assert "No space left on device" in ended.stderr
