"""What edits do to pictures, measured: the attribute that was meant, the others, and the distance.

A direction is applied at rising strengths to stored codes; a scorer reads the attributes off the
rendered pictures. Gender and smile are compared as logits, which do not saturate.

Legend: S strengths, N pictures, H W image.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from models.attributes import load_attributes
from models.editing.direction import Direction, apply_edits
from models.editing.find import find_direction
from models.inversion.base import Inversion
from models.losses.perceptual import load_perceptual
from models.stylegan2.generator import Generator, weights_hash
from tasks.benchmark.machine import describe_machine
from tasks.run.run_json import read_run
from tasks.run.stored import read_inversions

STRENGTHS = (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0)
TOLERANCE = 0.02
"""A fall of this share of a picture's whole response is not counted as one."""
BATCH = 32

Distance = Callable[[Tensor, Tensor], Tensor]


class Scorer(Protocol):
    """What is needed of `models.attributes.AttributeScorer`."""

    names: tuple[str, ...]
    hash: str

    def logits(self, images: Float[Tensor, "N 3 H W"]) -> Mapping[str, Float[Tensor, " N"]]: ...


@dataclass(frozen=True, kw_only=True)
class Response:
    """What one direction does.

    Attributes:
        strengths: rising.
        attributes: by name, of every picture at every strength; age in years, others as logits.
        drift: distance of the edited picture to the unedited one.
    """

    strengths: tuple[float, ...]
    attributes: Mapping[str, Float[Tensor, "S N"]]
    drift: Float[Tensor, "S N"]


def is_monotone(values: Float[Tensor, "S N"]) -> Bool[Tensor, " N"]:
    """Whether a picture's response rises with the strength: it ends higher than it starts, and no
    step falls by more than `TOLERANCE` of its range (largest minus smallest value)."""
    steps = values.diff(dim=0)
    span = values.amax(0) - values.amin(0)
    return (values[-1] > values[0]) & (steps >= -TOLERANCE * span).all(0)


@torch.no_grad()
def measure(
    found: Inversion,
    generator: Generator,
    direction: Direction,
    scorer: Scorer,
    distance: Distance,
    strengths: Sequence[float] = STRENGTHS,
) -> Response:
    """Edit every picture at every strength, with all its doors, and score it."""
    attributes: dict[str, list[Tensor]] = {name: [] for name in scorer.names}
    drifts = []
    for part in _batches(found):
        plain = _edited(part, generator, direction, None)
        scores = []
        drift = []
        for strength in strengths:
            images = _edited(part, generator, direction, strength)
            scores.append({name: x.cpu() for name, x in scorer.logits(images).items()})
            drift.append(distance(images, plain).cpu())
        for name in attributes:
            attributes[name].append(torch.stack([score[name] for score in scores]))
        drifts.append(torch.stack(drift))
    return Response(
        strengths=tuple(strengths),
        attributes={name: torch.cat(parts, 1) for name, parts in attributes.items()},
        drift=torch.cat(drifts, 1),
    )


def _batches(found: Inversion) -> Iterator[Inversion]:
    for start in range(0, len(found), BATCH):
        yield found[start : start + BATCH]


def _edited(
    found: Inversion, generator: Generator, direction: Direction, strength: float | None
) -> Float[Tensor, "N 3 H W"]:
    """The pictures at one strength; None leaves them as they are."""
    edits = [] if strength is None else [(direction, strength)]
    w_plus, shift = apply_edits(found.w_plus, edits)
    return found.edited(generator, w_plus, style_shift=shift).render(generator).clamp(-1, 1)


