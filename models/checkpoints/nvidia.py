"""Network pickles of NVIDIA's stylegan2-ada-pytorch and of the stylegan2 networks in stylegan3.

The weights are translated to rosinality's names; no kernel is flipped (only the TensorFlow lineage
needs that). Settings that no shape tells (multiplier, clamp, architecture, activation) are read
from the objects' own attributes, which are the same in both repositories whatever layout the
keyword arguments had. Whatever we cannot render exactly is refused.
"""

import logging
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.checkpoints.nvidia_pickle import PersistentObject, asset_errors, read_network_pickle
from models.checkpoints.state_dict import (
    build_discriminator,
    build_generator,
    check_filter,
    read_discriminator_architecture,
    read_generator_architecture,
    settle_latent_avg,
)
from models.errors import AssetError
from models.stylegan2.discriminator import Discriminator
from models.stylegan2.generator import Generator

logger = logging.getLogger(__name__)

WHOLE_BATCH = 2**31 - 1
"""Stands for NVIDIA's `mbstd_group_size=None`."""


def load_nvidia_generator(path: Path) -> Generator:
    """Load `G_ema` (or a pickled generator alone) without running anything in the file.

    Raises:
        AssetError: unsafe or broken file, no generator in it, an alias-free (stylegan3) network,
            or a variant that is not supported.
    """
    with asset_errors(path):
        saved = read_network_pickle(path)
        part, network = _find_network(saved, path, ("G_ema", "G"))
        source = f"{path.name}[{part}]"
        _refuse_other_families(network, source)
        settings = _read_settings(network, source, ("skip",))
        state = _translate(network, source, _GENERATOR_RULES)
        state = _with_silent_noise(state, network)
        architecture = read_generator_architecture(
            state, source, mapping_lr_mul=settings["lr_mul"], conv_clamp=settings["conv_clamp"]
        )
        state.setdefault("latent_avg", torch.full((architecture.w_dim,), float("nan")))
        generator = build_generator(architecture, state, source)
        generator.provenance = {
            "format": "nvidia",
            "source": path.name,
            "terms": "unknown: see where the file came from (NVIDIA's own weights: non-commercial)",
            "latent_avg": settle_latent_avg(generator, source),
            "notes": [f"weights: {part}"],
            "card": None,
        }
        return generator


def load_nvidia_discriminator(path: Path) -> Discriminator:
    """Load `D` without running anything in the file.

    Raises:
        AssetError: as for the generator; also the cifar variant, which has no residual blocks.
    """
    with asset_errors(path):
        saved = read_network_pickle(path)
        part, network = _find_network(saved, path, ("D",))
        source = f"{path.name}[{part}]"
        if network.child("b4") is None:
            raise AssetError(
                f"{source}: {network.class_name} has no block b4; expected the discriminator of "
                "stylegan2"
            )
        settings = _read_settings(network, source, ("resnet",))
        if settings["lr_mul"] != 0.01:
            raise AssetError(
                f"{source}: learning-rate multiplier {settings['lr_mul']} in the condition's "
                f"mapping, expected 0.01: this variant is not supported"
            )
        mbstd = network.child("b4").child("mbstd")  # type: ignore[union-attr]
        if mbstd is None or mbstd.state.get("num_channels", 1) != 1:
            raise AssetError(
                f"{source}: expected one channel of minibatch standard deviation; this variant "
                f"(such as the cifar configuration) is not supported as a discriminator; its "
                f"generator is"
            )
        group = mbstd.state.get("group_size", 4)
        state = _translate(network, source, _DISCRIMINATOR_RULES)
        architecture = read_discriminator_architecture(
            state,
            source,
            stddev_group=WHOLE_BATCH if group is None else int(group),
            conv_clamp=settings["conv_clamp"],
        )
        return build_discriminator(architecture, state, source)


# ---------------------------------------------------------------------- finding and checking


def _find_network(saved: Any, path: Path, parts: tuple[str, ...]) -> tuple[str, PersistentObject]:
    if isinstance(saved, PersistentObject):
        is_discriminator = saved.child("synthesis") is None
        if is_discriminator == ("D" in parts):
            return saved.class_name, saved
    if isinstance(saved, Mapping):
        for part in parts:
            if isinstance(saved.get(part), PersistentObject):
                return part, saved[part]
    found = (
        f"the keys {', '.join(map(str, saved))}"
        if isinstance(saved, Mapping)
        else f"an object of type {getattr(saved, 'class_name', type(saved).__name__)}"
    )
    raise AssetError(
        f"{path}: no network {' or '.join(parts)} in this pickle; found {found}; expected a "
        f"snapshot of stylegan2-ada-pytorch or stylegan3 (network-snapshot-*.pkl)"
    )


