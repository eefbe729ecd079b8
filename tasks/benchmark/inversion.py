"""The inversion benchmark: what a finished run of every chain is worth, as one table and page."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from models.attributes import load_attributes
from models.checkpoints.load import load_generator
from models.editing.direction import bundled_directions
from models.losses.frechet import FrechetFeatures
from models.losses.perceptual import load_perceptual
from models.statistics import statistics_for
from models.stylegan2.generator import weights_hash
from tasks.benchmark.chains import Chain
from tasks.benchmark.faces import face_networks
from tasks.benchmark.figures import grid, scatter
from tasks.benchmark.machine import command_line, describe_machine
from tasks.benchmark.scoring import Instruments, edited_examples, edits_for, read_stored, score_run
from tasks.benchmark.table import markdown
from tasks.job import JobConfig
from tasks.work.device import fixed_threads
from tasks.work.invert import Inverter

SHOWN = 6
SHOWN_EDITS = ("age+3", "smile-3")


class InversionTable:
    """Rows by chain; a chain without weights is a row that says what is missing.

    Args:
        generator_name: a bundled name or a checkpoint.

    Raises:
        AssetError: the generator cannot be read.
    """

    def __init__(self, generator_name: str) -> None:
        self.started = time.perf_counter()
        self.generator_name, self.generator = generator_name, load_generator(generator_name)
        self.generator_hash = weights_hash(self.generator)
        edits = edits_for(bundled_directions(self.generator))
        # Directions of age and smile are what tells that a generator makes faces.
        faces, self.missing_faces = face_networks() if edits else ((), {})
        self.instruments = Instruments(
            generator=self.generator,
            perceptual=load_perceptual("auto"),
            features=FrechetFeatures(),
            edits=edits,
            w_std=statistics_for(self.generator).w_std,
            faces=faces,
            attributes=load_attributes() if edits else None,
        )
        self.shown_edits = [edit for edit in edits if edit.name in SHOWN_EDITS]
        self.rows: dict[str, dict[str, Any]] = {}
        self.missing: dict[str, str] = {}
        self.notes: dict[str, str] = {}
        self.pictures: dict[str, list[torch.Tensor]] = {}
        self.inputs: torch.Tensor | None = None

    def measure(self, chain: Chain, run_uri: str, job: JobConfig, threads: int) -> None:
        """Score a chain by what its finished run stored.

        Raises:
            AssetError: a network of the job cannot be read.
        """
        inverter = Inverter(job, "cpu")
        with fixed_threads(threads):
            has_reencoder = chain.reencoder is not None
            self.rows[chain.name] = score_run(
                run_uri, self.instruments, inverter, has_reencoder, chain.editing
            )
            stored = read_stored(run_uri, self.generator, chain.editing)
            self.inputs = stored.inputs[:SHOWN]
            self.pictures[chain.name] = edited_examples(
                stored, self.instruments, self.shown_edits, SHOWN
            )
        self.notes[chain.name] = _note(chain, job)

    def lacks(self, chain: Chain, reason: str) -> None:
        """The chain's row is the reason why there is none."""
        self.missing[chain.name] = reason.replace("|", "/")

    def write(self, out: Path, order: Sequence[Chain], said: Mapping[str, Any]) -> Path:
        """Write inversion.md, .json, .svg and .png.

        Args:
            said: `data` and `batch`, as the page shall name them.

        Returns:
            The Markdown file.
        """
        judges = self.instruments
        result = {
            "title": "Inversion methods on the same pictures",
            "command": command_line(),
            **said,
            "machine": describe_machine(),
            "generator": self.generator_name,
            "generator_bytes": 2 * sum(p.numel() for p in self.generator.parameters()),
            "pictures": max((row["pictures"] for row in self.rows.values()), default=0),
            "perceptual": judges.perceptual.name,
            "faces": {face.name: face.hash for face in judges.faces},
            "missing_faces": self.missing_faces,
            "edits": [edit.name for edit in judges.edits],
            "order": [chain.name for chain in order],
            "rows": self.rows,
            "missing": self.missing,
            "notes": self.notes,
            "seconds": round(time.perf_counter() - self.started, 1),
        }
        out.mkdir(parents=True, exist_ok=True)
        (out / "inversion.json").write_text(json.dumps(result, indent=1) + "\n")
        (out / "inversion.svg").write_text(scatter(result))
        if self.inputs is not None:
            names = [edit.name for edit in self.shown_edits]
            grid(self.inputs, self.pictures, names).save(out / "inversion.png")
        page = out / "inversion.md"
        page.write_text(markdown(result))
        return page


def _note(chain: Chain, job: JobConfig) -> str:
    settings = [f"{link.method} {dict(link.settings)}" for link in chain.links if link.settings]
    losses = [identity_loss(str(m.settings.get("checkpoint") or "")) for m in job.methods]
    return "; ".join(filter(None, [chain.note, *settings, *losses]))


def identity_loss(checkpoint: str) -> str:
    """Whether a network was trained with an identity loss, as its card says."""
    if not checkpoint:
        return ""
    card = Path(checkpoint).with_suffix(".json")
    if not card.is_file():
        return ""
    used = json.loads(card.read_text())["provenance"].get("settings", {}).get("identity")
    return f"{card.stem} was trained with an identity loss ({used})" if used else ""
