"""Networks from state dicts in rosinality's naming: architecture from the shapes, strict loading.

Every checkpoint format ends here. Nothing is assumed that the shapes can tell; what they cannot
tell (the mapping network's learning-rate multiplier, the clamp) is passed in by the format that
knows it.
"""

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from models.errors import AssetError
from models.stylegan2.discriminator import Discriminator
from models.stylegan2.generator import Generator, GeneratorArchitecture
from models.stylegan2.resample import filter_2d

logger = logging.getLogger(__name__)

State = Mapping[str, Tensor]

ESTIMATE_SAMPLES = 10_000
ESTIMATE_SEED = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiscriminatorArchitecture:
    """The arguments of `Discriminator`, as they stand in a card."""

    resolution: int
    widths: Mapping[int, int]
    c_dim: int = 0
    mapping_layers: int = 8
    stddev_group: int = 4
    conv_clamp: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-ready values (widths keyed by string)."""
        return {
            **dataclasses.asdict(self),
            "widths": {str(k): v for k, v in self.widths.items()},
        }

    @staticmethod
    def of(discriminator: Discriminator) -> "DiscriminatorArchitecture":
        """Read the architecture back from a network."""
        return read_discriminator_architecture(
            discriminator.state_dict(),
            "discriminator",
            stddev_group=discriminator.stddev_group,
            conv_clamp=discriminator.conv_clamp,
        )


# ---------------------------------------------------------------------- generator


def read_generator_architecture(
    state: State, source: str, *, mapping_lr_mul: float = 0.01, conv_clamp: float | None = None
) -> GeneratorArchitecture:
    """Resolution, widths, depth and dimensions from the shapes.

    Args:
        state: weights in rosinality's naming.
        source: what to call the file in an error.

    Raises:
        AssetError: the weights are not those of a StyleGAN2 skip generator.
    """
    try:
        depth = _count(state, "style.{}.weight", first=1)
        w_dim = state[f"style.{max(depth, 1)}.weight"].shape[0]
        c_dim = state["embed.weight"].shape[1] if "embed.weight" in state else 0
        widths = {4: state["input.input"].shape[1]}
        for block in range(_count(state, "convs.{}.conv.weight") // 2):
            widths[8 * 2**block] = state[f"convs.{2 * block}.conv.weight"].shape[1]
        return GeneratorArchitecture(
            resolution=max(widths),
            widths=widths,
            z_dim=state["style.1.weight"].shape[1] - (w_dim if c_dim else 0),
            w_dim=w_dim,
            mapping_layers=depth,
            c_dim=c_dim,
            mapping_lr_mul=mapping_lr_mul,
            conv_clamp=conv_clamp,
        )
    except (KeyError, IndexError, ValueError) as error:
        raise AssetError(
            f"{source}: not the weights of a StyleGAN2 generator ({type(error).__name__}: "
            f"{error}); found {_names(state)}; expected rosinality's names (style.1.weight, "
            f"input.input, convs.0.conv.weight ...): check that this is a StyleGAN2 checkpoint"
        ) from error


def build_generator(architecture: GeneratorArchitecture, state: State, source: str) -> Generator:
    """A generator with these weights in float32, frozen, in eval mode, on the CPU.

    `state` must hold every parameter and buffer, `latent_avg` (NaN where unknown) included.

    Raises:
        AssetError: a tensor is missing, unknown, of another shape or not finite.
    """
    # Not on the meta device: its first use imports half of torch, a second of start-up.
    with torch.random.fork_rng(devices=[]):  # loading draws nothing from the caller's stream
        generator = Generator(architecture)
    _fill(generator, state, source)
    return generator.eval().requires_grad_(False)


def settle_latent_avg(generator: Generator, source: str) -> str:
    """Estimate `latent_avg` where the file had none. Returns how it was found, for the
    provenance."""
    if torch.isfinite(generator.latent_avg).all():
        return "stored"
    generator.latent_avg.copy_(estimate_latent_avg(generator))
    how = f"estimated from {ESTIMATE_SAMPLES} samples, seed {ESTIMATE_SEED}"
    logger.warning("%s: no latent_avg in the file; it was %s", source, how)
    return how


def estimate_latent_avg(generator: Generator) -> Float[Tensor, " D"]:
    """The mean of w over fixed samples of z (and of uniformly drawn labels, if conditional)."""
    stream = torch.Generator().manual_seed(ESTIMATE_SEED)
    total = torch.zeros(generator.w_dim, dtype=torch.float64)
    with torch.no_grad():
        for _ in range(0, ESTIMATE_SAMPLES, 1000):
            z = torch.randn(1000, generator.z_dim, generator=stream)
            c = None
            if generator.c_dim:
                labels = torch.randint(generator.c_dim, (1000,), generator=stream)
                c = F.one_hot(labels, generator.c_dim).float()
            total += generator.mapping(z, c)[:, 0].double().sum(0)
    return (total / ESTIMATE_SAMPLES).float()


def with_noise_maps(state: State, architecture: GeneratorArchitecture) -> dict[str, Tensor]:
    """Add seeded noise maps where a file has none at all (its noise was drawn anew at every
    call)."""
    stream = torch.Generator().manual_seed(ESTIMATE_SEED)
    maps = {}
    for index in range(architecture.num_ws - 1):
        res = Generator.conv_resolution(index)
        maps[f"noises.noise_{index}"] = torch.randn(1, 1, res, res, generator=stream)
    return {**state, **maps}


# ---------------------------------------------------------------------- discriminator


def read_discriminator_architecture(
    state: State, source: str, *, stddev_group: int = 4, conv_clamp: float | None = None
) -> DiscriminatorArchitecture:
    """Resolution, widths and condition from the shapes.

    Raises:
        AssetError: the weights are not those of a StyleGAN2 residual discriminator.
    """
    try:
        blocks = _count(state, "convs.{}.conv1.0.weight", first=1)
        resolution = 4 * 2**blocks
        widths = {resolution: state["convs.0.0.weight"].shape[0]}
        for block in range(1, blocks + 1):
            widths[resolution // 2**block] = state[f"convs.{block}.conv2.1.weight"].shape[0]
        has_condition = "embed.weight" in state
        return DiscriminatorArchitecture(
            resolution=resolution,
            widths=widths,
            c_dim=state["embed.weight"].shape[1] if has_condition else 0,
            mapping_layers=_count(state, "style.{}.weight", first=1) if has_condition else 8,
            stddev_group=stddev_group,
            conv_clamp=conv_clamp,
        )
    except (KeyError, IndexError) as error:
        raise AssetError(
            f"{source}: not the weights of a StyleGAN2 discriminator (no {error}); found "
            f"{_names(state)}; expected rosinality's names (convs.0.0.weight, "
            "final_linear.0.weight)"
        ) from error


def build_discriminator(
    architecture: DiscriminatorArchitecture, state: State, source: str
) -> Discriminator:
    """A discriminator with these weights in float32, frozen, in eval mode, on the CPU.

    Raises:
        AssetError: a tensor is missing, unknown, of another shape or not finite.
    """
    with torch.random.fork_rng(devices=[]):
        discriminator = Discriminator(
            architecture.resolution,
            architecture.widths,
            c_dim=architecture.c_dim,
            mapping_layers=architecture.mapping_layers,
            stddev_group=architecture.stddev_group,
            conv_clamp=architecture.conv_clamp,
        )
    _fill(discriminator, state, source)
    return discriminator.eval().requires_grad_(False)


# ---------------------------------------------------------------------- shared


def check_filter(kernel: Tensor, gain: float, source: str, name: str) -> None:
    """Raise AssetError unless a stored resampling filter is [1, 3, 3, 1] with this gain."""
    expected = filter_2d(gain)
    found = kernel.detach().float()
    if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-3, atol=1e-5):
        row = found.reshape(-1)[:4].tolist()
        raise AssetError(
            f"{source}: {name} is another resampling filter than [1, 3, 3, 1] with gain {gain:g} "
            f"(shape {list(found.shape)}, first values {row}); such a network would render wrongly "
            f"here: only the standard filter is supported"
        )


def _fill(module: nn.Module, state: State, source: str) -> None:
    kind = type(module).__name__.lower()
    expected = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    missing = sorted(expected.keys() - state.keys())
    unknown = sorted(state.keys() - expected.keys())
    if missing or unknown:
        raise AssetError(
            f"{source}: the weights do not fit a StyleGAN2 {kind}: "
            f"missing {_few(missing)}, unknown {_few(unknown)}; the file is incomplete or comes "
            f"from another architecture"
        )
    for name, shape in expected.items():
        if tuple(state[name].shape) != shape:
            raise AssetError(
                f"{source}: {name} has shape {list(state[name].shape)}, expected {list(shape)} for "
                f"this {kind}; the file comes from another architecture"
            )
    values = {
        name: value.detach().to("cpu", torch.float32).contiguous() for name, value in state.items()
    }
    for name, value in values.items():
        if name != "latent_avg" and not torch.isfinite(value).all():
            raise AssetError(f"{source}: {name} has values that are not finite; take another file")
    module.load_state_dict(values, strict=True, assign=True)


def _count(state: State, pattern: str, first: int = 0) -> int:
    index = first
    while pattern.format(index) in state:
        index += 1
    return index - first


def _few(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return (", ".join(names[:4]) or "nothing") + more


def _names(state: State) -> str:
    return f"{len(state)} tensors ({_few(sorted(state))})"
