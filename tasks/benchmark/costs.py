"""What a chain costs: parameters, time on one thread, bytes.

Legend: N pictures, H W image.
"""

import statistics
import time
from collections.abc import Sequence

import torch
from jaxtyping import Float
from scipy.stats import t as student
from torch import Tensor, nn

from models.inversion.base import Method
from models.losses.perceptual import Perceptual
from tasks.run.ledger import read_markers
from tasks.work.invert import Inverter

TIMED = 10
"""Pictures inverted one by one, after one that warms up."""
CONFIDENCE = 0.95


def half_width(values: Sequence[float]) -> float | None:
    """Half of the 95 % confidence interval of the mean (Student's t); None for fewer than two."""
    if len(values) < 2:
        return None
    quantile = float(student.ppf(0.5 + CONFIDENCE / 2, len(values) - 1))
    return quantile * statistics.stdev(values) / len(values) ** 0.5


def costs(run_uri: str, inverter: Inverter, inputs: Float[Tensor, "N 3 H W"]) -> dict[str, object]:
    """Parameters, speed in batch and alone, bytes kept of each picture besides its code.

    `*_ci` is the half width of the interval of the mean: over shards for images/s (of the clock on
    the wall), over pictures for seconds (of the CPU).

    Args:
        inverter: of the chain, with as many threads as the times are to be of.
    """
    markers = read_markers(run_uri).values()
    rows = sum(marker.rows - marker.failed for marker in markers)
    busy = sum(marker.seconds["invert"] for marker in markers)
    kept = sum(m.parts["residuals"].bytes for m in markers if "residuals" in m.parts)
    each = [m.seconds["invert"] / (m.rows - m.failed) for m in markers if m.rows > m.failed]
    width = half_width(each)
    alone = seconds_alone(inverter, inputs)
    return {
        "parameters": sum(
            network_parameters(method, is_first=index == 0)
            for index, method in enumerate(inverter.methods)
        ),
        "images_per_s": rows / busy if busy else None,
        # The interval of the seconds, as a share of them.
        "images_per_s_ci": width * (rows / busy) ** 2 if width is not None and busy else None,
        "seconds_per_image": statistics.fmean(alone),
        "seconds_per_image_ci": half_width(alone),
        "bytes_per_picture": kept / rows if rows else None,
    }


def seconds_alone(inverter: Inverter, inputs: Float[Tensor, "N 3 H W"]) -> list[float]:
    """CPU time of inverting and scoring one picture, for `TIMED` of them, after a warm-up: with one
    thread on an idle machine the time itself, and hardly another with other work beside it."""
    pixels = inputs[: TIMED + 1].add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    pictures = pixels.permute(0, 2, 3, 1).numpy()
    seconds = []
    for index in range(TIMED + 1):
        row = index % len(pictures)
        started = time.process_time()
        inverter.invert(pictures[row : row + 1], [f"timing-{index}"])
        seconds.append(time.process_time() - started)
    return seconds[1:]


def network_parameters(method: Method, *, is_first: bool = True) -> int:
    """Numbers in the networks that a method runs, the generator and the losses left out.

    Args:
        is_first: it has no method before it: an inner method that would stand in for one counts.
    """
    own = [
        value
        for value in vars(method).values()
        if isinstance(value, nn.Module)
        and value is not method.generator
        and not isinstance(value, Perceptual)
    ]
    inner = [v for v in vars(method).values() if isinstance(v, Method) and is_first]
    count = sum(p.numel() for module in own for p in module.parameters())
    return count + sum(network_parameters(m) for m in inner)