def _refuse_other_families(network: PersistentObject, source: str) -> None:
    synthesis = network.child("synthesis")
    if synthesis is not None and synthesis.child("b4") is not None:
        return
    names = sorted(synthesis.children() if synthesis else network.children())
    if synthesis is not None and (
        synthesis.child("input") is not None or "layer_names" in synthesis.state
    ):
        raise AssetError(
            f"{source}: this is an alias-free (stylegan3) generator, found layers "
            f"{', '.join(names[:3])} ...; only stylegan2 networks are supported: take one trained "
            f"with --cfg=stylegan2"
        )
    raise AssetError(
        f"{source}: {network.class_name} is not a stylegan2 generator, found parts "
        f"{', '.join(names[:6]) or '(none)'}; expected mapping and synthesis with blocks b4, b8 ..."
    )


_FC = re.compile(r"mapping\.fc\d+")
# `skip` of a residual block is linear and unclamped by design; so is the last linear layer.
_CLAMPED = re.compile(r"b\d+\.(conv|conv0|conv1|torgb|fromrgb)$")
_ACTIVATED = re.compile(r"b\d+\.(conv|conv0|conv1|fromrgb|fc)$|mapping\.fc\d+$")


def _read_settings(
    network: PersistentObject, source: str, architectures: tuple[str, ...]
) -> dict[str, Any]:
    """`lr_mul` and `conv_clamp`, after a look at everything that must be as we render it."""
    clamps: set[float | None] = set()
    multipliers: set[float] = set()
    for name, layer in network.walk():
        architecture = layer.state.get("architecture", architectures[0])
        if architecture not in architectures:
            raise AssetError(
                f"{source}: {name} has architecture {reprlib.repr(architecture)}, expected "
                f"{' or '.join(architectures)}: this variant is not supported"
            )
        if _ACTIVATED.search(name) and layer.state.get("activation", "lrelu") != "lrelu":
            raise AssetError(
                f"{source}: {name} has activation {reprlib.repr(layer.state['activation'])}, "
                f"expected lrelu: this variant is not supported"
            )
        if _CLAMPED.search(name):
            clamp = layer.state.get("conv_clamp")
            clamps.add(None if clamp is None else float(clamp))
        if _FC.fullmatch(name):
            multipliers.add(float(layer.state.get("bias_gain", 0.01)))
    if len(clamps) > 1 or len(multipliers) > 1:
        raise AssetError(
            f"{source}: layers differ in conv_clamp {sorted(map(str, clamps))} or in learning-rate "
            f"multiplier {sorted(multipliers)}: this variant is not supported"
        )
    return {
        "conv_clamp": clamps.pop() if clamps else None,
        "lr_mul": multipliers.pop() if multipliers else 0.01,
    }


# ---------------------------------------------------------------------- names


_Rules = tuple[tuple[re.Pattern[str], str], ...]


def _rules(*pairs: tuple[str, str]) -> _Rules:
    return tuple((re.compile(pattern), target) for pattern, target in pairs)


