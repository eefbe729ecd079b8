"""Every style, guidance, rank and form of adaptation, learned and scored, then one table of all."""

import itertools
import json
import logging
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from models.adaptation.domain import CARD, known_domains, load_domain
from models.checkpoints.bundled import asset_path
from models.checkpoints.load import load_generator
from models.errors import ConfigError
from models.losses.identity import Identity, load_identity
from models.losses.sface import SFace, load_sface
from models.losses.trunk import load_trunk
from models.pictures import save_grid
from models.stylegan2.generator import Generator
from tasks.adapt.config import AdaptConfig, DomainConfig
from tasks.adapt.job import adapt
from tasks.adapt.portraits import Portraits, read_portraits
from tasks.adapt.references import load_references
from tasks.benchmark.adaptation import (
    Eye,
    Source,
    frechet_ratios,
    make_source,
    render,
    rendering_ratio,
    score_pictures,
)
from tasks.benchmark.adaptation_page import markdown
from tasks.benchmark.edits import run_response
from tasks.benchmark.machine import command_line, describe_machine
from tasks.job import InputConfig, MethodConfig
from tasks.training.squeezenet import SqueezeNet
from tasks.training.trainer import has_bfloat16_instructions
from tasks.work.device import fixed_threads

STEPS, TIMED_STEPS, FEW = 120, 8, 10
BATCHES = (16, 64)
TIMED_CODES = ((6, 6), (8, 2))
"""Codes of a step with one domain and with four of them: each as many, and as many together."""
EDITS = ("age", "smile")
PROMPTS = {
    "impasto": "impasto oil painting of a face with thick brush strokes",
    "fantasy": "fantasy painting of a face",
    "illustration": "illustration of a face",
}
"""Target texts by style, in words that the bundled CLIP knows."""
CURVE: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("style offsets", {"form": "style"}),
    ("rank 1", {"rank": 1}),
    ("rank 16", {"rank": 16}),
    ("all weights", {"form": "weights"}),
)
"""Forms beside the default, by size: what they cost and what they reach."""
INVERT = (MethodConfig(name="wplus", settings={"steps": 200}),)
"""Finds the code of one picture, also for a generator without encoders."""
SHOWN = 10

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DomainRow:
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


def rows_of(styles: Sequence[str]) -> list[DomainRow]:
    """Every style by ten pictures, by text and by one picture; the other forms for the first."""
    found = []
    for style in styles:
        found.append(DomainRow(name=f"{style}, 10 pictures", style=style))
        text = {"guidance": "text", "target_text": PROMPTS.get(style, f"{style} of a face")}
        found.append(DomainRow(name=f"{style}, text", style=style, domain=text, references=0))
        one = {"guidance": "image"}
        found.append(DomainRow(name=f"{style}, 1 picture", style=style, domain=one, references=1))
    first = "impasto" if "impasto" in styles else styles[0]
    curve = (
        DomainRow(name=f"{first}, 10 pictures, {name}", style=first, settings=settings)
        for name, settings in CURVE
    )
    return [*found, *curve]


