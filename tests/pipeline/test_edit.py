"""What the command line asks for, as variants."""

from pathlib import Path

import pytest

from models.errors import ConfigError
from models.stylegan2.generator import Generator
from pipeline.edit import Wishes, load_edit_config
from tasks.edit_job import StrengthConfig
from tasks.job import OutputConfig
from tests.conftest import make_tiny_generator
from tests.tasks.small_edit import make_source, write_direction, write_domain


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, face_bytes: list[bytes]) -> Path:
    """A run, and directions and domains of its generator with the names that the tests use."""
    folder, generator = tmp_path_factory.mktemp("edits"), make_tiny_generator()
    make_source(generator, folder, face_bytes)
    for name in ("age", "smile", "turn", "my/way=1/pose"):
        write_direction(generator, folder / "directions" / f"{name}.json")
    for name in ("impasto", "fantasy", "a", "oil"):
        write_domain(generator, folder / "domains" / name)
    return folder


@pytest.fixture(autouse=True)
def _there(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


def asked(**wishes: object) -> dict[str, tuple[dict[str, float], dict[str, float]]]:
    """Edits and domains by variant, without their places."""
    config = load_edit_config("run", wishes=Wishes(**wishes))
    return {
        v.name: tuple(
            {Path(s.name).stem: s.strength for s in kind} for kind in (v.edits, v.domains)
        )
        for v in config.job.variants
    }


def test_all_wishes_make_one_picture() -> None:
    found = asked(edits=["age=+2", "smile=-1"], domains=["impasto", "fantasy=0.5"], strength=0.8)
    assert found == {
        "age+2_smile-1_impasto~0.8_fantasy~0.4": (
            {"age": 2.0, "smile": -1.0},
            {"impasto": 0.8, "fantasy": 0.4},
        )
    }


def test_each_wish_makes_its_own() -> None:
    found = asked(edits=["age=+2", "smile=-1"], domains=["impasto"], is_each=True)
    assert found == {
        "age+2": ({"age": 2.0}, {}),
        "smile-1": ({"smile": -1.0}, {}),
        "impasto": ({}, {"impasto": 1.0}),
    }


def test_a_sweep_makes_a_picture_for_each_value() -> None:
    assert list(asked(edits=["age=-3:3:1.5"])) == ["age-3", "age-1.5", "age+0", "age+1.5", "age+3"]
    assert list(asked(edits=["age=0:1"])) == ["age+0", "age+1"]
    assert [v[0]["age"] for v in asked(edits=["age=0:0.3:0.1"]).values()] == [0, 0.1, 0.2, 0.3]
    found = asked(edits=["age=-1:1:2"], domains=["a=0:1:0.5"])
    assert list(found) == [f"age{e}_{d}" for e in ("-1", "+1") for d in ("a~0", "a~0.5", "a")]


def test_a_file_is_named_by_its_stem() -> None:
    found = asked(edits=["directions/my/way=1/pose.json=+1"], domains=["domains/oil/=0.5"])
    assert found == {"pose+1_oil~0.5": ({"pose": 1.0}, {"oil": 0.5})}


def test_blends_name_sample_share_and_rows() -> None:
    wishes = Wishes(blends=["a/b.png=1@8-9,2", "c:1=0.5"], is_each=True)
    first, second = load_edit_config("run", wishes=wishes).job.variants
    assert (first.name, second.name) == ("a-b.png~1~8-9,2", "c-1~0.5")
    assert (first.blends[0].sample_key, first.blends[0].share) == ("a/b.png", 1.0)
    assert (first.blends[0].rows, second.blends[0].rows) == ((8, 9, 2), ())


@pytest.mark.parametrize(
    ("wishes", "reason"),
    [
        ({}, "nothing to make"),
        ({"edits": ["age"]}, r"--edit age: expected NAME=STRENGTH"),
        ({"edits": ["age=old"]}, r"--edit age=old: expected a number or a sweep"),
        ({"edits": ["age=3:1:1"]}, "a sweep FROM:TO:STEP that reaches TO"),
        ({"edits": ["age=1:3:0"]}, "a sweep FROM:TO:STEP that reaches TO"),
        ({"edits": ["age=1", "age=2"]}, "age is asked for twice in one picture"),
        ({"edits": ["age=0:99:1"]}, "100 pictures of every sample; expected at most 64"),
        ({"edits": ["age=1"], "strength": 0.5}, "it is the strength of --domain"),
        ({"blends": ["a.png"]}, "expected SAMPLE=SHARE"),
        ({"blends": ["a.png=1@x"]}, "expected rows such as 8-9"),
    ],
)
def test_malformed_wishes(wishes: dict[str, object], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        asked(**wishes)


def test_a_file_names_many_pictures(tmp_path: Path) -> None:
    path = tmp_path / "edits.toml"
    path.write_text(
        'batch = 8\n[[variant]]\nname = "old"\nedits = { age = 2.0 }\nresidual = 0.5\n'
        '[[variant]]\nname = "oil"\ndomains = { impasto = 0.7 }\n'
        'blends = [{ sample_key = "a.png", rows = [1, 2] }]\n[engine]\nkind = "inline"\n'
    )
    config = load_edit_config("run", str(path), ["batch=4"], Wishes(edits=["smile=1"]))
    old, oil, smile = config.job.variants
    assert (old.name, oil.name, smile.name) == ("old", "oil", "smile+1")
    assert (config.job.batch, config.engine.kind) == (4, "inline")
    assert (old.residual, oil.blends[0].rows) == (0.5, (1, 2))
    path.write_text('[[variant]]\nname = "old"\nedit = { age = 2.0 }\n')
    with pytest.raises(ConfigError, match=r"variant\.0\.edit: unknown key; did you mean 'edits'\?"):
        load_edit_config("run", str(path))


@pytest.mark.parametrize(
    ("sets", "reason"),
    [
        (["batch=0"], "batch: expected 'auto' or greater than or equal to 1; found 0"),
        (["variant=[{name='a', residual=-1.0}]"], r"variant\.0\.residual: expected greater than"),
        (["source_run=x"], "source_run: unknown key"),
        (["batc=2"], "batc: unknown key; did you mean 'batch'"),
        (["engine.actor=2"], "engine.actor: unknown key; did you mean 'actors'"),
    ],
)
def test_errors_name_the_key(sets: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load_edit_config("run", None, sets, Wishes(edits=["age=1"]))


def test_names_become_places_that_workers_find(place: Path) -> None:
    wishes = Wishes(edits=["turn=1"], domains=["oil"])
    (found,) = load_edit_config("run", wishes=wishes).job.variants
    assert found.edits == (StrengthConfig(name=f"{place}/directions/turn.json", strength=1.0),)
    assert found.domains == (StrengthConfig(name=f"{place}/domains/oil", strength=1.0),)
    with pytest.raises(ConfigError, match="did you mean 'turn'"):
        load_edit_config("run", wishes=Wishes(edits=["turm=1"]))


def test_the_edited_run_decides_what_is_not_said(
    tmp_path: Path, tiny_generator: Generator, face_bytes: list[bytes]
) -> None:
    output = OutputConfig(pictures=("inversion",), picture_format="webp")
    source = make_source(tiny_generator, tmp_path, face_bytes, output=output)
    variant = "variant=[{name='same'}]"
    job = load_edit_config(source, None, [variant]).job
    assert job.output == output
    assert (job.precision, job.method) == ("float32", "wplus")
    for flag in ("output.picture_format=png", "output.pictures=['input']"):
        with pytest.raises(ConfigError, match="has stored no input pictures, only inversion"):
            load_edit_config(source, None, [variant, flag])
