"""Checkpoints of rosinality/stylegan2-pytorch and of the encoders built on it (pSp, e4e, LSAP,
ReStyle).

Forms: `{g_ema, latent_avg, d}`, a bare state dict, the whole file of a training script (with its
`argparse.Namespace` and optimisers), `{state_dict, latent_avg}` with a `decoder.` prefix,
GANInverter's `{encoder, decoder}`, and the checkpoints of our own training. Files are read with
`weights_only=True`; `argparse.Namespace` is the one extra type that is let through.

Legend: L num_ws, D w_dim.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.checkpoints.state_dict import (
    DiscriminatorArchitecture,
    build_discriminator,
    build_generator,
    check_filter,
    read_discriminator_architecture,
    read_generator_architecture,
    settle_latent_avg,
    with_noise_maps,
)
from models.errors import AssetError
from models.files import atomically
from models.stylegan2.discriminator import Discriminator
from models.stylegan2.generator import Generator
from models.stylegan2.resample import filter_2d
from models.torch_file import read_torch_file

logger = logging.getLogger(__name__)

LR_MUL = 0.01
"""rosinality's `lr_mlp`; its files do not store it."""
PREFIXES = ("", "decoder.", "module.", "generator.", "g_ema.", "module.decoder.")
GENERATOR_MARK = "style.1.weight"
DISCRIMINATOR_MARK = "convs.0.0.weight"


def load_rosinality_generator(path: Path) -> Generator:
    """Load a generator from any of the forms above.

    A file without `latent_avg` gets an estimate with a fixed seed; `provenance["latent_avg"]` and a
    logged warning say so.

    Raises:
        AssetError: unreadable or unsafe file, no generator in it, or another architecture.
    """
    saved = read_torch_file(path)
    part, state = _find_generator(saved, path)
    latent_avg = _find_latent_avg(saved, state)
    state = _without_filters(state, gain=4.0, source=path.name)
    state.pop("latent_avg", None)
    extras = _stored_settings(saved, "architecture")
    architecture = read_generator_architecture(
        state,
        path.name,
        mapping_lr_mul=extras.get("mapping_lr_mul", LR_MUL),
        conv_clamp=extras.get("conv_clamp"),
    )
    notes = []
    if not any(name.startswith("noises.") for name in state):
        state = with_noise_maps(state, architecture)
        notes.append("noise maps: absent in the file, drawn with seed 0")
        logger.warning("%s: no noise maps in the file; they were drawn with seed 0", path.name)
    if part == "g":
        notes.append("weights: the training network (the file has no moving average g_ema)")
        logger.warning("%s: no g_ema in the file; the training network g was loaded", path.name)
    state["latent_avg"] = _mean_row(latent_avg, architecture.w_dim, path.name)
    generator = build_generator(architecture, state, path.name)
    generator.provenance = {
        "format": "rosinality",
        "source": path.name,
        "terms": "unknown: see where the file came from",
        "latent_avg": settle_latent_avg(generator, path.name),
        "notes": notes,
        "card": None,
    }
    return generator


def load_rosinality_discriminator(path: Path) -> Discriminator:
    """Load the discriminator that a checkpoint carries under `d`.

    Raises:
        AssetError: unreadable or unsafe file, or no discriminator in it.
    """
    saved = read_torch_file(path)
    state = saved.get("d", saved) if isinstance(saved, Mapping) else saved
    if not isinstance(state, Mapping) or DISCRIMINATOR_MARK not in state:
        raise AssetError(
            f"{path}: no discriminator in this checkpoint; found {_describe(saved)}; expected the "
            f'key "d": use the training checkpoint instead of one that was cut down to the '
            "generator"
        )
    extras = _stored_settings(saved, "discriminator_architecture")
    state = _without_filters(dict(state), gain=1.0, source=path.name)
    architecture = read_discriminator_architecture(
        state,
        path.name,
        stddev_group=extras.get("stddev_group", 4),
        conv_clamp=extras.get("conv_clamp"),
    )
    return build_discriminator(architecture, state, path.name)