def benchmark_adaptation(
    out: str,
    *,
    portraits: str,
    generator_name: str = "faces64",
    networks: Mapping[str, str | None] = {},
    steps: int = STEPS,
    styles: Sequence[str] | None = None,
    run: str | None = None,
    device: str = "cpu",
) -> Path:
    """Adapt what is not yet adapted, score everything, write adaptation.md, .json and .png.

    Args:
        portraits: Parquet file with columns id, image, style; a fifth of it is held out.
        networks: "squeezenet": SqueezeNet v1.1 weights (torchvision's names), for scores by a
            network that no loss sees; "identity": "sface", a face recognition network that no
            loss sees, or one that `load_identity` reads. Without them the table has the scores of
            our trunk alone.
        steps: of every adaptation; 0 scores the bundled domains alone.
        styles: which of the file's; none for all.
        run: an inversion run whose stored codes are edited for the page's second table.

    Returns:
        The Markdown file.

    Raises:
        RefineryError: portraits, generator or weights cannot be read.
    """
    place = Path(out)
    place.mkdir(parents=True, exist_ok=True)
    generator = load_generator(generator_name)
    given = read_portraits(portraits, generator.resolution)
    chosen = list(styles or sorted(given))
    if unknown := sorted(set(chosen) - set(given)):
        raise ConfigError(f"styles: {unknown} are not in {portraits}; it has {sorted(given)}")
    eyes = [Eye(load_trunk(asset_path("trunk", "trunk.safetensors"))[0])]
    if squeezenet := networks.get("squeezenet"):
        eyes.append(Eye(SqueezeNet(squeezenet)))
    face = networks.get("identity")
    with fixed_threads(1):
        source = make_source(generator, eyes)
        scorer = DomainScorer(
            generator=generator,
            source=source,
            eyes=eyes,
            identity=_face_network(face),
            portraits=given,
        )
        bench = _Bench(place, generator_name, portraits, scorer, steps, device)
        shipped = bench.shipped()
        wanted = rows_of(chosen) if steps else []
        rows = {row.name: bench.row(row) for row in wanted}
        ceiling = {style: bench.ceiling(style) for style in chosen}
        timing = bench.timing(chosen) if steps else {}
        machine = describe_machine()
        edits = None if run is None else run_response(run, generator, EDITS)
    result: dict[str, Any] = {
        "title": "Domain adaptation on the same portraits",
        "command": command_line(),
        "machine": machine,
        "generator": generator_name,
        "data": Path(portraits).name,
        "held_out": {style: len(given[style].held_out) for style in chosen},
        "codes": len(source.images),
        "steps": steps,
        "eyes": [eye.name for eye in eyes],
        "shipped": shipped,
        "rows": rows,
        "training_portraits": ceiling,
        "timing": timing,
    }
    if edits is not None:
        result["edits"] = edits
    (place / "adaptation.json").write_text(json.dumps(result, indent=1) + "\n")
    bench.grid([row for row in wanted if not row.settings])
    page = place / "adaptation.md"
    page.write_text(markdown(result))
    return page


def _face_network(name: str | None) -> Identity | SFace | None:
    if name is None:
        return None
    return load_sface() if name == "sface" else load_identity(name)


@dataclass(frozen=True, kw_only=True)
class DomainScorer:
    """What a domain is scored with."""

    generator: Generator
    source: Source
    eyes: Sequence[Eye]
    identity: Identity | SFace | None
    portraits: Mapping[str, Portraits]

    @property
    def key(self) -> list[str]:
        """Of kept scores: other networks score anew."""
        return [eye.name for eye in self.eyes] + ([self.identity.hash] if self.identity else [])

    def score(self, folder: Path, style: str) -> dict[str, float]:
        """Of a finished domain; without portraits of its style there is no distance to them."""
        images = render(self.generator, self.source.w_plus, load_domain(folder))
        held_out = self.portraits[style].held_out if style in self.portraits else None
        return score_pictures(images, self.source, held_out, self.eyes, self.identity)


