"""Networks in the pickle layout of stylegan2-ada-pytorch and stylegan3, built by hand.

The objects below only know how to be pickled the way NVIDIA's `persistence` does it, so that the
real unpickling path runs.
"""

import pickle
import sys
import types
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

Network = Any


class Persistent:
    """Pickles itself as a call of `torch_utils.persistence._reconstruct_persistent_obj`."""

    source = "# source removed\n"

    def __init__(self, class_name: str, modules: dict[str, Any], **settings: Any) -> None:
        self.class_name = class_name
        self.parameters: dict[str, Any] = {}
        self.buffers: dict[str, Any] = {}
        self.modules = modules
        self.settings = settings

    def __getitem__(self, path: str) -> "Persistent":
        found = self
        for name in path.split("."):
            found = found.modules[name]
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        easy_dict = sys.modules["dnnlib.util"].EasyDict  # type: ignore[attr-defined]
        state = {
            "training": False,
            "_parameters": {k: nn.Parameter(v) for k, v in self.parameters.items()},
            "_buffers": dict(self.buffers),
            "_non_persistent_buffers_set": set(),
            "_backward_hooks": OrderedDict(),
            "_modules": dict(self.modules),
            "_init_args": (),
            "_init_kwargs": easy_dict(self.settings.get("kwargs", {})),
            **{k: v for k, v in self.settings.items() if k != "kwargs"},
        }
        meta = {
            "type": "class",
            "version": 6,
            "module_src": self.source,
            "class_name": self.class_name,
            "state": state,
        }
        persistence = sys.modules["torch_utils.persistence"]
        return persistence._reconstruct_persistent_obj, (meta,), None  # type: ignore[attr-defined]


@pytest.fixture
def nvidia_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)


def stand_in(patch: pytest.MonkeyPatch) -> None:
    """Modules that pickle can find while it writes; ours must never call them."""

    def _reconstruct_persistent_obj(meta: Any) -> None:
        raise AssertionError("the real loader must not come here")

    class EasyDict(dict):  # type: ignore[type-arg]
        pass

    for name, parts in {
        "torch_utils.persistence": {"_reconstruct_persistent_obj": _reconstruct_persistent_obj},
        "dnnlib.util": {"EasyDict": EasyDict},
    }.items():
        module = types.ModuleType(name)
        for key, value in parts.items():
            value.__module__, value.__qualname__ = name, key
            setattr(module, key, value)
        patch.setitem(sys.modules, name.split(".")[0], types.ModuleType(name.split(".")[0]))
        patch.setitem(sys.modules, name, module)


Dump = Callable[..., Path]


@pytest.fixture
def dump_nvidia(nvidia_modules: None, tmp_path: Path) -> Dump:
    """`dump_nvidia(object, protocol=4)` writes a pickle."""

    def dump(saved: Any, protocol: int = 4, name: str = "network.pkl") -> Path:
        path = tmp_path / name
        path.write_bytes(pickle.dumps(saved, protocol=protocol))
        return path

    return dump


def _fill(layer: Persistent, trainable: bool = True, **tensors: Tensor) -> Persistent:
    (layer.parameters if trainable else layer.buffers).update(tensors)
    return layer


def _filter() -> Tensor:
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
    return torch.outer(taps, taps) / 64


def _fc(
    i: int, o: int, lr: float = 1.0, activation: str = "linear", one: float = 0.0
) -> Persistent:
    layer = Persistent(
        "FullyConnectedLayer",
        {},
        activation=activation,
        weight_gain=np.float64(lr / np.sqrt(i)),
        bias_gain=lr,
    )
    return _fill(layer, weight=torch.randn(o, i) / lr, bias=torch.randn(o) * 0.1 + one)


def _synthesis_layer(i: int, o: int, w: int, res: int, up: int, clamp: float | None) -> Persistent:
    layer = Persistent(
        "SynthesisLayer",
        {"affine": _fc(w, i, one=1.0)},
        resolution=res,
        up=up,
        use_noise=True,
        activation="lrelu",
        conv_clamp=clamp,
        act_gain=np.sqrt(2),
    )
    # NVIDIA keeps the kernels of its half-precision blocks in channels-last order.
    weight = torch.randn(o, i, 3, 3).to(memory_format=torch.channels_last)
    _fill(layer, weight=weight, bias=torch.randn(o), noise_strength=torch.randn([]))
    return _fill(layer, False, resample_filter=_filter(), noise_const=torch.randn(res, res))


