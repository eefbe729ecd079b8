"""Pictures an hour at equal perceptual distance: `refine_opt` beside pivotal tuning.

Run: python -m benchmarks.equal_distance DATA.parquet [--limit 32] [--stops 0.08 0.06 0.05 0.04]

Every row stops each picture at its distance. Batches go through all rows in turn; times are of the
CPU on one thread. Scores are of what a run stores, rounded to 8 bits. Writes equal_distance.json
and equal_distance.md beside this file.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.attributes import load_attributes
from models.checkpoints.load import load_generator
from models.editing.direction import bundled_directions
from models.inversion.base import Inversion, SampleRng
from models.inversion.registry import load_method
from models.losses.perceptual import load_perceptual
from models.pictures import to_bytes
from models.stylegan2.generator import Generator
from tasks.benchmark.chains import TUNING
from tasks.benchmark.faces import face_networks
from tasks.benchmark.machine import describe_machine
from tasks.input.decode import decode
from tasks.input.plan import plan_shards
from tasks.input.read import read_shard
from tasks.job import InputConfig
from tasks.training.trainer import has_bfloat16_instructions
from tasks.work.device import to_images
from tasks.work.station import stored_doors

HERE = Path(__file__).parent
SETTINGS: dict[str, dict[str, Any]] = {
    "pti": {**TUNING, "preset": "pti"},
    "refine_opt": {"steps": 100, "ramp_down": 0.0, "rank": 8, "layers": [5, 6, 7, 8]},
}
"""Besides `perceptual` and the stop. The refined layers are those after CLCAE's map."""
EVERYWHERE = {**SETTINGS["refine_opt"], "layers": [], "rank": 2}
"""After an encoder without a map."""
PIVOT, BATCH, AGE = 0.06, 16, 3.0


