"""A wrong command line: one line that blames the right thing and names the nearest valid one."""

from pathlib import Path

import pytest

from pipeline.cli import run_app
from tests.e2e.small_dataset import Dataset


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("invertt IN OUT", 'Unknown command "invertt". Did you mean "invert"?'),
        ("directions lst", 'Did you mean "list"? Available commands: fit, list.'),
        ("status", "parameter RUN requires an argument. See `refinery status --help`"),
        ("status RUN more", "Unexpected argument: more. See `refinery status --help`"),
        ("invert IN OUT --metod e4e", "Unknown option: --metod. Did you mean --method?"),
        ("invert IN OUT --edit age=2", "Unknown option: --edit. It belongs to edit."),
        ("status RUN --limit=3", "Unknown option: --limit. It belongs to plan, invert, edit, "),
        ("invert IN OUT --limit x", 'Invalid value for --limit: unable to convert "x" into int.'),
        ("train e4ee", "train e4ee: unknown; did you mean 'e4e'?"),
        ("train generator --set data=here", "data: expected a list, [...]; found 'here'"),
        ('train generator --set out=x --set data=["runs"]', "expected Parquet with a column"),
        ("plan nowhere", "nowhere: there is no such file or folder"),
        ("benchmark adaptation --portraits nowhere", "nowhere: expected a Parquet file"),
        ("benchmark inversion --data x --methods e4x", "'e4x' is no row of the table; rows: e4e,"),
        ("status nowhere", "nowhere: no run here (run.json is missing); give the folder that"),
        ("status runs/tired", "(run.json is missing); did you mean runs/tried?; give the folder"),
        ("status runs", "(run.json is missing); below it are the runs tried; give the folder"),
        ("edit runs/tried OUT --engine inline --domain words.txt", "expected a folder with card"),
        ("rescore runs/tried OUT --engine inline --set identity=words.txt", "model_ir_se50.pth or"),
        ("rescore runs/tried runs/tried/x", "lies inside IN"),
    ],
)  # fmt: skip
def test_misuse_is_one_line(
    command: str, said: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_app(command.split()) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.fixture(scope="module")
def made(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run and a file of words."""
    folder = tmp_path_factory.mktemp("misuse")
    (folder / "words.txt").write_text("hello")
    flags = ["--config", dataset.config, "--engine", "inline", "--no-flow", "--limit", "2"]
    assert run_app(["invert", dataset.source, str(folder / "runs" / "tried"), *flags]) == 0
    return folder


@pytest.fixture
def place(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, as the working directory."""
    monkeypatch.chdir(made)
    return made


def test_a_folder_of_another_kind_of_run_is_left_alone(
    dataset: Dataset, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--engine", "inline", "--no-flow"]
    assert run_app(["rescore", "runs/tried", "runs/scores", *flags]) == 0
    before = Path("runs/scores/run.json").read_bytes()
    capsys.readouterr()
    for command in (
        ["edit", "runs/tried", "runs/scores", "--domain", "cartoon", *flags],
        ["invert", dataset.source, "runs/scores", "--config", dataset.config, *flags],
    ):
        assert run_app(command) == 2
        assert capsys.readouterr().err == (
            "error: runs/scores holds what `refinery rescore` made; choose another folder for what "
            f"`refinery {command[0]}` makes\n"
        )
    assert Path("runs/scores/run.json").read_bytes() == before
