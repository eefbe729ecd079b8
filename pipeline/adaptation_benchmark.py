"""`refinery benchmark adaptation`: every style, guidance, rank and form, then one table of all."""

import itertools
import json
import logging
import shlex
import shutil
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from models.adaptation.domain import CARD, load_domain
from models.checkpoints.bundled import asset_path
from models.checkpoints.load import load_generator
from models.errors import ConfigError
from models.losses.trunk import load_trunk
from models.pictures import save_grid
from models.stylegan2.generator import Generator
from pipeline.adapt import adapt, load_adapt_config
from tasks.adapt.config import DomainConfig
from tasks.adapt.references import load_references
from tasks.benchmark.adaptation import (
    Eye,
    Portraits,
    Source,
    make_source,
    read_portraits,
    render,
    rendering_ratio,
    score_pictures,
    write_references,
)
from tasks.benchmark.adaptation_page import markdown
from tasks.benchmark.edits import run_response
from tasks.benchmark.machine import describe_machine
from tasks.job import InputConfig
from tasks.training.trunk import Teacher
from tasks.work.device import fixed_threads

STEPS, TIMED_STEPS, FEW = 100, 8, 10
BATCHES = (16, 64)
TIMED_CODES = ((6, 6), (8, 2))
"""Codes of a step with one domain and with four of them: each as many, and as many together."""
EDITS = ("age", "smile")
PROMPTS = {
    "impasto": "impasto oil painting of a face with thick brush strokes",
    "fantasy": "fantasy art of a face",
    "illustration": "illustration of a face",
}
"""Target texts by style, in words that the bundled CLIP knows."""
SHOWN = 10

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    Attributes:
        domain: its [[domain]] table, without name and references.
        references: how many training pictures it sees; 0 for none.
        settings: of the job.
    """

    name: str
    style: str
    domain: Mapping[str, Any] = field(default_factory=dict)
    references: int = FEW
    settings: Mapping[str, Any] = field(default_factory=dict)


def rows_of(styles: Sequence[str]) -> list[Row]:
    """Every style by ten pictures, by text and by one picture; ranks and the baseline for the
    first."""
    found = []
    for style in styles:
        found.append(Row(name=f"{style}, 10 pictures", style=style))
        text = {"guidance": "text", "target_text": PROMPTS.get(style, f"{style} of a face")}
        found.append(Row(name=f"{style}, text", style=style, domain=text, references=0))
        one = {"guidance": "image"}
        found.append(Row(name=f"{style}, 1 picture", style=style, domain=one, references=1))
    first = "impasto" if "impasto" in styles else styles[0]
    for rank in (1, 16):
        name = f"{first}, 10 pictures, rank {rank}"
        found.append(Row(name=name, style=first, settings={"rank": rank}))
    name = f"{first}, 10 pictures, all weights"
    return [*found, Row(name=name, style=first, settings={"form": "weights"})]


def benchmark_adaptation(
    out: str,
    *,
    portraits: str,
    generator_name: str = "faces64",
    squeezenet: str | None = None,
    steps: int = STEPS,
    styles: Sequence[str] | None = None,
    run: str | None = None,
    console: Any = None,
) -> Path:
    """Adapt what is not yet adapted, score everything, write adaptation.md, .json and .png.

    Args:
        portraits: Parquet file with columns id, image, style; a fifth of it is held out.
        squeezenet: SqueezeNet v1.1 weights (torchvision's names) for scores by a network that no
            loss sees; without it the table has those of our trunk alone.
        styles: which of the file's; none for all.
        run: an inversion run whose stored codes are edited for the page's second table.

    Returns:
        The Markdown file.

    Raises:
        RefineryError: portraits, generator or weights cannot be read.
    """
    place = Path(out)
    generator = load_generator(generator_name)
    given = read_portraits(portraits, generator.resolution)
    chosen = list(styles or sorted(given))
    if unknown := sorted(set(chosen) - set(given)):
        raise ConfigError(f"styles: {unknown} are not in {portraits}; it has {sorted(given)}")
    eyes = [Eye(load_trunk(asset_path("trunk", "trunk.safetensors"))[0])]
    if squeezenet:
        eyes.append(Eye(Teacher(squeezenet)))
    with fixed_threads(1):
        source = make_source(generator, eyes)
        bench = _Bench(place, generator_name, generator, given, eyes, source, steps, console)
        rows = {row.name: bench.row(row) for row in rows_of(chosen)}
        ceiling = {style: bench.ceiling(style) for style in chosen}
        timing = bench.timing(chosen)
        machine = describe_machine()
        edits = None if run is None else run_response(run, generator, EDITS)
    result: dict[str, Any] = {
        "title": "Domain adaptation on the same portraits",
        "command": shlex.join(["refinery", *sys.argv[1:]]),
        "machine": machine,
        "generator": generator_name,
        "data": Path(portraits).name,
        "held_out": {style: len(given[style].held_out) for style in chosen},
        "codes": len(source.images),
        "steps": steps,
        "eyes": [eye.name for eye in eyes],
        "rows": rows,
        "training_portraits": ceiling,
        "timing": timing,
    }
    if edits is not None:
        result["edits"] = edits
    (place / "adaptation.json").write_text(json.dumps(result, indent=1) + "\n")
    bench.grid([row for row in rows_of(chosen) if not row.settings])
    page = place / "adaptation.md"
    page.write_text(markdown(result))
    return page


class _Bench:
    """What every row needs; a row's scores are kept beside its domain, so a second run goes on."""

    def __init__(
        self,
        place: Path,
        generator_name: str,
        generator: Generator,
        portraits: Mapping[str, Portraits],
        eyes: Sequence[Eye],
        source: Source,
        steps: int,
        console: Any,
    ) -> None:
        self.place, self.generator_name, self.generator = place, generator_name, generator
        self.portraits, self.eyes, self.source = portraits, eyes, source
        self.steps, self.console = steps, console

    def row(self, row: Row) -> dict[str, Any]:
        """Adapt and score one row; its numbers."""
        folder = self._adapted(row)
        card = json.loads((folder / CARD).read_text())
        kept = folder / "scores.json"
        known = json.loads(kept.read_text()) if kept.is_file() else {}
        if known.get("sha256") != card["sha256"] or known.get("eyes") != [
            e.name for e in self.eyes
        ]:
            images = render(self.generator, self.source.w_plus, load_domain(folder))
            held_out = self.portraits[row.style].held_out
            scores = score_pictures(images, self.source, held_out, self.eyes)
            known = {"sha256": card["sha256"], "eyes": [e.name for e in self.eyes], **scores}
            kept.write_text(json.dumps(known))
        scores = {k: v for k, v in known.items() if k not in ("sha256", "eyes")}
        self._say(f"{row.name}: {scores}")
        same = {k: card[k] for k in ("seconds", "bytes", "status", "steps", "best_step")}
        return {**scores, **same, "rank": card["settings"]["rank"], "form": card["form"]}

    def _adapted(self, row: Row, settings: Mapping[str, Any] | None = None) -> Path:
        """The row's domain, made now if it is not there."""
        name = row.name.replace(", ", "-").replace(" ", "-")
        tables = self._tables([row], [name])
        sets = {"steps": self.steps, **row.settings, **(settings or {})}
        config = load_adapt_config(None, self._sets(sets), domains=tables)
        try:
            return adapt(config)[0]
        finally:
            shutil.rmtree(self.place / "references", ignore_errors=True)

    def _tables(self, rows: Sequence[Row], names: Sequence[str]) -> list[dict[str, Any]]:
        tables = []
        for row, name in zip(rows, names, strict=True):
            table = {"name": name, **row.domain}
            if row.references:
                pictures = self.place / "references" / name
                write_references(self.portraits[row.style], row.references, pictures)
                one = row.domain.get("guidance") == "image"
                table["references"] = str(next(pictures.iterdir()) if one else pictures)
            tables.append(table)
        return tables

    def _sets(self, settings: Mapping[str, Any]) -> list[str]:
        fixed = {
            "generator": self.generator_name,
            "out": str(self.place / "domains"),
            "preview_every": 1000,
            "threads": 1,
        }
        return [f"{key}={json.dumps(value)}" for key, value in (fixed | dict(settings)).items()]

    def ceiling(self, style: str) -> dict[str, float]:
        """The training portraits themselves against the held-out ones: what the few held-out
        pictures leave of a perfect domain."""
        folder = write_references(self.portraits[style], None, self.place / "references")
        domain = DomainConfig(name=style, references=str(folder))
        pictures, _ = load_references(domain, InputConfig(), self.generator.resolution)
        shutil.rmtree(folder)
        held_out = self.portraits[style].held_out
        return score_pictures(pictures, self.source, held_out, self.eyes, is_paired=False)

    def timing(self, styles: Sequence[str]) -> dict[str, Any]:
        """Seconds of a step with one domain and with four, and the speed of rendering."""
        kept = self.place / "timing.json"
        if kept.is_file():
            return json.loads(kept.read_text())
        row = Row(name="timing", style=styles[0])
        found: dict[str, Any] = {"steps": []}
        for one, four in TIMED_CODES:
            seconds = [self._step_seconds([row], one), self._step_seconds([row] * 4, four)]
            found["steps"].append({"codes": [one, four], "seconds": seconds})
        domain = load_domain(self.place / "domains" / f"{styles[0]}-10-pictures")
        found["rendering"] = {n: rendering_ratio(self.generator, domain, n) for n in BATCHES}
        kept.write_text(json.dumps(found))
        return json.loads(kept.read_text())

    def _step_seconds(self, rows: Sequence[Row], batch: int) -> float:
        """Median over the steps of a short job without scores and previews in between."""
        names = [f"timing-{index}" for index in range(len(rows))]
        tables = self._tables(rows, names)
        place = self.place / "timing"
        sets = {
            "steps": TIMED_STEPS,
            "batch": batch,
            "out": str(place),
            "validation_every": 1000,
        }
        moments: list[float] = []
        config = load_adapt_config(None, self._sets(sets), domains=tables)
        adapt(config, lambda _: moments.append(time.perf_counter()))
        for folder in (place, self.place / "references"):
            shutil.rmtree(folder, ignore_errors=True)
        steps = [b - a for a, b in itertools.pairwise(moments)]
        return statistics.median(steps[1:])

    def grid(self, rows: Sequence[Row]) -> None:
        """The same generated people, the source above, a line for each row below."""
        lines = [self.source.images[:SHOWN]]
        for row in rows:
            folder = self.place / "domains" / row.name.replace(", ", "-").replace(" ", "-")
            lines.append(render(self.generator, self.source.w_plus[:SHOWN], load_domain(folder)))
        save_grid(torch.cat(lines), self.place / "adaptation.png", SHOWN)

    def _say(self, text: str) -> None:
        if self.console is not None:
            self.console.print(text, highlight=False)
        logger.info("%s", text)
