"""What the benchmark measures of one finished run, from what the run stored.

Nothing is inverted again for the scores of reconstructions: codes and doors come from Parquet.

Legend: N pictures, L num_ws, D w_dim, H W image, E edits.
"""

import io
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from models.attributes import AttributeScorer
from models.editing.direction import Direction
from models.inversion.base import Inversion, Method, SampleRng
from models.losses.frechet import FrechetFeatures, frechet_distance
from models.losses.perceptual import Perceptual
from models.stylegan2.generator import Generator
from tasks.benchmark.chains import AS_IT_IS, Editing
from tasks.benchmark.costs import costs
from tasks.benchmark.faces import FaceNetwork, attribute_changes
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
BATCH = 32


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
class Instruments:
    """What all chains are measured with.

    Attributes:
        faces: compare persons; a column each. Empty for a generator of something else.
        attributes: measures what an edit changed; None for a generator of something else.
    """

    generator: Generator
    perceptual: Perceptual
    features: FrechetFeatures
    edits: tuple[Edit, ...]
    w_std: float
    faces: tuple[FaceNetwork, ...] = ()
    attributes: AttributeScorer | None = None


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A run's pictures and inversions, [-1, 1], in the order of the keys."""

    inversion: Inversion
    inputs: Float[Tensor, "N 3 H W"]
    editing: Editing = AS_IT_IS

    def moved(self, edit: Edit) -> Float[Tensor, "N L D"]:
        """The edited codes."""
        return edit(self.inversion.w_plus, self.editing.times)

    def edited(self, generator: Generator, edit: Edit) -> Inversion:
        return self.inversion.edited(generator, self.moved(edit), self.editing.kept)


def read_stored(run_uri: str, generator: Generator, editing: Editing = AS_IT_IS) -> Stored:
    """All inverted samples of a run."""
    batches = list(read_inversions(run_uri, generator, with_inputs=True))
    inputs = [data for batch in batches for data in batch.inputs or ()]
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(d)).convert("RGB")) for d in inputs])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(127.5).sub(1.0)
    inversion = Inversion.cat([b.inversion for b in batches])
    return Stored(inversion=inversion, inputs=images, editing=editing)


def trimmed_mean(values: Float[Tensor, " N"]) -> float:
    """Mean without the values below and above the quantiles of `TRIM`."""
    low, high = torch.quantile(values, torch.tensor([TRIM, 1 - TRIM]).to(values))
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
def score_run(
    run_uri: str,
    judges: Instruments,
    inverter: Inverter,
    has_reencoder: bool,
    editing: Editing = AS_IT_IS,
) -> dict[str, Any]:
    """Everything that the table says of one chain. See docs/benchmark.md for the definitions."""
    stored = read_stored(run_uri, judges.generator, editing)
    found: dict[str, object] = {"pictures": len(stored.inputs), **column_means(run_uri)}
    reconstruction = _render(stored.inversion, judges.generator)
    known = _Known(
        reconstruction=reconstruction,
        real=_batched(judges.features, stored.inputs),
        persons={face.name: _batched(face.features, stored.inputs) for face in judges.faces},
    )
    found["frechet_reconstruction"] = _frechet(reconstruction, known, judges)
    found |= _identities(reconstruction, known, judges)
    edits = {e.name: _score_edit(e, stored, known, judges) for e in judges.edits}
    found["edits"] = edits
    for name in ("frechet", "drift", *known.persons):
        values = [edit[name] for edit in edits.values()]
        found[f"{name}_edited"] = statistics.fmean(values) if values else None
    found |= edit_strengths(judges.edits, edits)
    found["lec"] = None
    if has_reencoder and judges.edits:
        first = inverter.methods[0]
        values = [
            editing_consistency(part, e, judges.generator, first, judges.w_std)
            for e in judges.edits
            for part in _parts(stored.inversion)
        ]
        found["lec"] = trimmed_mean(torch.cat(values))
    found |= costs(run_uri, inverter, stored.inputs)
    return found


