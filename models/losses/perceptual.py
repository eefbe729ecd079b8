"""Perceptual distances: LPIPS where its backbone is at hand, else the distance in our own trunk.

Legend: N batch, C channels, H W image.
"""

import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from urllib.error import URLError

import torch
from jaxtyping import Float
from torch import Tensor, nn

from models.checkpoints.bundled import asset_path
from models.errors import AssetError, ConfigError
from models.losses.torchvision_shim import ensure_torchvision
from models.losses.trunk import PerceptualTrunk, load_trunk, tap_distance, unit_normalise
from models.stylegan2.generator import weights_hash
from models.torch_file import read_state_dict

logger = logging.getLogger(__name__)

NAMES = ("auto", "refinery", "lpips-alex", "lpips-vgg", "lpips-squeeze")

BACKBONES = {
    "alex": "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    "vgg": "https://download.pytorch.org/models/vgg16-397923af.pth",
    "squeeze": "https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth",
}
"""torchvision's ImageNet weights that the published LPIPS layers (v0.1) were fitted on."""


class Perceptual(nn.Module, ABC):
    """A perceptual distance: `distance(a, b)` gives one value per picture, differentiable.

    `distance.compare(distance.features(a), distance.features(b))` is the same value; an
    optimisation that holds its target fixed computes the target's features once.

    Attributes:
        name: the honest column name, e.g. "lpips_alex" or "trunk_distance".
        hash: sha256 over all weights the distance computes with.
    """

    name: str
    hash: str

    @abstractmethod
    def features(self, images: Float[Tensor, "N 3 H W"]) -> list[Tensor]:
        """Channel-normalised features [N C h w] of pictures in [-1, 1], finest first."""

    @abstractmethod
    def compare(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> Float[Tensor, " N"]:
        """The distance between two results of `features`."""

    def forward(
        self, a: Float[Tensor, "N 3 H W"], b: Float[Tensor, "N 3 H W"]
    ) -> Float[Tensor, " N"]:
        """Distance between pictures in [-1, 1], row by row; 0 for equal pictures."""
        return self.compare(self.features(a), self.features(b))


class TrunkDistance(Perceptual):
    """LPIPS's baseline form (uniform weights) in our own trunk; 32 px or more on each side."""

    name = "trunk_distance"

    def __init__(self, trunk: PerceptualTrunk) -> None:
        super().__init__()
        self.trunk = trunk
        self.hash = weights_hash(trunk)

    def features(self, images: Float[Tensor, "N 3 H W"]) -> list[Tensor]:
        return [unit_normalise(tap) for tap in self.trunk(images)]

    def compare(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> Float[Tensor, " N"]:
        return tap_distance(a, b)


class Lpips(Perceptual):
    """LPIPS v0.1 of the `lpips` package (arXiv 1801.03924) with its calibrated linear layers.

    Args:
        net: "alex", "vgg" or "squeeze".
        backbone: state of torchvision's network of that name, keys `features.*`.

    Raises:
        AssetError: the backbone's weights do not fit.
    """

    def __init__(self, net: str, backbone: dict[str, Tensor]) -> None:
        super().__init__()
        ensure_torchvision()
        import lpips

        with warnings.catch_warnings():
            # lpips calls torchvision with an argument that torchvision has renamed since.
            warnings.simplefilter("ignore")
            network = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        state = network.net.state_dict()
        for key, value in state.items():
            name = "features." + key.split(".", 1)[1]  # slice2.3.weight is features.3.weight
            if name not in backbone or backbone[name].shape != value.shape:
                found = list(backbone[name].shape) if name in backbone else "nothing"
                raise AssetError(
                    f"lpips-{net}: the backbone file does not fit: expected {name} of shape "
                    f"{list(value.shape)}, found {found}; give torchvision's {net} of ImageNet"
                )
            state[key] = backbone[name]
        network.net.load_state_dict(state)
        self.network = network.eval().requires_grad_(False)
        self.name = f"lpips_{net}"
        self.hash = weights_hash(network)

    def features(self, images: Float[Tensor, "N 3 H W"]) -> list[Tensor]:
        taps = self.network.net(self.network.scaling_layer(images))
        # lpips.normalize_tensor divides by sqrt(sum + 0) + 1e-10: an infinite gradient where all
        # channels are zero. The value below is the same to 1e-10 and its gradient is finite.
        return [tap / (tap.square().sum(1, keepdim=True) + 1e-20).sqrt() for tap in taps]

    def compare(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> Float[Tensor, " N"]:
        parts = [
            layer((p - q).square()).mean((1, 2, 3))
            for layer, p, q in zip(self.network.lins, a, b, strict=True)
        ]
        return torch.stack(parts).sum(0)


def load_perceptual(name: str = "auto", backbone: str | Path | None = None) -> Perceptual:
    """Build a perceptual distance: float32, frozen, on the CPU.

    Args:
        name: "refinery" is the bundled trunk; "lpips-alex", "lpips-vgg", "lpips-squeeze" are LPIPS
            with torchvision's ImageNet backbone from `backbone`, from torch's hub cache, or by
            download; "auto" is LPIPS (alex) where its backbone is given or cached, else the trunk:
            it never downloads.
        backbone: file of the backbone's weights (torchvision's state dict).

    Raises:
        ConfigError: unknown name.
        AssetError: the weights cannot be had; the message says which file goes where.
    """
    if name not in NAMES:
        raise ConfigError(f"perceptual: expected one of {', '.join(NAMES)}, found {name!r}")
    if name == "auto":
        is_at_hand = backbone is not None or cached_backbone("alex").is_file()
        name = "lpips-alex" if is_at_hand else "refinery"
        logger.info("perceptual distance: auto chose %s", name)
    if name == "refinery":
        return TrunkDistance(load_trunk(asset_path("trunk", "trunk.safetensors"))[0])
    net = name.removeprefix("lpips-")
    return Lpips(net, _read_backbone(net, Path(backbone) if backbone else None))


def cached_backbone(net: str) -> Path:
    """Where torch's hub keeps the backbone of "alex", "vgg" or "squeeze" (it may be absent)."""
    return Path(torch.hub.get_dir()) / "checkpoints" / BACKBONES[net].rsplit("/", 1)[1]


def _read_backbone(net: str, path: Path | None) -> dict[str, Tensor]:
    target = path or cached_backbone(net)
    if path is None and not target.is_file():
        try:
            torch.hub.load_state_dict_from_url(
                BACKBONES[net], map_location="cpu", progress=False, check_hash=True
            )
        except (URLError, OSError, RuntimeError) as error:
            raise AssetError(
                f"lpips-{net}: its backbone {target.name} is not in torch's hub cache and cannot "
                f"be downloaded ({error}); fetch {BACKBONES[net]} elsewhere, put it at {target}, "
                f'or use perceptual = "refinery", the bundled trunk distance'
            ) from error
    return read_state_dict(target, f"the backbone {target} of lpips-{net}")