def make_generator(
    *,
    widths: dict[int, int],
    z: int = 6,
    w: int = 8,
    c: int = 0,
    layers: int = 2,
    clamp: float | None = None,
    lr: float = 0.01,
    is_flat: bool = False,
) -> Network:
    """A generator of stylegan2-ada-pytorch, or (`is_flat`) with stylegan3's flat arguments."""
    blocks = {}
    top = max(widths)
    for res in sorted(widths):
        parts = {}
        if res > 4:
            parts["conv0"] = _synthesis_layer(widths[res // 2], widths[res], w, res, 2, clamp)
        parts["conv1"] = _synthesis_layer(widths[res], widths[res], w, res, 1, clamp)
        torgb = Persistent("ToRGBLayer", {"affine": _fc(w, widths[res], one=1.0)}, conv_clamp=clamp)
        parts["torgb"] = _fill(torgb, weight=torch.randn(3, widths[res], 1, 1), bias=torch.randn(3))
        block = Persistent("SynthesisBlock", parts, resolution=res, architecture="skip")
        _fill(block, False, resample_filter=_filter())
        if res == 4:
            _fill(block, const=torch.randn(widths[4], 4, 4))
        blocks[f"b{res}"] = block
    fcs = {}
    for index in range(layers):
        size = (z + w if c else z) if index == 0 else w
        fcs[f"fc{index}"] = _fc(size, w, lr, "lrelu")
    if c:
        fcs["embed"] = _fc(c, w)
    mapping = Persistent("MappingNetwork", fcs, z_dim=z, c_dim=c, w_dim=w, num_layers=layers)
    _fill(mapping, False, w_avg=torch.randn(w))
    inner = {"channel_base": 1024, "num_fp16_res": 4 if clamp else 0, "conv_clamp": clamp}
    kwargs = inner if is_flat else {"synthesis_kwargs": inner}
    kwargs = {
        "z_dim": z,
        "c_dim": c,
        "w_dim": w,
        "mapping_kwargs": {"num_layers": layers},
        **kwargs,
    }
    synthesis = Persistent("SynthesisNetwork", blocks, img_resolution=top, img_channels=3)
    return Persistent(
        "Generator", {"synthesis": synthesis, "mapping": mapping}, kwargs=kwargs, c_dim=c
    )


def _conv(i: int, o: int, k: int, clamp: float | None, down: int = 1, **more: Any) -> Persistent:
    activation = more.pop("activation", "lrelu")
    layer = Persistent("Conv2dLayer", {}, activation=activation, down=down, conv_clamp=clamp)
    _fill(layer, weight=torch.randn(o, i, k, k))
    if activation == "lrelu":
        _fill(layer, bias=torch.randn(o))
    return _fill(layer, False, resample_filter=_filter())


def make_discriminator(
    *,
    widths: dict[int, int],
    c: int = 0,
    clamp: float | None = None,
    group: int | None = 4,
    layers: int = 2,
) -> Network:
    """A residual discriminator in NVIDIA's layout."""
    parts: dict[str, Any] = {}
    for res in sorted(widths, reverse=True)[:-1]:
        inner = {
            "conv0": _conv(widths[res], widths[res], 3, clamp),
            "conv1": _conv(widths[res], widths[res // 2], 3, clamp, down=2),
            "skip": _conv(widths[res], widths[res // 2], 1, None, down=2, activation="linear"),
        }
        if res == max(widths):
            inner["fromrgb"] = _conv(3, widths[res], 1, clamp)
        block = Persistent("DiscriminatorBlock", inner, resolution=res, architecture="resnet")
        parts[f"b{res}"] = _fill(block, False, resample_filter=_filter())
    n = widths[4]
    if c:
        fcs = {f"fc{i}": _fc(n, n, 0.01, "lrelu") for i in range(layers)}
        fcs["embed"] = _fc(c, n)
        parts["mapping"] = Persistent("MappingNetwork", fcs, z_dim=0, c_dim=c)
    epilogue = {
        "mbstd": Persistent("MinibatchStdLayer", {}, group_size=group, num_channels=1),
        "conv": _conv(n + 1, n, 3, clamp),
        "fc": _fc(n * 16, n, activation="lrelu"),
        "out": _fc(n, n if c else 1),
    }
    parts["b4"] = Persistent("DiscriminatorEpilogue", epilogue, architecture="resnet")
    return Persistent("Discriminator", parts, c_dim=c)


WIDTHS = {4: 8, 8: 6, 16: 4}


@pytest.fixture
def nvidia_generator() -> Callable[..., Network]:
    torch.manual_seed(3)
    return lambda **settings: make_generator(**{"widths": WIDTHS, **settings})


@pytest.fixture
def nvidia_discriminator() -> Callable[..., Network]:
    torch.manual_seed(4)
    return lambda **settings: make_discriminator(**{"widths": WIDTHS, **settings})


@pytest.fixture
def persistent() -> type[Persistent]:
    return Persistent
