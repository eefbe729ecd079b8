"""What the benchmark measures of one finished run, from what the run stored.

Nothing is inverted again for the scores of reconstructions: codes and doors come from Parquet.

Legend: N pictures, L num_ws, D w_dim, H W image, E edits.
"""

import io
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor, nn

from models.editing.direction import Direction
from models.inversion.base import Inversion, Method, SampleRng
from models.losses.frechet import FrechetFeatures, frechet_distance
from models.losses.perceptual import Perceptual
from models.stylegan2.generator import Generator
from tasks.run.ledger import read_markers
from tasks.run.query import query
from tasks.run.stored import read_inversions
from tasks.work.invert import Inverter

EDITS: tuple[tuple[str, float], ...] = (
    ("age", 3.0),
    ("age", -3.0),
    ("smile", 3.0),
    ("smile", -3.0),
)
"""Direction and strength, in standard deviations of codes along the direction."""
TRIM = 0.01
"""Share left out at each end before editing consistencies are averaged, as e4e's metric does."""
EDITED_SHARE = 0.5
"""Share of the pixels that counts as the place of the edit: those that change most."""
BLUR = 5
"""Side of the box that smooths the change before its largest pixels are taken, px of 64."""


@dataclass(frozen=True, kw_only=True)
class Edit:
    """A direction and how far to go."""

    direction: Direction
    strength: float

    @property
    def name(self) -> str:
        return f"{self.direction.name}{self.strength:+g}"

    def __call__(self, w_plus: Tensor, times: float = 1.0) -> Tensor:
        return self.direction.apply(w_plus, times * self.strength)


@dataclass(frozen=True, kw_only=True)
class Judges:
    """What all chains are measured with."""

    generator: Generator
    perceptual: Perceptual
    features: FrechetFeatures
    edits: tuple[Edit, ...]
    w_std: float


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A run's pictures and inversions, [-1, 1], in the order of the keys."""

    inversion: Inversion
    inputs: Float[Tensor, "N 3 H W"]


def read_stored(run_uri: str, generator: Generator) -> Stored:
    """All inverted samples of a run."""
    batches = list(read_inversions(run_uri, generator, with_inputs=True))
    inputs = [data for batch in batches for data in batch.inputs or ()]
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(d)).convert("RGB")) for d in inputs])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(127.5).sub(1.0)
    return Stored(inversion=Inversion.cat([b.inversion for b in batches]), inputs=images)


def trimmed_mean(values: Float[Tensor, " N"], share: float = TRIM) -> float:
    """Mean without the values below and above these quantiles."""
    low, high = torch.quantile(values, torch.tensor([share, 1 - share]).to(values))
    return float(values[(values >= low) & (values <= high)].mean())


def editing_consistency(
    found: Inversion,
    edit: Edit,
    generator: Generator,
    encoder: Method,
    w_std: float,
) -> Float[Tensor, " N"]:
    """LEC: edit, render, encode the edited picture, undo the edit: how far from the first code.

    Euclidean distance over all rows (e4e's metric), divided by sqrt(L) `w_std`: 1 is the spread of
    W. 0 for an encoder that finds exactly the code that a picture was rendered from.
    """
    edited = found.edited(generator, edit(found.w_plus)).render(generator).clamp(-1, 1)
    again = encoder.invert(edited, None, SampleRng(range(len(edited)))).w_plus
    moved = (edit(again, -1.0) - found.w_plus).flatten(1).norm(dim=1)
    return moved / (found.w_plus.shape[1] ** 0.5 * w_std)


