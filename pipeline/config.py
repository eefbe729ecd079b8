"""TOML plus `--set a.b=v` -> one frozen, validated config, whose plain values all else reads."""

import dataclasses
import difflib
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar, get_args, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from models.errors import ConfigError
from models.inversion.registry import METHODS, method_class
from tasks.job import Job, JobConfig, MethodConfig
from tasks.run.lease import IfBusy
from tasks.run.run_json import read_declared, read_run
from tasks.work.kinds import job_class

T = TypeVar("T")
Tables = dict[str, Any]
Homes = Mapping[str, Sequence[str]]
"""The keys of each table."""

DEFAULT_GENERATOR = "faces64"
DEFAULT_METHODS = ("e4e",)
DEFAULT_PICTURES = "auto"


class EngineConfig(BaseModel):
    """Where and how the shards run. Only `threads` and the kind of device touch the last bits."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["ray", "inline"] = "ray"
    """ray: a pool of actors; inline: a loop in this process, for debugging."""
    address: str = ""
    """Ray cluster ("auto", "ray://..."); empty: RAY_ADDRESS, else a Ray of our own on loopback."""
    actors: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Workers; auto: as many as the cluster has room for, growing when nodes join."""
    gpus_per_actor: Literal["auto"] | Annotated[float, Field(ge=0)] = "auto"
    """Whole GPUs or a fraction; auto: 1 where the cluster has GPUs, else 0 (CPU)."""
    threads: int = Field(default=1, ge=1)
    """CPU threads of PyTorch per worker. Sums split by thread count, so another value moves results
    by rounding; one thread times many actors keeps bytes independent of the number of cores."""
    shards_in_flight: int = Field(default=2, ge=1, le=8)
    """Shards overlapped in one actor: one computes while others read, decode and write."""
    shard_size: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Samples per shard for loose files and Parquet; a tar is one shard. auto: the run's, which
    begins with what `refinery plan` has chosen for it, else with 256, above 256 px with fewer in
    proportion to its side: 64 at 1024 px."""
    memory_gb: Literal["auto"] | Annotated[float, Field(gt=0)] = "auto"
    """Of this machine for all workers together, on CPUs without a cluster, in 10^9 bytes. auto:
    what it has, or its container may use. `refinery plan` chooses batch and workers by it."""
    max_attempts: int = Field(default=3, ge=1)
    """Tries per shard before it is quarantined."""
    retry_wait_s: float = Field(default=2.0, ge=0)
    """Wait before the second try; four times longer for each further one."""
    shard_timeout_s: float = Field(default=7200.0, gt=0)
    """A worker that holds a shard for longer, and finishes no batch of it, is restarted."""
    heartbeat_s: float = Field(default=45.0, gt=0)
    """A worker that gives no sign of life for longer is restarted."""
    straggler_factor: float = Field(default=3.0, ge=0)
    """When nothing else is left, a shard that takes so many times the median is also given to an
    idle worker; the first commit counts. 0: never."""
    metrics_port: int = Field(default=0, ge=0, le=65535)
    """The driver's own Prometheus endpoint; 0: none. A cluster's Ray has the metrics in any case, a
    Ray of our own has no endpoint."""
    metrics_address: str = "127.0.0.1"
    """Where that listens; 0.0.0.0 to be scraped from elsewhere."""
    patience_s: float = Field(default=600.0, gt=0)
    """Give up when storage fails, or no worker comes up, for so long."""
    if_busy: IfBusy = "refuse"
    """Another driver is at work on the run: refuse, wait for its end, or take the run from it."""


J = TypeVar("J", bound=Job)


@dataclass(frozen=True, kw_only=True)
class RunConfig(Generic[J]):
    """One run: the job, which decides the bytes and travels to the workers, and the engine."""

    job: J
    engine: EngineConfig = field(default_factory=EngineConfig)

    def to_tables(self) -> Tables:
        """Plain values in the layout of the TOML file; an inversion's are read back unchanged."""
        plain = TypeAdapter(Any).dump_python(
            {**self.job.to_dict(), "engine": self.engine}, mode="json"
        )
        if "methods" in plain:
            chain = plain.pop("methods")
            plain["method"] = [{"name": m["name"], **_without_none(m["settings"])} for m in chain]
        tables = {k: _without_none(v) if isinstance(v, dict) else v for k, v in plain.items()}
        # TOML: what stands behind a table would belong to it.
        return dict(
            sorted(_without_none(tables).items(), key=lambda item: isinstance(item[1], dict | list))
        )

    def to_toml(self) -> str:
        """The resolved config as a TOML file."""
        import tomlkit

        return tomlkit.dumps(self.to_tables())


