"""The law of methods: what every line of the registry must keep, on a tiny random generator.

A new method is picked up here without an edit: settings that make it quick (`steps`) and its assets
(`checkpoint`) are filled in by name. The last tests hold broken methods against the same laws, so
that a law that cannot fail is itself a failure.
"""

import dataclasses
import hashlib
import importlib.util
import json
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tomlkit
import torch

from models.errors import AssetError, ConfigError
from models.inversion.base import Inversion, Method, SampleRng
from models.inversion.e4e import E4e
from models.inversion.registry import METHODS, load_method, method_class
from models.stylegan2.generator import Generator, weights_hash
from tests.models.tiny_networks import save_network

SEEDS = [11, 12, 13]
Make = Callable[[], Method]


@pytest.fixture
def settings(tmp_path: Path, tiny_generator: Generator) -> Callable[[type[Method]], dict[str, Any]]:
    """Quick settings and tiny assets for any method, by field name of its Config."""

    def fill(method: type[Method]) -> dict[str, Any]:
        names = {f.name for f in dataclasses.fields(method.Config)}
        found: dict[str, Any] = {}
        if "steps" in names:
            found["steps"] = 4
        if "perceptual" in names:
            found["perceptual"] = "refinery"
        for name, owner in (("checkpoint", method), ("first_stage", E4e)):
            if name in names:
                path = tmp_path / f"{name}.safetensors"
                found[name] = str(save_tiny_network(path, owner, tiny_generator))
        return found

    return fill


def save_tiny_network(path: Path, method: type[Method], generator: Generator) -> Path:
    """A file for `checkpoint`."""
    return save_network(path, generator, lambda: method.tiny_network(generator), seed=3)


@pytest.fixture(params=sorted(METHODS))
def make(request: pytest.FixtureRequest, settings: Any, tiny_generator: Generator) -> Make:
    """Builds a registered method on the tiny generator."""
    name = request.param
    return lambda: load_method(name, tiny_generator, **settings(method_class(name)))


def pictures() -> torch.Tensor:
    """Three smooth pictures in [-1, 1], [3 3 32 32]."""
    small = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(4)) * 2 - 1
    return torch.nn.functional.interpolate(small, 32, mode="bicubic").clamp(-1, 1)


def start(method: Method, n: int = 3) -> Inversion | None:
    """What an earlier method of a chain would have left, where one is needed."""
    if not method.needs_init:
        return None
    generator = method.generator
    return Inversion(w_plus=generator.latent_avg.expand(n, generator.num_ws, -1).clone())


def invert(method: Method, rows: slice = slice(0, 3)) -> Inversion:
    init = start(method)
    return method.invert(pictures()[rows], init and init[rows], SampleRng(SEEDS[rows]))


def doors(found: Inversion) -> dict[str, torch.Tensor]:
    """Every tensor of a result, by name."""
    return found.tensors()


def assert_same(a: Inversion, b: Inversion, tolerance: float) -> None:
    first, second = doors(a), doors(b)
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], atol=tolerance, rtol=tolerance)


# ---------------------------------------------------------------------- the laws


def law_shape(make: Make) -> None:
    """w+ is [N L D] float32 and finite; every other door fits the generator (it renders)."""
    method = make()
    found, generator = invert(method), method.generator
    assert found.w_plus.shape == (3, generator.num_ws, generator.w_dim)
    for name, value in doors(found).items():
        assert value.isfinite().all(), name
        assert not value.requires_grad, name
        assert len(value) == 3, name
    assert found.w_plus.dtype == torch.float32
    assert found.render(generator).shape == (3, 3, generator.resolution, generator.resolution)
    assert not found.failures


def law_batch_invariance(make: Make) -> None:
    """Row n depends on picture n alone: alone, in another batch, in another order."""
    whole = invert(make())
    alone = invert(make(), slice(1, 2))
    assert_same(whole[1:2], alone, 1e-4)
    method, init = make(), start(make(), 2)
    swapped = method.invert(pictures()[[2, 0]], init, SampleRng([SEEDS[2], SEEDS[0]]))
    assert_same(whole[2:3], swapped[0:1], 1e-4)
    assert_same(whole[0:1], swapped[1:2], 1e-4)


def law_determinism(make: Make) -> None:
    """The same seed gives the same bits, whatever torch's global generator holds."""
    torch.manual_seed(1)
    first = invert(make())
    torch.manual_seed(2)
    assert_same(first, invert(make()), 0.0)
    method = make()
    assert_same(invert(method), invert(method), 0.0)