def edit_mask(
    before: Float[Tensor, "N 3 H W"], after: Float[Tensor, "N 3 H W"]
) -> Bool[Tensor, "N 1 H W"]:
    """Where an edit is at work: the half of each picture that changes most.

    Args:
        before, after: what the plain generator makes of a code and of the edited code. Every method
            is measured on equally many pixels, those where its own code's edit does least.
    """
    change = (after - before).abs().mean(1, keepdim=True)
    size = max(1, BLUR * change.shape[2] // 64 // 2 * 2 + 1)
    smooth = F.avg_pool2d(change, size, 1, size // 2, count_include_pad=False).flatten(1)
    keep = max(1, round(EDITED_SHARE * smooth.shape[1]))
    places = smooth.argsort(dim=1, descending=True, stable=True)[:, :keep]
    mask = torch.zeros_like(smooth, dtype=torch.bool).scatter_(1, places, True)
    return mask.reshape(change.shape)


def drift_outside(
    reconstruction: Float[Tensor, "N 3 H W"],
    edited: Float[Tensor, "N 3 H W"],
    mask: Bool[Tensor, "N 1 H W"],
    perceptual: Perceptual,
) -> Float[Tensor, " N"]:
    """Perceptual distance between the reconstruction and the same with the edited picture outside
    the mask: what an edit changes where it has no business."""
    return perceptual(reconstruction, torch.where(mask, reconstruction, edited))


@torch.no_grad()
def score_run(run_uri: str, judges: Judges, inverter: Inverter, has_reencoder: bool) -> dict:
    """Everything that the table says of one chain. See docs/benchmark.md for the definitions."""
    stored = read_stored(run_uri, judges.generator)
    found: dict[str, object] = {"pictures": len(stored.inputs), **column_means(run_uri)}
    reconstruction = _render(stored.inversion, judges.generator)
    real = judges.features(stored.inputs)
    found["frechet_reconstruction"] = frechet_distance(judges.features(reconstruction), real)
    edits = {e.name: _score_edit(e, stored, reconstruction, real, judges) for e in judges.edits}
    found["edits"] = edits
    for name in ("frechet", "drift"):
        values = [edit[name] for edit in edits.values()]
        found[f"{name}_edited"] = statistics.fmean(values) if values else None
    found["lec"] = None
    if has_reencoder and judges.edits:
        first = inverter.methods[0]
        values = [
            editing_consistency(stored.inversion, e, judges.generator, first, judges.w_std)
            for e in judges.edits
        ]
        found["lec"] = trimmed_mean(torch.cat(values))
    found |= costs(run_uri, inverter, stored.inputs)
    return found


def column_means(run_uri: str) -> dict[str, float]:
    """Means of the run's metric columns over the inverted samples."""
    table = query(run_uri, "SELECT * EXCLUDE (w_plus, seed) FROM latents WHERE status = 'ok'")
    return {
        name: float(np.nanmean(table[name].to_numpy()))
        for name in table.column_names
        if str(table.schema.field(name).type) == "float"
    }


def costs(run_uri: str, inverter: Inverter, inputs: Float[Tensor, "N 3 H W"]) -> dict[str, object]:
    """Parameters, speed in batch and alone, bytes kept of each picture besides its code."""
    markers = read_markers(run_uri).values()
    rows = sum(marker.rows - marker.failed for marker in markers)
    busy = sum(marker.seconds["invert"] for marker in markers)
    kept = sum(m.parts["residuals"].bytes for m in markers if "residuals" in m.parts)
    pixels = inputs[:3].add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8)
    pictures = pixels.permute(0, 2, 3, 1).numpy()
    seconds = []
    for index in range(len(pictures)):  # the first one warms up
        started = time.perf_counter()
        inverter.invert(pictures[index : index + 1], [f"timing-{index}"])
        seconds.append(time.perf_counter() - started)
    return {
        "parameters": sum(
            network_parameters(method, is_first=index == 0)
            for index, method in enumerate(inverter.methods)
        ),
        "images_per_s": rows / busy if busy else None,
        "seconds_per_image": statistics.median(seconds[1:] or seconds),
        "bytes_per_picture": kept / rows if rows else None,
    }


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


def _render(found: Inversion, generator: Generator, batch: int = 32) -> Float[Tensor, "N 3 H W"]:
    """Clamped pictures, so many at a time."""
    parts = [found[i : i + batch] for i in range(0, len(found), batch)]
    return torch.cat([part.render(generator).clamp(-1, 1) for part in parts])


def _score_edit(
    edit: Edit, stored: Stored, reconstruction: Tensor, real: Tensor, judges: Judges
) -> dict[str, float]:
    generator, codes = judges.generator, stored.inversion.w_plus
    edited = _render(stored.inversion.edited(generator, edit(codes)), generator)
    mask = edit_mask(generator.synthesis(codes), generator.synthesis(edit(codes)))
    drift = drift_outside(reconstruction, edited, mask, judges.perceptual)
    return {
        "frechet": frechet_distance(judges.features(edited), real),
        "drift": float(drift.mean()),
    }


def edits_for(directions: dict[str, Direction]) -> tuple[Edit, ...]:
    """The edits of the protocol whose direction is there."""
    return tuple(
        Edit(direction=directions[name], strength=strength)
        for name, strength in EDITS
        if name in directions
    )


def edited_examples(
    stored: Stored, judges: Judges, edits: Sequence[Edit], count: int
) -> list[Float[Tensor, "K 3 H W"]]:
    """Reconstruction and each edit of the first pictures."""
    few = stored.inversion[:count]
    shown = [few, *(few.edited(judges.generator, edit(few.w_plus)) for edit in edits)]
    with torch.no_grad():
        return [_render(found, judges.generator) for found in shown]