class _Bench:
    """What every row needs; a row's scores are kept beside its domain, so a second run goes on."""

    def __init__(
        self,
        place: Path,
        generator_name: str,
        portraits: str,
        scorer: DomainScorer,
        steps: int,
        device: str,
    ) -> None:
        self.place, self.generator_name, self.portraits = place, generator_name, portraits
        self.scorer, self.steps, self.device = scorer, steps, device
        self.generator = scorer.generator

    def shipped(self) -> dict[str, dict[str, Any]]:
        """The generator's bundled domains."""
        found = {}
        for name, folder in known_domains(self.generator, ()).items():
            card = json.loads((folder / CARD).read_text())
            scores = self.scorer.score(folder, card["domain"].get("style", ""))
            logger.info("%s, shipped: %s", name, scores)
            same = {k: card[k] for k in ("seconds", "bytes", "status", "steps", "form")}
            found[name] = {**scores, **same, "guidance": card["guidance"]}
        return found

    def row(self, row: DomainRow) -> dict[str, Any]:
        """Adapt and score one row; its numbers."""
        folder = self._adapted(row)
        card = json.loads((folder / CARD).read_text())
        kept = folder / "scores.json"
        known = json.loads(kept.read_text()) if kept.is_file() else {}
        key = [card["sha256"], *self.scorer.key]
        if known.get("key") != key:
            known = {"key": key, **self.scorer.score(folder, row.style)}
            kept.write_text(json.dumps(known))
        scores = {k: v for k, v in known.items() if k != "key"}
        logger.info("%s: %s", row.name, scores)
        same = {k: card[k] for k in ("seconds", "bytes", "status", "steps", "best_step")}
        return {**scores, **same, "rank": card["settings"]["rank"], "form": card["form"]}

    def _adapted(self, row: DomainRow) -> Path:
        """The row's domain, made now if it is not there."""
        name = row.name.replace(", ", "-").replace(" ", "-")
        return adapt(self._job([row], [name], {"steps": self.steps, **row.settings}))[0]

    def _job(
        self, rows: Sequence[DomainRow], names: Sequence[str], settings: Mapping[str, Any]
    ) -> AdaptConfig:
        domains = []
        for row, name in zip(rows, names, strict=True):
            table = dict(row.domain)
            if row.references:
                table |= {"references": self.portraits, "style": row.style}
                table["reference_limit"] = row.references
            domains.append(DomainConfig(name=name, **table))
        fixed: dict[str, Any] = {
            "generator": self.generator_name,
            "out": str(self.place / "domains"),
            "preview_every": 1000,
            "threads": 1,
            "precision": "bfloat16" if has_bfloat16_instructions() else "float32",
            "device": self.device,
            "invert": INVERT,
        }
        return AdaptConfig(domain=tuple(domains), **fixed | dict(settings))

    def ceiling(self, style: str) -> dict[str, float]:
        """The training portraits themselves against the held-out ones: what the few held-out
        pictures leave of a perfect domain."""
        domain = DomainConfig(name=style, references=self.portraits, style=style)
        pictures, _ = load_references(domain, InputConfig(), self.generator.resolution)
        held_out = self.scorer.portraits[style].held_out
        return frechet_ratios(pictures, self.scorer.source, held_out, self.scorer.eyes)

    def timing(self, styles: Sequence[str]) -> dict[str, Any]:
        """Seconds of a step with one domain and with four, and the speed of rendering."""
        kept = self.place / "timing.json"
        if kept.is_file():
            return json.loads(kept.read_text())
        row = DomainRow(name="timing", style=styles[0])
        found: dict[str, Any] = {"steps": []}
        for one, four in TIMED_CODES:
            seconds = [self._step_seconds([row], one), self._step_seconds([row] * 4, four)]
            found["steps"].append({"codes": [one, four], "seconds": seconds})
        domain = load_domain(self.place / "domains" / f"{styles[0]}-10-pictures")
        found["rendering"] = {n: rendering_ratio(self.generator, domain, n) for n in BATCHES}
        kept.write_text(json.dumps(found))
        return json.loads(kept.read_text())

    def _step_seconds(self, rows: Sequence[DomainRow], batch: int) -> float:
        """Median over the steps of a short job without scores and previews in between."""
        names = [f"timing-{index}" for index in range(len(rows))]
        place = self.place / "timing"
        sets = {
            "steps": TIMED_STEPS,
            "batch": batch,
            "out": str(place),
            "validation_every": 1000,
        }
        moments: list[float] = []
        adapt(self._job(rows, names, sets), lambda _: moments.append(time.perf_counter()))
        shutil.rmtree(place, ignore_errors=True)
        steps = [b - a for a, b in itertools.pairwise(moments)]
        return statistics.median(steps[1:])

    def grid(self, rows: Sequence[DomainRow]) -> None:
        """The same generated people: the source, the bundled domains, a line for each row."""
        codes = self.scorer.source.w_plus[:SHOWN]
        lines = [self.scorer.source.images[:SHOWN]]
        for folder in known_domains(self.generator, ()).values():
            lines.append(render(self.generator, codes, load_domain(folder)))
        for row in rows:
            folder = self.place / "domains" / row.name.replace(", ", "-").replace(" ", "-")
            lines.append(render(self.generator, codes, load_domain(folder)))
        save_grid(torch.cat(lines), self.place / "adaptation.png", SHOWN)
