"""Checkpoints of the field's official layout and size with random weights.

`python -m benchmarks.official 1024 FILE.pt` writes what `e4e_ffhq_encode.pt` is: generator
(`decoder.*`), encoder (`encoder.*`), `latent_avg` and options in one file. What it makes of a
picture means nothing; memory, time and sizes are those of the real one.
"""

import argparse
import math
from pathlib import Path

import torch

from models.checkpoints.rosinality import save_rosinality
from models.encoders.checkpoint import build_encoder
from models.encoders.psp import EncoderArchitecture
from models.stylegan2.generator import Generator, GeneratorArchitecture

TOP_WIDTH = 32
"""Channels at 1024 px of StyleGAN2's config F."""


def write_e4e(path: Path, resolution: int, seed: int = 0) -> Path:
    """Write an e4e checkpoint of a generator of config F at this resolution, a power of two."""
    sides = [2**power for power in range(2, int(math.log2(resolution)) + 1)]
    widths = {side: min(512, TOP_WIDTH * 1024 // side) for side in sides}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        architecture = GeneratorArchitecture(
            resolution=resolution, widths=widths, z_dim=512, w_dim=512, mapping_layers=8
        )
        generator = Generator(architecture).requires_grad_(False)
        encoder = build_encoder(EncoderArchitecture(num_ws=generator.num_ws, w_dim=512))
        codes = generator.mapping(torch.randn(1000, 512))[:, 0]
    generator.latent_avg.copy_(codes.mean(0))
    save_rosinality(generator, None, path)
    decoder = torch.load(path, weights_only=True)["g_ema"]
    state = {f"encoder.{name}": value for name, value in encoder.state_dict().items()}
    state |= {f"decoder.{name}": value for name, value in decoder.items()}
    options = argparse.Namespace(encoder_type="Encoder4Editing", start_from_latent_avg=True)
    average = generator.latent_avg.expand(generator.num_ws, -1).clone()
    torch.save({"state_dict": state, "latent_avg": average, "opts": options}, path)
    return path


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("resolution", type=int)
    parser.add_argument("file", type=Path)
    arguments = parser.parse_args()
    write_e4e(arguments.file, arguments.resolution)