InvertConfig = RunConfig[JobConfig]


def load_config(
    path: str | None = None, sets: Sequence[str] = (), methods: Sequence[str] = ()
) -> InvertConfig:
    """Read, override and validate the config of a run of inversions.

    Args:
        path: TOML file; None for the defaults (generator faces64, method e4e).
        sets: overrides `a.b=value`; a value is TOML, or a plain string where it is not TOML.
        methods: names of a chain that replaces the file's; a table of the file with the same name
            keeps its settings.

    Raises:
        ConfigError: the file cannot be read, or a key or value is wrong; names the key and, for an
            unknown one, the nearest valid key.
    """
    tables = read_toml(path)
    _choose_methods(tables, methods)
    return validate(apply_sets(tables, sets))


def validate(tables: Tables) -> InvertConfig:
    """The config of a run of inversions from the tables of a TOML file.

    Raises:
        ConfigError: see `load_config`.
    """
    chain = tables.get("method", [{"name": name} for name in DEFAULT_METHODS])
    if not isinstance(chain, list) or not chain:
        raise ConfigError(
            f"method: expected one or more [[method]] tables, found {chain!r}; "
            'write [[method]] and name = "e4e"'
        )
    methods = tuple(read_method(table, f"method.{index}") for index, table in enumerate(chain))
    if method_class(methods[0].name).needs_init:
        raise ConfigError(
            f"method.0: {methods[0].name} refines the result of an earlier method and cannot be "
            "the first of the chain; put one such as e4e before it"
        )
    tables = {"generator": DEFAULT_GENERATOR, "output": {}, **tables}
    if isinstance(tables["output"], dict):
        tables["output"] = {"pictures": DEFAULT_PICTURES, **tables["output"]}
    tables.pop("method", None)
    return run_config(JobConfig, tables, {"methods": methods}, names=("method",))


def load_stored_config(
    kind: str, source: str, path: str | None = None, sets: Sequence[str] = ()
) -> RunConfig[Any]:
    """Read, override and validate the config of a run over the samples of another.

    Args:
        kind: a name of `tasks.work.kinds.KINDS`.
        source: the run.

    Raises:
        LedgerError: there is no such run.
        ConfigError: as `load_config`.
    """
    tables = apply_sets(read_toml(path), sets)
    return run_config(job_class(kind), {**stored_defaults(source), **tables}, stored_job(source))


def stored_job(source: str) -> dict[str, Any]:
    """What a job over stored samples says of their run, and no user does."""
    record = read_run(source)
    return {
        "source": source,
        "source_run": record["run_id"],
        "generator": record["config"]["generator"],
        "method": read_declared(source).method,
    }


def stored_defaults(source: str) -> Tables:
    """Settings that follow the run they are about where a user says nothing."""
    return {"precision": read_run(source)["config"]["precision"]}


def run_config(
    job: type[J], tables: Tables, given: Mapping[str, Any], names: Sequence[str] = ()
) -> RunConfig[J]:
    """Tables of a file as job and engine.

    Args:
        given: fields of the job that do not come from the tables.
        names: keys that are known beside those of the job, for the nearest name.

    Raises:
        ConfigError: a key or value is wrong; names the key and, for an unknown one, the nearest.
    """
    own = {key: value for key, value in tables.items() if key != "engine"}
    allowed = [name for name in _names(job) if name not in given]
    others = {"engine": EngineConfig}
    for key in own:
        if key not in allowed:
            known = [*allowed, *names, "engine"]
            raise ConfigError(_unknown_key("", key, known, _homes(job, others)))
    made = validated(job, {**own, **given}, others=others)
    return RunConfig(job=made, engine=_engine(tables))