def summary(name: str, response: Response) -> dict[str, Any]:
    """What the table says of a direction. `monotone` is None for one that no attribute is of.

    Changes are from the weakest to the strongest strength; those of attributes that were not meant
    are in standard deviations between the unedited pictures, so that they can be compared.
    """
    strengths = response.strengths
    middle = min(range(len(strengths)), key=lambda index: abs(strengths[index]))
    own = response.attributes.get(name)
    spread = {k: float(v[middle].std()) for k, v in response.attributes.items()}
    change = {k: float((v[-1] - v[0]).mean()) for k, v in response.attributes.items()}
    return {
        "attribute": None if own is None else name,
        "pictures": response.drift.shape[1],
        "monotone": None if own is None else float(is_monotone(own).double().mean()),
        "mean": None if own is None else [round(float(x), 4) for x in own.mean(1)],
        "change": change.get(name),
        "change_in_deviations": {k: round(change[k] / max(spread[k], 1e-12), 4) for k in change},
        "drift": [round(float(x), 4) for x in response.drift.mean(1)],
    }


def edit_response(
    found: Inversion,
    generator: Generator,
    directions: Mapping[str, Direction],
    scorer: Scorer,
    distance: Distance,
) -> dict[str, Any]:
    """The response to every direction, ready for `markdown` and for JSON.

    Args:
        found: stored codes with whatever doors they have (`tasks.run.stored.read_inversions`).
        distance: perceptual, [N] for two batches of pictures.

    Raises:
        AssetError: a direction belongs to another generator, before any picture is rendered.
    """
    for direction in directions.values():
        direction.check_generator(generator)
    rows = {
        name: {
            "space": direction.space,
            "unit": round(direction.unit, 4),
            "accuracy": direction.accuracy,
            **summary(name, measure(found, generator, direction, scorer, distance)),
        }
        for name, direction in directions.items()
    }
    return {
        "generator_hash": weights_hash(generator),
        "scorer_hash": scorer.hash,
        "attributes": list(scorer.names),
        "strengths": list(STRENGTHS),
        "tolerance": TOLERANCE,
        "pictures": len(found),
        "machine": describe_machine(),
        "rows": rows,
    }


def run_response(run_uri: str, generator: Generator, names: Sequence[str]) -> dict[str, Any]:
    """`edit_response` of a run's stored pictures to directions by name or path, with the bundled
    trunk as the distance, on the generator's device.

    Raises:
        ConfigError: an unknown direction.
        AssetError, LedgerError: a direction or the run is another generator's, or cannot be read.
    """
    directions = [find_direction(name, generator) for name in names]
    device = generator.latent_avg.device
    found = Inversion.cat([batch.inversion for batch in read_inversions(run_uri, generator)])
    result = edit_response(
        found.to(device),
        generator,
        {direction.name: direction for direction in directions},
        load_attributes().to(device),
        load_perceptual("refinery").to(device),
    )
    return {"run_id": read_run(run_uri)["run_id"], **result}


def markdown(result: Mapping[str, Any]) -> str:
    """The response table as Markdown."""
    names, strengths = result["attributes"], result["strengths"]
    low, high = f"{strengths[0]:+g}", f"{strengths[-1]:+g}"
    head = ["direction", "held-out accuracy", "monotone", f"mean at {low}, 0, {high}"]
    head += [f"{name}, sd" for name in names] + [f"drift at {low}, {high}"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    middle = min(range(len(strengths)), key=lambda index: abs(strengths[index]))
    for name, row in result["rows"].items():
        means = "" if row["mean"] is None else row["mean"]
        cells = [
            name,
            "" if row["accuracy"] is None else f"{row['accuracy']:.2f}",
            "" if row["monotone"] is None else f"{100 * row['monotone']:.1f} %",
            ", ".join(f"{means[i]:.2f}" for i in (0, middle, -1)) if means else "",
        ]
        for attribute in names:
            value = f"{row['change_in_deviations'][attribute]:+.2f}"
            cells.append(f"**{value}**" if attribute == row["attribute"] else value)
        cells.append(f"{row['drift'][0]:.3f}, {row['drift'][-1]:.3f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write_response(result: Mapping[str, Any], folder: str | Path) -> tuple[Path, Path]:
    """`edits.md` and `edits.json` in a folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    page, data = folder / "edits.md", folder / "edits.json"
    page.write_text(markdown(result))
    data.write_text(json.dumps(result, indent=1) + "\n")
    return page, data