_MAPPING = (
    (r"mapping\.fc(?P<fc>\d+)\.(?P<end>weight|bias)", "style.{fc1}.{end}"),
    (r"mapping\.embed\.(?P<end>weight|bias)", "embed.{end}"),
)
# {conv} is conv1 or convs.k, {rgb} to_rgb1 or to_rgbs.k, {k} the number of the 3x3 convolution.
_GENERATOR_RULES = _rules(
    *_MAPPING,
    (r"mapping\.w_avg", "latent_avg"),
    (r"synthesis\.b4\.const", "input.input"),
    (r"synthesis\.b(?P<r>\d+)\.conv(?P<half>[01])\.weight", "{conv}.conv.weight"),
    (
        r"synthesis\.b(?P<r>\d+)\.conv(?P<half>[01])\.affine\.(?P<end>weight|bias)",
        "{conv}.conv.modulation.{end}",
    ),
    (r"synthesis\.b(?P<r>\d+)\.conv(?P<half>[01])\.bias", "{conv}.activate.bias"),
    (r"synthesis\.b(?P<r>\d+)\.conv(?P<half>[01])\.noise_strength", "{conv}.noise.weight"),
    (r"synthesis\.b(?P<r>\d+)\.conv(?P<half>[01])\.noise_const", "noises.noise_{k}"),
    (r"synthesis\.b(?P<r>\d+)\.torgb\.weight", "{rgb}.conv.weight"),
    (
        r"synthesis\.b(?P<r>\d+)\.torgb\.affine\.(?P<end>weight|bias)",
        "{rgb}.conv.modulation.{end}",
    ),
    (r"synthesis\.b(?P<r>\d+)\.torgb\.bias", "{rgb}.bias"),
)
# {block} counts from the highest resolution, which {top} names.
_DISCRIMINATOR_RULES = _rules(
    *_MAPPING,
    (r"b(?P<r>\d+)\.fromrgb\.weight", "convs.0.0.weight"),
    (r"b(?P<r>\d+)\.fromrgb\.bias", "convs.0.1.bias"),
    (r"b(?P<r>\d+)\.conv0\.weight", "convs.{block}.conv1.0.weight"),
    (r"b(?P<r>\d+)\.conv0\.bias", "convs.{block}.conv1.1.bias"),
    (r"b(?P<r>\d+)\.conv1\.weight", "convs.{block}.conv2.1.weight"),
    (r"b(?P<r>\d+)\.conv1\.bias", "convs.{block}.conv2.2.bias"),
    (r"b(?P<r>\d+)\.skip\.weight", "convs.{block}.skip.1.weight"),
    (r"b4\.conv\.weight", "final_conv.0.weight"),
    (r"b4\.conv\.bias", "final_conv.1.bias"),
    (r"b4\.fc\.(?P<end>weight|bias)", "final_linear.0.{end}"),
    (r"b4\.out\.(?P<end>weight|bias)", "final_linear.1.{end}"),
)


def _translate(network: PersistentObject, source: str, rules: _Rules) -> dict[str, Tensor]:
    """Every tensor under rosinality's name and shape; filters are checked and dropped."""
    tensors = network.tensors()
    top = max((int(m[1]) for m in map(re.compile(r"b(\d+)\.").search, tensors) if m), default=0)
    state: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if name.endswith("resample_filter"):
            # A layer that does not resample holds the standard filter too.
            check_filter(value, 1.0, source, name)
            continue
        target = _target(name, rules, top)
        if target is None:
            raise AssetError(
                f"{source}: unknown tensor {name} {list(value.shape)}; this is not a plain "
                f"stylegan2 network, and dropping a part would change its pictures"
            )
        state[target] = _reshaped(target, value)
    return state


def _target(name: str, rules: _Rules, top: int) -> str | None:
    for pattern, target in rules:
        found = pattern.fullmatch(name)
        if found is None:
            continue
        groups = found.groupdict()
        level = int(groups.get("r") or 4).bit_length() - 4  # b8 -> 0, b16 -> 1
        k = 2 * level + int(groups.get("half") or 0)  # number of convs.k; -1 is conv1
        return target.format(
            end=groups.get("end"),
            fc1=int(groups.get("fc") or 0) + 1,
            conv="conv1" if level < 0 else f"convs.{k}",
            rgb="to_rgb1" if level < 0 else f"to_rgbs.{level}",
            k=k + 1,
            block=top.bit_length() - int(groups.get("r") or 4).bit_length() + 1,
        )
    return None


def _reshaped(target: str, value: Tensor) -> Tensor:
    """rosinality keeps leading and trailing axes of one that NVIDIA does not."""
    if target == "input.input" or re.fullmatch(r"(conv|to_rgb).*\.conv\.weight", target):
        return value[None]
    if target.startswith("noises."):
        return value[None, None]
    if target.endswith("noise.weight"):
        return value.reshape(1)
    if re.fullmatch(r"to_rgb(1|s\.\d+)\.bias", target):
        return value.reshape(1, -1, 1, 1)
    return value


def _with_silent_noise(state: dict[str, Tensor], network: PersistentObject) -> dict[str, Tensor]:
    """A layer with `use_noise=False` is a layer of noise strength zero."""
    synthesis = network.child("synthesis")
    assert synthesis is not None
    for name, layer in synthesis.walk():
        if layer.state.get("use_noise", True):
            continue
        found = re.fullmatch(r"b(\d+)\.conv([01])", name)
        if found is None:
            continue
        res, half = int(found[1]), int(found[2])
        k = 2 * (res.bit_length() - 4) + half
        conv = "conv1" if res == 4 else f"convs.{k}"
        state[f"{conv}.noise.weight"] = torch.zeros(1)
        state[f"noises.noise_{k + 1}"] = torch.zeros(1, 1, res, res)
    return state