def load_engine(path: str | None, sets: Sequence[str]) -> EngineConfig:
    """The engine of a run whose job stands in it: the file's [engine], and overrides.

    Raises:
        ConfigError: as `load_config`, or an override is not of the engine.
    """
    for item in sets:
        if not _is_of_engine(item):
            raise ConfigError(
                f"--set {item}: the run goes on with its own settings; only engine.* may be set"
            )
    return engine_of(path, sets)


def engine_of(path: str | None, sets: Sequence[str]) -> EngineConfig:
    """The engine of any job, before the rest is read: that needs PyTorch.

    Raises:
        ConfigError: as `load_config`.
    """
    return _engine(apply_sets(read_toml(path), filter(_is_of_engine, sets)))


def _engine(tables: Tables) -> EngineConfig:
    engine = tables.get("engine", {})
    if not isinstance(engine, dict):
        raise ConfigError(f"engine: expected a table, found {engine!r}")
    return validated(EngineConfig, engine, "engine")


def _is_of_engine(item: str) -> bool:
    return item.partition(".")[0].strip() == "engine"


def load_dataclass(cls: type[T], path: str | None, sets: Sequence[str]) -> T:
    """A frozen config dataclass (the `Fit...Config` of a training) from TOML and overrides.

    Raises:
        ConfigError: as `load_config`.
    """
    return validated(cls, apply_sets(read_toml(path), sets))


