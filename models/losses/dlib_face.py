"""dlib's face recognition network in torch: an embedding of faces that takes a gradient.

`dlib_face_recognition_resnet_model_v1.dat` (Davis King, CC0; He et al., "Deep Residual Learning",
2016, with 29 convolutions and half the filters) is read as data. dlib is not needed.

Legend: N batch, H W image, C channels.
"""

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models.encoders.checkpoint import check_layout
from models.errors import AssetError
from models.losses.face_chip import FaceChip
from models.losses.face_packages import packaged

PACKAGE = "face_recognition_models"
FILE = "models/dlib_face_recognition_resnet_model_v1.dat"
MEAN = Path(__file__).parents[1] / "assets/identity/dlib_mean.json"
"""The mean descriptor of 4,990 aligned faces, with its provenance."""
SIDE = 150
"""Of the faces that the network was trained on, px."""
MEAN_RGB = (122.782, 117.001, 104.298)
LEVELS = ((32, 3), (64, 4), (128, 3), (256, 3), (256, 1))
"""(channels, blocks); the first block of every level but the first halves the picture."""
_LAYER = re.compile(rb"\x01\x05con_4|\x01\x07affine_|\x01\x04fc_2")


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut without weights (He et al., option A)."""

    def __init__(self, inputs: int, outputs: int, *, halves: bool) -> None:
        super().__init__()
        self.halves = halves
        self.conv1 = nn.Conv2d(inputs, outputs, 3, *((2, 0) if halves else (1, 1)))
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)

    def forward(self, x: Float[Tensor, "N C H W"]) -> Float[Tensor, "N C2 H2 W2"]:
        found = self.conv2(F.relu(self.conv1(x)))
        if self.halves:
            # dlib adds what differs in size by zeros to the right, below and in further channels.
            x = F.avg_pool2d(x, 2)
            x = F.pad(x, (0, 0, 0, 0, 0, found.shape[1] - x.shape[1]))
            found = F.pad(found, (0, x.shape[3] - found.shape[3], 0, x.shape[2] - found.shape[2]))
        return F.relu(x + found)


class DlibFace(nn.Module):
    """dlib's ResNet-29; the affine layers that follow its convolutions are folded into them.

    dlib's descriptors are not normalised, share a large mean, and count as one person's below a
    distance of 0.6. The cosine of two strangers is therefore 0.83. `forward` takes the mean off, as
    principal components do, and divides by the length: strangers are then at 0.04 on average.
    """

    mean: Tensor
    mean_rgb: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 7, 2)
        blocks, inputs = [], 32
        for level, (channels, count) in enumerate(LEVELS):
            for index in range(count):
                blocks.append(Block(inputs, channels, halves=level > 0 and index == 0))
                inputs = channels
        self.blocks = nn.Sequential(*blocks)
        self.embed = nn.Linear(inputs, 128, bias=False)
        self.register_buffer("mean", torch.zeros(128))
        rgb = torch.tensor(MEAN_RGB, device="cpu").reshape(1, 3, 1, 1)
        self.register_buffer("mean_rgb", rgb, persistent=False)

    def descriptor(self, face: Float[Tensor, "N 3 150 150"]) -> Float[Tensor, "N 128"]:
        """dlib's own descriptor of faces in [-1, 1]."""
        x = (face.float() * 127.5 + (127.5 - self.mean_rgb)) / 256
        x = self.blocks(F.max_pool2d(F.relu(self.stem(x)), 3, 2))
        with torch.autocast(x.device.type, enabled=False):
            return self.embed(x.float().mean((2, 3)))

    def forward(self, face: Float[Tensor, "N 3 150 150"]) -> Float[Tensor, "N 128"]:
        """Unit embeddings: the direction from the mean face's descriptor."""
        return F.normalize(self.descriptor(face) - self.mean, dim=1)