def law_generator_untouched(make: Make) -> None:
    """Weights, flags, precision and the global random stream are as before, on errors too."""
    method = make()
    generator = method.generator
    before = generator_state(generator)
    invert(method)
    assert generator_state(generator) == before
    for parameter in generator.parameters():
        parameter.requires_grad_(True)
    before = generator_state(generator)
    invert(method)
    assert generator_state(generator) == before
    assert all(p.grad is None for p in generator.parameters())
    fail_at_second_render(generator)
    try:
        invert(method)
    except RuntimeError as error:
        assert str(error) == "second render"  # noqa: PT017 - a method need not render at all
    del generator.synthesis
    assert generator_state(generator) == before
    invert(method)


def generator_state(generator: Generator) -> tuple[Any, ...]:
    return (
        weights_hash(generator),
        [p.requires_grad for p in generator.parameters()],
        generator.training,
        generator.compute_dtype,
        generator.form,
        generator.memory_format,
        torch.get_rng_state().tolist(),
        len(generator._forward_hooks),
    )


def fail_at_second_render(generator: Generator) -> None:
    original, calls = generator.synthesis, []

    def failing(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("second render")
        return original(*args, **kwargs)

    generator.synthesis = failing  # type: ignore[method-assign]


def law_render_is_the_result(make: Make) -> None:
    """Rendering is repeatable and goes row by row: what was scored can be drawn again."""
    method = make()
    found, generator = invert(method), method.generator
    whole = found.render(generator)
    assert torch.equal(found.render(generator), whole)
    parts = [found[0:1], found[1:3]]
    rows = torch.cat([part.render(generator) for part in parts])
    torch.testing.assert_close(rows, whole, atol=1e-4, rtol=1e-4)
    assert_same(Inversion.cat(parts), found, 0.0)


def law_failures_stay_in_their_row(make: Make) -> None:
    """A picture that is not finite fails with a reason, or not at all; its neighbours go on."""
    clean = invert(make())
    broken = pictures()
    broken[1, 0, 3, 3] = float("nan")
    method = make()
    found = method.invert(broken, start(method), SampleRng(SEEDS))
    assert set(found.failures) <= {1}
    assert all(found.failures.values())
    for name, value in doors(found).items():
        assert value.isfinite().all(), name
    assert_same(found[0:1], clean[0:1], 1e-4)
    assert_same(found[2:3], clean[2:3], 1e-4)


def law_bad_calls_are_refused(make: Make) -> None:
    """Pictures of another size, missing seeds and a missing start are named before any work."""
    method = make()
    size = method.generator.resolution
    with pytest.raises(ValueError, match=rf"expected pictures \[N 3 {size} {size}\]"):
        method.invert(torch.zeros(2, 3, size // 2, size // 2), start(method, 2), SampleRng([0, 1]))
    with pytest.raises(ValueError, match="row counts differ"):
        method.invert(torch.zeros(2, 3, size, size), start(method, 2), SampleRng([0]))
    if method.needs_init:
        with pytest.raises(ConfigError, match="put another"):
            method.invert(pictures(), None, SampleRng(SEEDS))


LAWS = (
    law_shape,
    law_batch_invariance,
    law_determinism,
    law_generator_untouched,
    law_render_is_the_result,
    law_failures_stay_in_their_row,
    law_bad_calls_are_refused,
)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(law: Callable[[Make], None], make: Make) -> None:
    law(make)


# ---------------------------------------------------------------------- configs and assets


@pytest.mark.parametrize("name", sorted(METHODS))
def test_config_round_trip(name: str, settings: Any) -> None:
    """Defaults and settings survive TOML; a Config is frozen, keyword-only and documented."""
    cls = method_class(name)
    for config in (cls.Config(), cls.Config(**settings(cls))):
        values = {k: v for k, v in dataclasses.asdict(config).items() if v is not None}
        text = tomlkit.dumps(values)
        assert cls.Config(**tomllib.loads(text)) == config
        assert json.loads(json.dumps(values)) == values
        with pytest.raises(dataclasses.FrozenInstanceError):
            config.anything = 1
    assert cls.Config.__pydantic_config__ == {"extra": "forbid"}
    assert all(f.kw_only for f in dataclasses.fields(cls.Config))
    assert cls.summary
    assert "\n" not in cls.summary


@pytest.mark.parametrize("name", sorted(METHODS))
def test_an_unknown_setting_is_refused_by_name(name: str, tiny_generator: Generator) -> None:
    with pytest.raises(
        ConfigError, match=rf"method {name}: unknown setting 'stepz'; known settings"
    ):
        load_method(name, tiny_generator, stepz=3)


def test_an_unknown_method_lists_the_known_ones(tiny_generator: Generator) -> None:
    with pytest.raises(ConfigError, match=r"'e5e' is unknown; known methods: .*e4e.*wplus"):
        load_method("e5e", tiny_generator)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_missing_asset_fails_before_any_work(
    name: str, tiny_generator: Generator, tmp_path: Path
) -> None:
    """Loading fails, naming the setting; the generator is not asked to render."""
    fields = {f.name for f in dataclasses.fields(method_class(name).Config)}
    if "checkpoint" not in fields:
        pytest.skip(f"{name} has no weight file of its own")
    fail_at_second_render(tiny_generator)
    with pytest.raises(AssetError, match="checkpoint"):
        load_method(name, tiny_generator)
    absent = tmp_path / "absent.safetensors"
    with pytest.raises(AssetError, match=r"absent\.safetensors: no such file.*`checkpoint`"):
        load_method(name, tiny_generator, checkpoint=str(absent))


@pytest.mark.parametrize("name", sorted(METHODS))
def test_hashes_cover_the_weights(name: str, make: Make) -> None:
    """Every hash is a sha256, the same each time a method is loaded."""
    found = make().hashes()
    assert found == make().hashes()
    assert all(len(value) == 64 for value in found.values())


def test_the_registry_is_lazy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing the registry imports no method."""
    modules = {line.split(":")[0] for line in METHODS.values()}
    for module in modules:
        monkeypatch.delitem(sys.modules, module, raising=False)
    spec = importlib.util.find_spec("models.inversion.registry")
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert not modules & set(sys.modules)


NEW_METHOD = '''
from dataclasses import dataclass
from typing import ClassVar
from models.inversion.base import Inversion, Method

@dataclass(frozen=True, kw_only=True)
class MeanConfig:
    """Nothing but a strength."""
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    strength: float = 0.0

class Mean(Method):
    Config = MeanConfig
    summary = "the mean code, for every picture"

    def invert(self, images, init, rng):
        self.check_inputs(images, init, rng)
        shift = self.config.strength * images.nan_to_num().mean((1, 2, 3))
        codes = self.generator.latent_avg.expand(len(images), self.generator.num_ws, -1)
        return Inversion(w_plus=codes + shift[:, None, None])
'''


def test_a_new_method_is_one_file_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_generator: Generator
) -> None:
    (tmp_path / "brand_new_mean.py").write_text(NEW_METHOD)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(METHODS, "mean", "brand_new_mean:Mean")
    found = invert(load_method("mean", tiny_generator, strength=2.0))
    want = tiny_generator.latent_avg + 2.0 * pictures()[1].mean()
    torch.testing.assert_close(found.w_plus[1, 0], want)
    for law in LAWS:
        law(lambda: load_method("mean", tiny_generator, strength=2.0))


NEW_NETWORK = """
from dataclasses import dataclass
from typing import ClassVar
from torch import nn
from models.encoders.checkpoint import load_network
from models.encoders.psp import TrunkSizes
from models.inversion.base import Inversion, Method
from models.inversion.weights import weights_file

@dataclass(frozen=True, kw_only=True)
class TintArchitecture(TrunkSizes):
    kind: str = "tint"
    w_dim: int

    @classmethod
    def tiny(cls, generator):
        return cls(w_dim=generator.w_dim)

class Tint(nn.Module):
    def __init__(self, architecture):
        super().__init__()
        self.architecture = architecture
        self.linear = nn.Linear(3, architecture.w_dim)

    def forward(self, images):
        return self.linear(images.nan_to_num().mean((2, 3)))

@dataclass(frozen=True, kw_only=True)
class ColourConfig:
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    checkpoint: str | None = None

class Colour(Method):
    Config = ColourConfig
    summary = "a code for the mean colour"

    @classmethod
    def tiny_network(cls, generator):
        return Tint(TintArchitecture.tiny(generator))

    def __init__(self, generator, config):
        super().__init__(generator, config)
        path = weights_file("colour", generator, config.checkpoint)
        self.network, self.sha256, _ = load_network(path, {"tint": (TintArchitecture, Tint)})

    def hashes(self):
        return {"colour": self.sha256}

    def invert(self, images, init, rng):
        self.check_inputs(images, init, rng)
        codes = self.generator.latent_avg.expand(len(images), self.generator.num_ws, -1)
        return Inversion(w_plus=codes + self.network(images).detach()[:, None])
"""


def test_a_new_method_with_a_network_is_one_file_and_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_generator: Generator, settings: Any
) -> None:
    """Its tiny example and its file are found by the same fixture as those of all others."""
    (tmp_path / "brand_new_tint.py").write_text(NEW_NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(METHODS, "colour", "brand_new_tint:Colour")
    with pytest.raises(AssetError, match="checkpoint"):
        load_method("colour", tiny_generator)
    filled = settings(method_class("colour"))
    method = load_method("colour", tiny_generator, **filled)
    with torch.no_grad():
        tint = method.network(pictures())  # type: ignore[attr-defined]
    want = tiny_generator.latent_avg + tint[1]
    torch.testing.assert_close(invert(method).w_plus[1, 0], want)
    digest = hashlib.sha256(Path(filled["checkpoint"]).read_bytes()).hexdigest()
    assert method.hashes() == {"colour": digest}
    for law in LAWS:
        law(lambda: load_method("colour", tiny_generator, **filled))


# ---------------------------------------------------------------------- the laws can fail


class _Broken(Method):
    """Keeps every law; each subclass breaks one."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Config:
        __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    summary = "for tests"

    def codes(self, images: torch.Tensor, rng: SampleRng) -> torch.Tensor:
        means = images.nan_to_num().mean((1, 2, 3))
        average = self.generator.latent_avg.expand(len(images), self.generator.num_ws, -1)
        return average + means[:, None, None]

    def invert(self, images: torch.Tensor, init: Inversion | None, rng: SampleRng) -> Inversion:
        self.check_inputs(images, init, rng)
        return Inversion(w_plus=self.codes(images, rng))


class _HalfPrecision(_Broken):
    def codes(self, images: torch.Tensor, rng: SampleRng) -> torch.Tensor:
        return super().codes(images, rng).double()


class _BatchMean(_Broken):
    def codes(self, images: torch.Tensor, rng: SampleRng) -> torch.Tensor:
        return super().codes(images, rng) + images.nan_to_num().mean()


class _GlobalRandom(_Broken):
    def codes(self, images: torch.Tensor, rng: SampleRng) -> torch.Tensor:
        return super().codes(images, rng) + 0.1 * torch.randn(())


class _Training(_Broken):
    def codes(self, images: torch.Tensor, rng: SampleRng) -> torch.Tensor:
        with torch.no_grad():
            self.generator.conv1.conv.weight.mul_(1.001)
        return super().codes(images, rng)


class _ForgetsFlagsOnError(_Broken):
    def codes(self, images: torch.Tensor, rng: SampleRng) -> torch.Tensor:
        codes = super().codes(images, rng)
        flags = [p.requires_grad for p in self.generator.parameters()]
        self.generator.requires_grad_(False)
        for _ in range(2):
            self.generator.synthesis(codes)
        for parameter, flag in zip(self.generator.parameters(), flags, strict=True):
            parameter.requires_grad_(flag)
        return codes


class _Fickle(Inversion):
    def render(self, generator: Generator) -> torch.Tensor:
        return generator.synthesis(self.w_plus, "random")


class _RandomNoise(_Broken):
    def invert(self, images: torch.Tensor, init: Inversion | None, rng: SampleRng) -> Inversion:
        return _Fickle(w_plus=super().invert(images, init, rng).w_plus)


class _SpreadsNan(_Broken):
    def codes(self, images: torch.Tensor, rng: SampleRng) -> torch.Tensor:
        return super().codes(images, rng) + 0 * images.mean()


class _AcceptsAnything(_Broken):
    def check_inputs(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("broken", "law"),
    [
        (_HalfPrecision, law_shape),
        (_BatchMean, law_batch_invariance),
        (_GlobalRandom, law_determinism),
        (_Training, law_generator_untouched),
        (_ForgetsFlagsOnError, law_generator_untouched),
        (_RandomNoise, law_render_is_the_result),
        (_SpreadsNan, law_failures_stay_in_their_row),
        (_AcceptsAnything, law_bad_calls_are_refused),
    ],
    ids=lambda value: value.__name__,
)
def test_the_law_fails_for_a_method_that_breaks_it(
    broken: type[_Broken], law: Callable[[Make], None], tiny_generator: Generator
) -> None:
    law(lambda: _Broken(tiny_generator, _Broken.Config()))
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        law(lambda: broken(tiny_generator, _Broken.Config()))
