"""Where a picture's time goes at 64, 256 and 1024 px, and what JPEGs cost to decode.

Run: python -m benchmarks.stages [--sizes 64 256 1024] [--rounds 3]

CPU milliseconds of one thread, one picture at a time beyond 64 px. 64 px are the bundled networks,
larger ones the official layout (config f, e4e at 256 px) with random weights: speed does not depend
on their values. Pictures are smooth noise. Writes stages.json and stages.md beside this file.
"""

import argparse
import io
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks.synthesis import interleaved, make_generator
from models.checkpoints.load import load_generator
from models.encoders.checkpoint import build_encoder
from models.encoders.psp import EncoderArchitecture
from models.inversion.base import SampleRng
from models.inversion.registry import load_method
from models.losses.perceptual import load_perceptual
from models.losses.structure import ssim
from models.pictures import to_bytes
from tasks.benchmark.machine import describe_machine
from tasks.input.decode import decode
from tasks.input.sample import RawSample
from tasks.job import InputConfig
from tasks.run.rows import encode_picture

HERE = Path(__file__).parent
SMALL, ENCODER_SIZE, BATCH = 64, 256, 16
SOURCES = (64, 256, 1024, 2048)
"""Sides of the JPEGs that are decoded, px."""
CONFIG = InputConfig()
Task = Callable[[], object]


def picture(size: int) -> np.ndarray:
    """uint8 [H W 3] with detail at every scale, as photographs have."""
    rng = torch.Generator().manual_seed(size)
    image = torch.zeros(1, 3, size, size)
    side = 4
    while side <= size:
        layer = torch.randn(1, 3, side, side, generator=rng) * (2 / side**0.5)
        image += F.interpolate(layer, size=(size, size), mode="bicubic")
        side *= 2
    return to_bytes(0.4 * image)[0].numpy()


def encoded(pixels: np.ndarray, kind: str) -> RawSample:
    buffer = io.BytesIO()
    options = {"quality": 92} if kind == "JPEG" else {}
    Image.fromarray(pixels).save(buffer, kind, **options)
    return RawSample("picture", "picture", buffer.getvalue())


def milliseconds(tasks: Mapping[str, Task], rounds: int) -> dict[str, float]:
    """Median CPU time of every task over rounds that run all of them."""
    seconds = interleaved(tasks, rounds, time.process_time)
    return {name: 1000 * value for name, value in seconds.items()}


def stage_tasks(size: int) -> tuple[dict[str, Task], int]:
    """The stages of `refinery invert --method e4e` on one batch, and how many pictures that is."""
    pixels, sample = picture(size), encoded(picture(size), "JPEG")
    count = BATCH if size == SMALL else 1
    generator = load_generator("faces64") if size == SMALL else make_generator(size)
    perceptual = load_perceptual("refinery")
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None].float().div(127.5).sub(1.0)
    images = images.expand(count, -1, -1, -1).contiguous()
    w_plus = torch.randn(count, generator.num_ws, generator.w_dim)
    if size == SMALL:
        method = load_method("e4e", generator)

        def invert() -> Tensor:
            return method.invert(images, None, SampleRng(range(count))).w_plus

    else:
        architecture = EncoderArchitecture(num_ws=generator.num_ws, input_size=ENCODER_SIZE)
        encoder = build_encoder(architecture).eval().requires_grad_(False)
        encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

        def invert() -> Tensor:
            return encoder(images.contiguous(memory_format=torch.channels_last))

    return {
        "decode": lambda: [decode(sample, CONFIG, size) for _ in range(count)],
        "encoder": invert,
        "render": lambda: generator.synthesis(w_plus),
        "perceptual": lambda: perceptual(images, images),
        "ssim": lambda: ssim(images, images),
        "two PNGs": lambda: [encode_picture(pixels, "png") for _ in range(2 * count)],
    }, count


@torch.inference_mode()
def stages(size: int, rounds: int) -> dict[str, Any]:
    """CPU milliseconds of a picture by stage, in float32."""
    tasks, count = stage_tasks(size)
    found = {name: value / count for name, value in milliseconds(tasks, rounds).items()}
    return {"size": size, "batch": count, "milliseconds": found}


def decoding(source: int, target: int, rounds: int) -> dict[str, Any]:
    """Pictures a second and core from a JPEG, and what shrinking while decoding changes.

    The error is against the whole picture decoded, then shrunk (a PNG of it takes that road).
    """
    sample = encoded(picture(source), "JPEG")
    assert sample.data is not None
    whole = encoded(np.asarray(Image.open(io.BytesIO(sample.data)).convert("RGB")), "PNG")
    times = milliseconds({"jpeg": lambda: decode(sample, CONFIG, target)}, 5 * rounds)
    found = decode(sample, CONFIG, target).astype(int)
    difference = found - decode(whole, CONFIG, target)
    return {
        "source": source,
        "target": target,
        "per_second": 1000 / times["jpeg"],
        "rms_error": float(np.sqrt((difference**2).mean())),
        "max_error": int(np.abs(difference).max()),
    }


def page(result: Mapping[str, Any]) -> str:
    """Both tables as Markdown."""
    machine, found = result["machine"], result["stages"]
    names = list(found[0]["milliseconds"])
    lines = [
        "# Where a picture's time goes",
        "",
        f"`{result['command']}`",
        "",
        f"CPU milliseconds a picture, float32, one thread. {machine['chip']}, torch "
        f"{machine['torch']}, {machine['date']}.",
        "",
        "| px | batch | " + " | ".join(names) + " | all |",
        "|---:|" + "---:|" * (len(names) + 2),
    ]
    for row in found:
        values = list(row["milliseconds"].values())
        cells = " | ".join(f"{value:.2f}" for value in [*values, sum(values)])
        lines.append(f"| {row['size']} | {row['batch']} | {cells} |")
    lines += [
        "",
        "JPEGs, and the error of letting libjpeg shrink them, in steps of 8 bits:",
        "",
        "| from, px | to, px | pictures/s and core | RMS error | largest |",
        "|---:|---:|---:|---:|---:|",
    ]
    for row in result["decoding"]:
        lines.append(
            f"| {row['source']} | {row['target']} | {row['per_second']:.0f} | "
            f"{row['rms_error']:.2f} | {row['max_error']} |"
        )
    return "\n".join(lines) + "\n"


def measure(sizes: Sequence[int], rounds: int) -> dict[str, Any]:
    """Stages at every size, decoding from every source that is not smaller."""
    torch.set_num_threads(1)
    pairs = [(source, target) for target in sizes for source in SOURCES if source >= target]
    return {
        "machine": describe_machine(),
        "command": "python -m benchmarks.stages " + " ".join(sys.argv[1:]),
        "decoding": [decoding(source, target, rounds) for source, target in pairs],
        "stages": [stages(size, rounds) for size in sizes],
    }


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HERE / "stages")
    args = parser.parse_args()
    result = measure(args.sizes, args.rounds)
    args.out.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    args.out.with_suffix(".md").write_text(page(result))
    sys.stdout.write(page(result))


if __name__ == "__main__":
    main()
