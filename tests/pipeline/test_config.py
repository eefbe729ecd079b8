"""TOML, overrides, and errors that name the key and the nearest valid one."""

import tomllib
from pathlib import Path

import pytest

from models.errors import ConfigError
from pipeline.config import (
    apply_sets,
    engine_of,
    load_config,
    load_dataclass,
    load_engine,
    validate,
)
from tasks.job import MethodConfig
from tasks.training.generator import FitGeneratorConfig


def test_defaults_run_without_a_file() -> None:
    config = load_config()
    assert config.job.generator == "faces64"
    assert [link.name for link in config.job.methods] == ["e4e"]
    assert config.engine.kind == "ray"
    assert config.engine.threads == 1
    assert (config.job.batch, config.job.output.pictures) == ("auto", "auto")


def test_the_engine_is_known_before_the_rest_is_read(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[engine]\nactors = 3\nkind = "inline"\n[[method]]\nname = "no such"\n')
    engine = engine_of(str(path), ["engine.kind=ray", "method.0.steps=nonsense", "seed=x"])
    assert (engine.kind, engine.actors) == ("ray", 3)
    path.write_text("engine = 3")
    with pytest.raises(ConfigError, match="engine: expected a table, found 3"):
        engine_of(str(path), [])
    with pytest.raises(ConfigError, match="only engine"):
        load_engine(None, ["seed=3"])


def test_file_then_methods_then_sets(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        'seed = 3\n[input]\nfit = "resize"\n[[method]]\nname = "wplus"\nsteps = 7\n'
        "[engine]\nactors = 2\n"
    )
    config = load_config(
        str(path), ["method.1.learning_rate=0.5", "engine.actors=4"], ["e4e", "wplus"]
    )
    assert (config.job.seed, config.job.input.fit, config.engine.actors) == (3, "resize", 4)
    assert [link.name for link in config.job.methods] == ["e4e", "wplus"]
    # The chain is the flag's; the file's table of the same name keeps its settings.
    assert config.job.methods[1].settings["steps"] == 7
    assert config.job.methods[1].settings["learning_rate"] == 0.5


def test_method_settings_are_resolved_in_full() -> None:
    (link,) = load_config(None, ["method.0.steps=5"], ["wplus"]).job.methods
    assert link.name == "wplus"
    assert link.settings["steps"] == 5
    assert link.settings["space"] == "w_plus"


def test_the_resolved_config_reads_back_unchanged() -> None:
    config = load_config(
        None, ["method.1.steps=20", 'output.pictures=["inversion"]'], ["e4e", "wplus"]
    )
    text = config.to_toml()
    assert validate(tomllib.loads(text)) == config
    assert "[[method]]" in text


def test_values_are_toml_or_else_text() -> None:
    sets = ("a.b=3", "a.c=true", "a.d=[1, 2]", "a.e=s3://x/y=z", 'a.f="7"', "a.g=")
    tables = apply_sets({}, sets)
    assert tables == {"a": {"b": 3, "c": True, "d": [1, 2], "e": "s3://x/y=z", "f": "7", "g": ""}}


def test_lists_of_tables_are_addressed_by_number() -> None:
    tables = {"method": [{"name": "e4e"}]}
    apply_sets(tables, ["method.1.name=wplus", "method.1.steps=20"])
    assert tables == {"method": [{"name": "e4e"}, {"name": "wplus", "steps": 20}]}


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["engin.kind=ray"], "engin: unknown key; did you mean 'engine'?"),
        (["engine.actor=2"], "engine.actor: unknown key; did you mean 'actors'?"),
        (["shard_size=9"], "shard_size: unknown key; did you mean 'engine.shard_size'?"),
        (["input.actors=2"], "input.actors: unknown key; did you mean 'engine.actors'?"),
        (["fit=crop"], "fit: unknown key; did you mean 'input.fit'?"),
        (["input.fitt=crop"], "input.fitt: unknown key; did you mean 'fit'?"),
        (["method.1.name=wplus", "method.1.step=3"], "method.1.step: unknown key; did you mean"),
        (["method.0.zzz=3"], "method.0.zzz: unknown key; known: "),
        (["method.0.name=w_plus"], "method.0.name: unknown method 'w_plus'; did you mean 'wplus'?"),
        (["engine.kind=slurm"], "engine.kind: expected 'ray' or 'inline'; found 'slurm'"),
        (["engine.actors=0"], "engine.actors: expected 'auto' or greater than or equal to 1; f"),
        (["batch=0"], "batch: expected 'auto' or greater than or equal to 1; found"),
        (["input=3"], "input: expected a dictionary"),
        (
            ['output.pictures=["inpt"]'],
            "output.pictures.0: expected 'input', 'thumbnail' or 'in",
        ),
        (["output.quality=80"], "output.quality: png is lossless, found 80; set output.picture_f"),
        (["method.0.name=wplus", "method.0.steps=-3"], "method.0.steps must be >= 0, got -3"),
        (["method.0.name=wplus", "method.0.steps=x"], "method.0.steps: expected a valid integer"),
        (["seed"], "--set seed: expected key=value"),
        (["method.4.name=e4e"], "--set method.4.name=e4e: method has 1 tables; expected a number"),
        (["method.0=3"], "--set method.0=3: method.0 is a table; name a key inside it"),
        (["seed=1", "seed.a=2"], "--set seed.a=2: seed is 1, not a table"),
    ],
)
def test_errors_name_the_key(sets: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, sets)
    assert str(caught.value).startswith(message)


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config .*none\.toml: cannot be read \(No such file"):
        load_config(str(tmp_path / "none.toml"))
    broken = tmp_path / "broken.toml"
    broken.write_text("seed = = 3\n")
    with pytest.raises(ConfigError, match=r"not valid TOML: .*line 1, column 8"):
        load_config(str(broken))
    table = tmp_path / "table.toml"
    table.write_text('[method]\nname = "e4e"\n')
    with pytest.raises(ConfigError, match=r"expected one or more \[\[method\]\] tables"):
        load_config(str(table))


def test_training_configs_are_read_the_same_way(tmp_path: Path) -> None:
    path = tmp_path / "fit.toml"
    path.write_text('data = ["a.parquet"]\nout = "x"\n[widths]\n4 = 8\n8 = 8\n')
    config = load_dataclass(FitGeneratorConfig, str(path), ["batch=8"])
    assert (config.data, config.widths, config.batch) == (("a.parquet",), {4: 8, 8: 8}, 8)
    with pytest.raises(ConfigError, match="batchh: unknown key; did you mean 'batch'"):
        load_dataclass(FitGeneratorConfig, str(path), ["batchh=8"])
    with pytest.raises(ConfigError, match="out: missing; set it in the config file or with --set"):
        load_dataclass(FitGeneratorConfig, None, ['data=["a"]'])
    with pytest.raises(ConfigError, match=r"^precision: expected 'float32' or .* found 'float8'"):
        load_dataclass(FitGeneratorConfig, str(path), ["precision=float8"])


def test_a_method_config_travels_as_plain_values() -> None:
    (link,) = load_config(None, [], ["e4e"]).job.methods
    assert isinstance(link, MethodConfig)
    assert link.settings["checkpoint"] is None