def read_toml(path: str | None) -> Tables:
    """The tables of a local TOML file; none of no file.

    Raises:
        ConfigError: no such file, or not TOML (with line and column).
    """
    if not path:
        return {}
    try:
        return tomllib.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise ConfigError(
            f"config {path}: cannot be read ({error.strerror}); check the path"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config {path}: not valid TOML: {error}") from error


def apply_sets(tables: Tables, sets: Iterable[str]) -> Tables:
    """Write overrides into the tables. `method.0.steps=20` reaches into a list of tables.

    Returns:
        The same tables.

    Raises:
        ConfigError: no "=", or a path through something that is not a table.
    """
    for item in sets:
        _apply_set(tables, item)
    return tables


def _apply_set(tables: Tables, item: str) -> None:
    dotted, equals, text = item.partition("=")
    names = [name.strip() for name in dotted.split(".")]
    if not equals or not all(names):
        raise ConfigError(f"--set {item}: expected key=value, e.g. --set input.fit=resize")
    node: Any = tables
    for depth, name in enumerate(names):
        where, is_last = ".".join(names[:depth]), depth == len(names) - 1
        if isinstance(node, list):
            index = _list_index(node, name, where, item)
            if is_last:
                raise ConfigError(f"--set {item}: {dotted} is a table; name a key inside it")
            node = node[index]
        elif not isinstance(node, dict):
            raise ConfigError(f"--set {item}: {where} is {node!r}, not a table")
        elif is_last:
            node[name] = _parse_value(text.strip())
        else:
            node = node.setdefault(name, {})


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error message: the nearest known name, or all of them."""
    known = sorted(known)
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {found[0]!r}?" if found else f"known: {', '.join(known)}"


def _choose_methods(tables: Tables, names: Sequence[str]) -> None:
    chain = tables.get("method")
    if not names:
        tables.setdefault("method", [{"name": name} for name in DEFAULT_METHODS])
        return
    written = [t for t in chain if isinstance(t, dict)] if isinstance(chain, list) else []
    by_name = {table.get("name"): table for table in reversed(written)}
    tables["method"] = [dict(by_name.get(name, {"name": name})) for name in names]


def _list_index(node: list[Any], name: str, where: str, item: str) -> int:
    if not name.isdigit() or int(name) > len(node):
        raise ConfigError(
            f"--set {item}: {where} has {len(node)} tables; expected a number from 0 to "
            f"{len(node)} (the last adds one), found {name!r}"
        )
    if int(name) == len(node):
        node.append({})
    return int(name)


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def read_method(table: Any, where: str) -> MethodConfig:
    """A [[method]] table as a method with all its settings.

    Raises:
        ConfigError: there is no such method, or a key or value is wrong.
    """
    if not isinstance(table, dict) or "name" not in table:
        raise ConfigError(
            f"{where}: expected a [[method]] table with a name, found {table!r}; "
            f"known methods: {', '.join(sorted(METHODS))}"
        )
    name = table["name"]
    if name not in METHODS:
        raise ConfigError(
            f"{where}.name: unknown method {name!r}; {nearest(str(name), METHODS)} "
            "(`refinery methods` lists them)"
        )
    settings = {key: value for key, value in table.items() if key != "name"}
    config = validated(method_class(name).Config, settings, where, extra_names=("name",))
    return MethodConfig(name=name, settings=dataclasses.asdict(config))


def validated(
    cls: type[T],
    tables: Mapping[str, Any],
    where: str = "",
    extra_names: Sequence[str] = (),
    others: Mapping[str, type] | None = None,
) -> T:
    """Plain tables as a config class.

    Args:
        where: path of the tables in the file, for messages.
        extra_names: keys that are known beside those of the class, for the nearest name.
        others: tables beside those of the class, to which an unknown key may belong.

    Raises:
        ConfigError: a key or value is wrong; names the key and, for an unknown one, the nearest.
    """
    known, homes = _names(cls), _homes(cls, others or {})
    for key in tables:
        if key not in known:
            raise ConfigError(_unknown_key(where, key, [*known, *extra_names], homes))
    try:
        return TypeAdapter(cls).validate_python(tables)
    except ValidationError as error:
        raise ConfigError(_message(cls, error, where, homes)) from error


def _message(cls: type, error: ValidationError, where: str, homes: Homes) -> str:
    first, *others = error.errors(include_url=False)
    location = [str(part) for part in first["loc"]]
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        parent = ".".join(filter(None, [where, *location[:-1]]))
        return _unknown_key(parent, location[-1], _names(_type_at(cls, location[:-1])), homes)
    keys = _keys(cls, location)
    path = ".".join(filter(None, [where, *keys])) or "config"
    if first["type"].startswith("missing"):
        return f"{path}: missing; set it in the config file or with --set {path}=..."
    if first["type"] == "value_error":
        # A dataclass speaks for itself and says what it found.
        reason = first["msg"].removeprefix("Value error, ")
        return f"{where}.{reason}" if where else reason
    # A union reports every branch that refused.
    same = [first, *(e for e in others if _keys(cls, [str(p) for p in e["loc"]]) == keys)]
    wanted = [
        "a list, [...]" if e["type"] == "tuple_type" else e["msg"].removeprefix("Input should be ")
        for e in same
    ]
    return f"{path}: expected {' or '.join(dict.fromkeys(wanted))}; found {first['input']!r}"


def _keys(cls: type, location: Sequence[str]) -> list[str]:
    """The parts of an error's location that are keys; a union adds the name of its branch."""
    return [part for depth, part in enumerate(location) if _is_key(cls, location[:depth], part)]


def _homes(cls: type, others: Mapping[str, type]) -> Homes:
    tables = {name: _type_at(cls, [name]) for name in _names(cls)}
    return {name: _names(table) for name, table in {**tables, **others}.items()}


def _unknown_key(where: str, key: str, known: Iterable[str], homes: Homes) -> str:
    path = f"{where}.{key}" if where else key
    elsewhere = [f"'{home}.{key}'" for home, names in homes.items() if key in names]
    hint = f"did you mean {' or '.join(elsewhere)}?" if elsewhere else nearest(key, known)
    return f"{path}: unknown key; {hint}"


def _names(cls: Any) -> list[str]:
    if isinstance(cls, type) and issubclass(cls, BaseModel):
        return list(cls.model_fields)
    return [f.name for f in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []


def _type_at(cls: Any, location: Sequence[str]) -> Any:
    for part in location:
        if isinstance(cls, type) and issubclass(cls, BaseModel):
            cls = cls.model_fields[part].annotation
        elif dataclasses.is_dataclass(cls):
            cls = get_type_hints(cls).get(part)
        elif part.isdigit() and get_args(cls):  # an item of tuple[Table, ...]
            cls = get_args(cls)[0]
    return cls


def _is_key(cls: Any, parents: Sequence[str], part: str) -> bool:
    names = _names(_type_at(cls, parents))
    return part in names if names else part.isdigit()


def _without_none(table: Mapping[str, Any]) -> Tables:
    return {key: value for key, value in table.items() if value is not None}