@dataclass
class ChainRow:
    """A chain of two methods, and what was found of it so far."""

    first: str
    second: str
    stop: float
    precision: str = "float32"
    settings: Mapping[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    num_bytes: int = 0
    values: dict[str, list[Tensor]] = field(default_factory=dict)

    def load(self, generator: Generator) -> None:
        wanted = {"perceptual": "refinery", "stop_perceptual": self.stop, **self.settings}
        self.methods = [
            load_method(self.first, generator),
            load_method(self.second, generator, **wanted),
        ]

    def find(self, generator: Generator, images: Tensor, at: int) -> Inversion:
        """One batch, on the clock."""
        rng = range(at, at + len(images))
        started = time.process_time()
        is_exact = self.precision == "float32"
        generator.compute_dtype = None if is_exact else getattr(torch, self.precision)
        found: Inversion | None = None
        for method in self.methods:
            found = method.invert(images, found, SampleRng(rng))
        assert found is not None
        assert not found.failures, found.failures
        self.seconds += time.process_time() - started
        generator.compute_dtype = None
        doors = [stored_doors(found, row) for row in range(len(found))]
        self.num_bytes += sum(door.nbytes for parts in doors for door in parts.values())
        return found.stored()

    def keep(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self.values.setdefault(name, []).append(value)

    def summary(self, count: int) -> dict[str, Any]:
        means = {name: float(torch.cat(parts).mean()) for name, parts in self.values.items()}
        return {
            "chain": f"{self.first}+{self.second}",
            "precision": self.precision,
            "stop": self.stop,
            **means,
            "images_per_hour": 3600 * count / self.seconds,
            "bytes": self.num_bytes / count,
        }


def rows(stops: Sequence[float]) -> list[ChainRow]:
    """Pivotal tuning at its own threshold, `refine_opt` at several; in bfloat16 where the CPU has
    it."""
    own = SETTINGS["refine_opt"]
    found = [ChainRow("e4e", "pti", PIVOT, settings=SETTINGS["pti"])]
    found += [ChainRow("clcae", "refine_opt", stop, settings=own) for stop in stops]
    if has_bfloat16_instructions():
        found.append(ChainRow("clcae", "refine_opt", PIVOT, "bfloat16", own))
    found.append(ChainRow("e4e", "refine_opt", PIVOT, settings=EVERYWHERE))
    return found


def read_pictures(source: str, limit: int, size: int) -> Tensor:
    """The first pictures, [-1, 1]."""
    config = InputConfig()
    shards = plan_shards(source, limit, limit, config)
    samples = [sample for shard in shards for sample in read_shard(shard, config)]
    pixels = [torch.from_numpy(decode(sample, config, size)) for sample in samples[:limit]]
    return to_images(torch.stack(pixels).numpy(), torch.device("cpu"))


class RowScorer:
    """Scores of a batch of one row."""

    def __init__(self, generator: Generator) -> None:
        self.generator = generator
        self.perceptual = load_perceptual("refinery")
        self.faces, _ = face_networks()
        self.attributes = load_attributes()
        self.age = bundled_directions(generator)["age"]

    @torch.no_grad()
    def __call__(self, found: Inversion, images: Tensor) -> dict[str, Tensor]:
        seen = self._pixels(found)
        older = found.edited(self.generator, self.age.apply(found.w_plus, AGE))
        aged = self._pixels(older)
        scores = {
            "distance": self.perceptual(seen, images),
            "mse": (seen - images).square().mean((1, 2, 3)),
            "years": self.attributes.logits(aged)["age"] - self.attributes.logits(seen)["age"],
        }
        for face in self.faces:
            wanted = face.features(images)
            scores[face.name] = face.compare(face.features(seen), wanted)
            scores[f"{face.name}, age+3"] = face.compare(face.features(aged), wanted)
        return scores

    def _pixels(self, found: Inversion) -> Tensor:
        return to_images(to_bytes(found.render(self.generator)).numpy(), torch.device("cpu"))


def measure(source: str, limit: int, stops: Sequence[float]) -> dict[str, Any]:
    """Every row on the same pictures, batch by batch."""
    torch.set_num_threads(1)
    generator = load_generator("faces64")
    images, judges = read_pictures(source, limit, generator.resolution), RowScorer(generator)
    table = rows(stops)
    for row in table:
        row.load(generator)
        row.find(generator, images[:1], 0)  # warms up
        row.seconds, row.num_bytes = 0.0, 0
    for at in range(0, len(images), BATCH):
        batch = images[at : at + BATCH]
        for row in table:
            row.keep(judges(row.find(generator, batch, at), batch))
    command = "python -m benchmarks.equal_distance " + shlex.join(
        Path(each).name if Path(each).is_file() else each for each in sys.argv[1:]
    )
    summaries = [row.summary(len(images)) for row in table]
    for summary in summaries:
        summary["rate / pti"] = summary["images_per_hour"] / summaries[0]["images_per_hour"]
    return {
        "machine": describe_machine(),
        "command": command,
        "images": len(images),
        "rows": summaries,
    }


COLUMNS = {
    "stop": ("stop", "{:.3g}"),
    "distance": ("distance ↓", "{:.4f}"),
    "mse": ("MSE ↓", "{:.4f}"),
    "identity": ("identity ↑", "{:.3f}"),
    "identity_judge": ("judge ↑", "{:.3f}"),
    "years": ("age+3, years ↑", "{:.1f}"),
    "identity_judge, age+3": ("judge, age+3 ↑", "{:.3f}"),
    "bytes": ("bytes kept ↓", "{:,.0f}"),
    "images_per_hour": ("images/hour ↑", "{:,.0f}"),
    "rate / pti": ("/ pti", "{:.1f}"),
}


def page(result: Mapping[str, Any]) -> str:
    """The table as Markdown."""
    machine = result["machine"]
    has_half = any(row["precision"] == "bfloat16" for row in result["rows"])
    shown = {name: column for name, column in COLUMNS.items() if name in result["rows"][0]}
    lines = [
        "# Equal perceptual distance",
        "",
        f"`{result['command']}`",
        "",
        f"{result['images']} pictures, {machine['chip']}, torch {machine['torch']}, "
        f"{machine['date']}; CPU time, batch {BATCH}, rows in turn."
        + ("" if has_half else " This CPU has no bfloat16."),
        "",
        "| chain | precision | " + " | ".join(title for title, _ in shown.values()) + " |",
        "|---|---|" + "---:|" * len(shown),
    ]
    for row in result["rows"]:
        cells = [form.format(row[name]) for name, (_, form) in shown.items()]
        lines.append(f"| {row['chain']} | {row['precision']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data")
    parser.add_argument("--limit", type=int, default=32)
    parser.add_argument("--stops", type=float, nargs="+", default=[0.08, 0.06, 0.05, 0.04])
    parser.add_argument("--out", type=Path, default=HERE / "equal_distance")
    args = parser.parse_args()
    result = measure(args.data, args.limit, args.stops)
    args.out.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    args.out.with_suffix(".md").write_text(page(result))
    sys.stdout.write(page(result))


if __name__ == "__main__":
    main()