def edit_strengths(
    edits: Sequence[Edit], scores: Mapping[str, Mapping[str, Any]]
) -> dict[str, float]:
    """`<attribute>_change`: how far an edit moves the attribute that it is of, in its direction;
    mean over the edits both ways. 0 for a method whose pictures do not follow the code."""
    found: dict[str, list[float]] = {}
    for edit in edits:
        change = scores[edit.name].get("change", {}).get(edit.direction.name)
        if change is not None:
            towards = math.copysign(1.0, edit.strength) * change
            found.setdefault(f"{edit.direction.name}_change", []).append(towards)
    return {name: statistics.fmean(values) for name, values in found.items()}


def column_means(run_uri: str) -> dict[str, float]:
    """Means of the run's metric columns over the inverted samples."""
    table = query(run_uri, "SELECT * EXCLUDE (w_plus, seed) FROM latents WHERE status = 'ok'")
    return {
        name: float(np.nanmean(table[name].to_numpy()))
        for name in table.column_names
        if str(table.schema.field(name).type) == "float"
    }


@dataclass(frozen=True, kw_only=True)
class _Known:
    """What all edits of a run are compared with.

    Attributes:
        real: Frechet features of the inputs.
        persons: embeddings of the inputs by column.
    """

    reconstruction: Float[Tensor, "N 3 H W"]
    real: Tensor
    persons: dict[str, Tensor]


def _parts(found: Inversion) -> list[Inversion]:
    return [found[i : i + BATCH] for i in range(0, len(found), BATCH)]


def _batched(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Row-wise functions, so many rows at a time: memory does not grow with the pictures."""
    parts = zip(*(value.split(BATCH) for value in inputs), strict=True)
    return torch.cat([function(*part) for part in parts])


def _render(found: Inversion, generator: Generator) -> Float[Tensor, "N 3 H W"]:
    """Clamped pictures."""
    return torch.cat([part.render(generator).clamp(-1, 1) for part in _parts(found)])


def _frechet(pictures: Tensor, known: _Known, judges: Instruments) -> float:
    return frechet_distance(_batched(judges.features, pictures), known.real)


def _identities(pictures: Tensor, known: _Known, judges: Instruments) -> dict[str, float]:
    """Mean similarity to the input pictures, by column."""
    return {
        face.name: float(
            face.compare(_batched(face.features, pictures), known.persons[face.name]).mean()
        )
        for face in judges.faces
    }


def _score_edit(edit: Edit, stored: Stored, known: _Known, judges: Instruments) -> dict[str, Any]:
    generator, codes = judges.generator, stored.inversion.w_plus
    edited = _render(stored.edited(generator, edit), generator)
    plain, moved = (_batched(generator.synthesis, w_plus) for w_plus in (codes, stored.moved(edit)))
    mask = edit_mask(plain, moved)
    drift = _batched(
        partial(drift_outside, perceptual=judges.perceptual), known.reconstruction, edited, mask
    )
    found: dict[str, Any] = {
        "frechet": _frechet(edited, known, judges),
        "drift": float(drift.mean()),
        **_identities(edited, known, judges),
    }
    if judges.attributes is not None:
        scores = [judges.attributes.logits(x) for x in (known.reconstruction, edited)]
        found["change"] = attribute_changes(*scores)
    return found


def edits_for(directions: dict[str, Direction]) -> tuple[Edit, ...]:
    """The edits of the protocol whose direction is there."""
    return tuple(
        Edit(direction=directions[name], strength=strength)
        for name, strength in EDITS
        if name in directions
    )


def edited_examples(
    stored: Stored, judges: Instruments, edits: Sequence[Edit], count: int
) -> list[Float[Tensor, "K 3 H W"]]:
    """Reconstruction and each edit of the first pictures."""
    few = replace(stored, inversion=stored.inversion[:count])
    shown = [few.inversion, *(few.edited(judges.generator, edit) for edit in edits)]
    with torch.no_grad():
        return [_render(found, judges.generator) for found in shown]