def save_rosinality(generator: Generator, discriminator: Discriminator | None, path: Path) -> None:
    """Write `{g_ema, latent_avg, d}` as rosinality's programs load it, filters included.

    What that layout cannot say (clamp, condition, multiplier) is added under `architecture`, which
    rosinality ignores and `load_rosinality_generator` reads.
    """
    arch = generator.architecture
    if arch.conv_clamp is not None or arch.c_dim or arch.mapping_lr_mul != LR_MUL:
        logger.warning(
            "%s: conv_clamp=%s, c_dim=%s, mapping_lr_mul=%s have no place in rosinality's layout; "
            "other programs will ignore them",
            path.name,
            arch.conv_clamp,
            arch.c_dim,
            arch.mapping_lr_mul,
        )
    g_ema = {k: v.clone() for k, v in generator.state_dict().items() if k != "latent_avg"}
    for block in range(len(generator.to_rgbs)):
        g_ema[f"convs.{2 * block}.conv.blur.kernel"] = filter_2d(4.0)
        g_ema[f"to_rgbs.{block}.upsample.kernel"] = filter_2d(4.0)
    saved: dict[str, Any] = {
        "g_ema": g_ema,
        "latent_avg": generator.latent_avg.clone(),
        "architecture": json.dumps(arch.to_dict()),
    }
    if discriminator is not None:
        saved["d"] = {k: v.clone() for k, v in discriminator.state_dict().items()}
        for block in range(1, len(discriminator.convs)):
            saved["d"][f"convs.{block}.conv2.0.kernel"] = filter_2d(1.0)
            saved["d"][f"convs.{block}.skip.0.kernel"] = filter_2d(1.0)
        architecture = DiscriminatorArchitecture.of(discriminator)
        saved["discriminator_architecture"] = json.dumps(architecture.to_dict())
    with atomically(path) as file:
        torch.save(saved, file)


# ---------------------------------------------------------------------- inside


def _find_generator(saved: Any, path: Path) -> tuple[str, dict[str, Tensor]]:
    """The generator's state dict without its prefix, and the name of the part that held it."""
    if isinstance(saved, Mapping):
        for part in ("g_ema", "state_dict", "decoder", "", "g"):
            state = saved.get(part) if part else saved
            if not isinstance(state, Mapping):
                continue
            for prefix in PREFIXES:
                if isinstance(state.get(prefix + GENERATOR_MARK), Tensor):
                    return part, _take(state, prefix)
    raise AssetError(
        f"{path}: no StyleGAN2 generator in this checkpoint; found {_describe(saved)}; expected "
        f'"g_ema", "decoder", "state_dict" with a "decoder." prefix, or a bare state dict with '
        f"{GENERATOR_MARK}"
    )


def _take(state: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in state.items()
        if name.startswith(prefix) and isinstance(value, Tensor)
    }


def _find_latent_avg(saved: Mapping[str, Any], state: Mapping[str, Tensor]) -> Tensor | None:
    """latent_avg in the order of trust: beside the weights, in GANInverter's place, in the "
    "weights."""
    encoder = saved.get("encoder")
    for holder in (saved, encoder if isinstance(encoder, Mapping) else {}, state):
        value = holder.get("latent_avg")
        if isinstance(value, Tensor) and torch.isfinite(value).all():
            return value
    return None


def _mean_row(latent_avg: Tensor | None, w_dim: int, source: str) -> Tensor:
    """[D], [1 D] or [L D] to [D]; NaN where unknown."""
    if latent_avg is None:
        return torch.full((w_dim,), float("nan"))
    if latent_avg.ndim == 0 or latent_avg.shape[-1] != w_dim:
        raise AssetError(
            f"{source}: latent_avg has shape {list(latent_avg.shape)}, expected [{w_dim}] or "
            f"[L {w_dim}]; the file mixes two models"
        )
    rows = latent_avg.float().reshape(-1, w_dim)
    if (rows - rows[:1]).abs().max() > 1e-4:
        logger.warning("%s: the rows of latent_avg differ; their mean is used", source)
        return rows.mean(0)
    return rows[0].clone()


def _without_filters(state: dict[str, Tensor], gain: float, source: str) -> dict[str, Tensor]:
    """Check every stored resampling filter and drop it: ours is a constant of the code."""
    kept = {}
    for name, value in state.items():
        if name.endswith(".kernel"):
            check_filter(value, gain, source, name)
        else:
            kept[name] = value
    return kept


def _stored_settings(saved: Any, key: str) -> dict[str, Any]:
    text = saved.get(key) if isinstance(saved, Mapping) else None
    return json.loads(text) if isinstance(text, str) else {}


def _describe(saved: Any) -> str:
    if not isinstance(saved, Mapping):
        return f"an object of type {type(saved).__name__}"
    names = [str(name) for name in saved]
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return f"the keys {', '.join(names[:6]) or '(none)'}{more}"