FACE_CHIP = FaceChip(left=-0.0454, top=-0.0378, side=1.0937, pixels=SIDE)
"""What dlib shows the network of a face on the bundled template.

dlib turns and scales the eyes' corners and the nose's base onto a template, with a quarter of the
face around. `dlib.shape_predictor` finds these points on 595 training faces at, in the median,
(.764,.303) (.611,.311) (.225,.303) (.377,.311) (.494,.600); their least-squares similarity turns by
0.01 degrees, so what it shows is a square.
"""
FFHQ_CHIP = FaceChip(left=0.1546, top=0.2650, side=0.6993, pixels=SIDE)
"""The same square of a face where the crop of the FFHQ data set puts it."""


def find_dlib() -> Path:
    """The weights in the installed package.

    Raises:
        AssetError: it is not installed.
    """
    return packaged(PACKAGE, FILE, 'identity "dlib"')


def load_dlib(path: str | Path) -> DlibFace:
    """The network from dlib's .dat or from a .safetensors that `main` wrote; float32, on the CPU.

    Raises:
        AssetError: unreadable or another network; the message names what differs.
    """
    path = Path(path)
    try:
        state = load_file(path) if path.suffix == ".safetensors" else _read_dat(path)
    except (OSError, SafetensorError, IndexError, ValueError) as error:
        raise AssetError(f"identity {path}: cannot read: {error}") from error
    network = DlibFace()
    check_layout(state, network.state_dict(), f"identity {path}: not dlib's face network")
    network.load_state_dict(state)
    return network.eval().requires_grad_(False)


def _read_dat(path: Path) -> dict[str, Tensor]:
    """dlib's serialisation (a tag and a float tensor for each layer with weights) as a state dict.

    Raises:
        AssetError: other layers than those of the network.
    """
    with torch.device("meta"):
        expected = DlibFace()
    convs = {name: m for name, m in expected.named_modules() if isinstance(m, nn.Conv2d)}
    sizes = []
    for conv in convs.values():
        sizes += [conv.weight.numel() + conv.out_channels, 2 * conv.out_channels]
    sizes.append(expected.embed.weight.numel())
    found = list(_tensors(path.read_bytes()))
    if [len(values) for values in found] != sizes:
        raise AssetError(
            f"identity {path}: not dlib's face network (dlib_face_recognition_resnet_model_v1.dat)"
            f": expected {len(sizes)} layers with weights, found {len(found)}, or of other sizes"
        )
    state: dict[str, Tensor] = {}
    for (name, conv), kernel, affine in zip(
        convs.items(), found[:-1:2], found[1:-1:2], strict=True
    ):
        gain, shift = affine.chunk(2)
        weight, bias = kernel.split([conv.weight.numel(), conv.out_channels])
        state[f"{name}.weight"] = weight.reshape(conv.weight.shape) * gain.reshape(-1, 1, 1, 1)
        state[f"{name}.bias"] = bias * gain + shift
    state["embed.weight"] = found[-1].reshape(-1, 128).T.contiguous()
    state["mean"] = torch.tensor(json.loads(MEAN.read_text())["mean"])
    return state


def _tensors(data: bytes) -> Iterator[Float[Tensor, " S"]]:
    """Values of every layer with weights, in the order of computation."""
    at = 0
    while (match := _LAYER.search(data, at)) is not None:
        skipped = 3 if match.group().endswith(b"fc_2") else 1  # outputs, inputs; the version
        numbers, at = _integers(data, match.end(), skipped + 4)
        count = int(torch.tensor(numbers[skipped:]).prod())
        yield torch.frombuffer(bytearray(data[at : at + 4 * count]), dtype=torch.float32)
        at += 4 * count


def _integers(data: bytes, at: int, count: int) -> tuple[list[int], int]:
    """dlib's integers, a byte with their length before each; and where the next thing begins."""
    found = []
    for _ in range(count):
        end = at + 1 + (data[at] & 0x0F)
        found.append(int.from_bytes(data[at + 1 : end], "little"))
        at = end
    return found, at


def main() -> None:
    """`python -m models.losses.dlib_face OUT.safetensors`: the network for a machine without the
    package, in half precision."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("out")
    out = parser.parse_args().out
    state = load_dlib(find_dlib()).state_dict()
    half = {k: (v if k == "mean" else v.half()).contiguous() for k, v in state.items()}
    save_file(half, out)


if __name__ == "__main__":
    main()
