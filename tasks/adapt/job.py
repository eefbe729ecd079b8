"""From a config to domain folders: everything is checked and read first, then the descent runs.

    <out>/<name>/tokens.safetensors, card.json, preview.png, job.parquet
    <out>/.jobs/<id>/checkpoint.pt, <name>.png      while it runs

A killed job that is started again goes on from its checkpoint and gives the same tokens, byte for
byte; a finished one is not run again.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from torch import Tensor

from models.adaptation.domain import CARD, Domain, add_domains, save_domain, without_noise
from models.checkpoints.bundled import asset_path
from models.checkpoints.load import load_generator
from models.errors import AssetError, ConfigError
from models.files import PARTIAL_SUFFIX, atomically
from models.inversion.base import Inversion, SampleRng, sample_seed
from models.inversion.registry import load_method, method_class
from models.losses.clip import load_clip
from models.losses.identity import load_identity
from models.losses.trunk import load_trunk
from models.pictures import save_grid
from models.stylegan2.generator import Generator, weights_hash
from tasks.adapt.config import AdaptConfig, DomainConfig
from tasks.adapt.forms import Form, make_form
from tasks.adapt.guidance import Guide, Judges, Reference, Seen, look
from tasks.adapt.loop import Descent, DomainState
from tasks.adapt.references import load_references
from tasks.adapt.terms import TERMS
from tasks.input.align import with_template

SOURCE_PICTURES = 64
"""Generated pictures whose mean embedding a set's direction starts from (StyleGAN-NADA: 16)."""
SHOWN = 8
"""Held-out codes in a preview."""


@dataclass(frozen=True, kw_only=True)
class AdaptProgress:
    """Where a job stands.

    Attributes:
        scores: best validation score by domain.
        notes: by domain that left the job early, why.
    """

    step: int
    steps: int
    scores: Mapping[str, float]
    notes: Mapping[str, str]


OnProgress = Callable[[AdaptProgress], None]


def adapt(config: AdaptConfig, on_progress: OnProgress | None = None) -> list[Path]:
    """Optimise the config's domains together; their folders, in the config's order.

    A domain whose loss is not finite stops with its best tokens so far, which its card says
    (`status`, `note`); the others go on.

    Raises:
        ConfigError: references that are empty or cannot be read, texts that mean the same, a method
            that is not known.
        AssetError: no such generator, CLIP or weights.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    job = _Job(config)
    done = [job.folder(domain) for domain in config.domain]
    if all(_is_made_by(folder, job.id) for folder in done):
        return done
    job.prepare()
    job.run(on_progress)
    return job.write()


def _is_made_by(folder: Path, job_id: str) -> bool:
    try:
        return json.loads((folder / CARD).read_text()).get("job") == job_id
    except (OSError, ValueError):
        return False


class _Job:
    """One job: `__init__` reads what its identity stands on, `prepare` the rest."""

    def __init__(self, config: AdaptConfig) -> None:
        self.config = config
        # Cheap checks come before any network is read.
        for method in config.invert:
            method_class(method.name)
        self.generator = load_generator(config.generator).to(config.device)
        if self.generator.c_dim:
            raise ConfigError(
                f"generator {config.generator}: it is conditional; adaptation draws codes without "
                "a condition"
            )
        self.generator_hash = weights_hash(self.generator)
        self.references: dict[str, Float[Tensor, "M 3 H W"]] = {}
        hashes = {"generator": self.generator_hash}
        for domain in config.domain:
            if domain.guidance != "text":
                input = with_template(config.input, self.generator.provenance.get("card"))
                found, digest = load_references(domain, input, self.generator.resolution)
                self.references[domain.name] = found.to(config.device)
                hashes[f"references.{domain.name}"] = digest
        self.judges = _judges(config)
        hashes |= {f"clip.{i}": clip.hash for i, (clip, _) in enumerate(self.judges.clips)}
        self.hashes, self.id = hashes, config.job_id(hashes)
        self.place = Path(config.out) / ".jobs" / self.id[:16]
        self.seconds = 0.0

    def folder(self, domain: DomainConfig) -> Path:
        return Path(self.config.out) / domain.name

    # ------------------------------------------------------------------ before the first step

    def prepare(self) -> None:
        """Targets of every domain, what is optimised, and the checkpoint where there is one."""
        config = self.config
        needs_source = any(
            d.guidance == "images" and (d.weight("direction") or d.colour < 1)
            for d in config.domain
        )
        source = self._source() if needs_source else None
        streams = [
            torch.Generator().manual_seed(sample_seed(config.seed, domain.name))
            for domain in config.domain
        ]
        inverted = {d.name: self._inverted(d.name) for d in config.domain if d.guidance == "image"}
        form: Form = make_form(config, self.generator, streams)
        guides = [
            Guide(
                domain,
                self.judges,
                self.references.get(domain.name),
                source,
                inverted.get(domain.name),
                stream,
            )
            for domain, stream in zip(config.domain, streams, strict=True)
        ]
        _settle(self.generator, config)
        self.descent = Descent(config, self.generator, guides, form, self.judges)
        self._resume()

    @torch.no_grad()
    def _source(self) -> Seen:
        rng = torch.Generator().manual_seed(sample_seed(self.config.seed, "source"))
        z = torch.randn(SOURCE_PICTURES, self.generator.z_dim, generator=rng)
        w_plus = self.generator.mapping(
            z.to(self.config.device), truncation_psi=self.config.truncation_psi
        )
        noise = self.config.noise
        images = torch.cat([self.generator.synthesis(part, noise) for part in w_plus.split(16)])
        return look(images, [images], self.judges)

    def _inverted(self, name: str) -> Reference:
        """The reference's own code by the chain of `invert`."""
        image = self.references[name][:1]
        found: Inversion | None = None
        rng = SampleRng([sample_seed(self.config.seed, name)])
        for method in self.config.invert:
            found = load_method(method.name, self.generator, **method.settings).invert(
                image, found, rng
            )
        if found is None or found.failures:
            why = found.failures[0] if found else "`invert` names no method"
            raise ConfigError(f"{name}: its reference cannot be inverted: {why}")
        w_plus = found.w_plus.detach()
        with torch.no_grad():
            source = self.generator.synthesis(w_plus, self.config.noise)
            return Reference(
                image=image,
                w_plus=w_plus,
                seen=look(image, [image], self.judges),
                inverted=look(source, [source], self.judges),
            )

    # ------------------------------------------------------------------ the steps

    def run(self, on_progress: OnProgress | None) -> None:
        """Every step; a checkpoint and previews every so many."""
        config, descent = self.config, self.descent
        started, before = time.perf_counter(), self.seconds
        while descent.step < config.steps and descent.rows:
            descent.advance()
            self.seconds = before + time.perf_counter() - started
            if descent.step % config.preview_every == 0 and descent.step < config.steps:
                self._save()
                self._previews(self.place, list(descent.adam.tensors), descent.rows)
            if on_progress is not None:
                on_progress(self._progress())
        descent.finish()
        self.seconds = before + time.perf_counter() - started

    def _progress(self) -> AdaptProgress:
        states = dict(zip((d.name for d in self.config.domain), self.descent.states, strict=True))
        return AdaptProgress(
            step=self.descent.step,
            steps=self.config.steps,
            scores={name: state.score for name, state in states.items()},
            notes={name: state.note for name, state in states.items() if state.note},
        )

    @torch.no_grad()
    def _previews(self, place: Path, tensors: Sequence[Tensor], rows: Sequence[int]) -> None:
        descent = self.descent
        codes = descent.held_out[:SHOWN]
        before = self.generator.synthesis(codes, self.config.noise)
        for at, row in enumerate(rows):
            one = [t[at : at + 1] for t in tensors]
            after = descent.form.render(one, codes[None])
            path = place / f"{self.config.domain[row].name}.png"
            save_grid(torch.cat([before, after]).cpu(), path, len(codes))

    def _save(self) -> None:
        with atomically(self.place / "checkpoint.pt") as file:
            torch.save({"seconds": self.seconds, **self.descent.state()}, file)

    def _resume(self) -> None:
        path = self.place / "checkpoint.pt"
        if not path.exists():
            return
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds for a damaged file
            raise AssetError(
                f"{path}: cannot read ({type(error).__name__}); delete it and start the job again"
            ) from error
        self.seconds = state["seconds"]
        self.descent.restore(_moved(state, self.config.device))

    # ------------------------------------------------------------------ after the last step

    def write(self) -> list[Path]:
        """Every domain's folder; then the checkpoint goes."""
        self.generator.compute_dtype = None
        folders = []
        for row, (domain, state) in enumerate(
            zip(self.config.domain, self.descent.states, strict=True)
        ):
            folders.append(self._write(row, domain, state))
        for path in self.place.glob("*") if self.place.is_dir() else ():
            path.unlink()
        if self.place.is_dir():
            self.place.rmdir()
        return folders

    def _write(self, row: int, domain: DomainConfig, state: DomainState) -> Path:
        config = self.config
        card = {
            "job": self.id,
            "form": config.form,
            "guidance": domain.guidance,
            "status": state.status,
            "note": state.note,
            "steps": state.steps,
            "best_step": state.best_step,
            "score": state.score,
            "scores": {name: round(value, 6) for name, value in state.scores.items()},
            "seconds": round(self.seconds, 1),
            "domains_in_batch": len(config.domain),
            "references": len(self.references.get(domain.name, ())),
            "terms": domain.terms,
            "method": "RefineStyle domain adaptation (arXiv 2410.06104), tasks.adapt",
            "domain": _without_paths(asdict(domain)),
            "weights": {t: domain.weight(t) for t in TERMS if domain.weight(t)},
            "settings": _without_paths(config.settings()),
            "clips": [clip.name for clip, _ in self.judges.clips],
            "hashes": {k: v for k, v in self.hashes.items() if _concerns(k, domain)},
        }
        form = self.descent.form
        best = [t[row : row + 1] for t in self.descent.best]
        tensors = form.scaled(best, domain.strength, row)
        made = form.domain(domain.name, self.generator_hash, tensors, card)
        folder = self.folder(domain)
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(f".*{PARTIAL_SUFFIX}"):  # by a job that was killed as it wrote
            left.unlink(missing_ok=True)
        self._final_preview(made, folder)
        _write_row(folder, domain, config, state, self.seconds, made)
        return save_domain(made, folder)  # last: its card says that all is there

    @torch.no_grad()
    def _final_preview(self, made: Domain, folder: Path) -> None:
        codes = self.descent.held_out[:SHOWN]
        plain = without_noise(codes, self.generator)
        after = add_domains(plain, [[(made, 1.0)]]).render(self.generator)
        before = plain.render(self.generator)
        save_grid(torch.cat([before, after]).cpu(), folder / "preview.png", len(codes))


def _judges(config: AdaptConfig) -> Judges:
    clips = []
    if any(domain.needs("clip") for domain in config.domain):
        clips = [(load_clip(c.source).to(config.device), c.weight) for c in config.clips]
    identity = None
    if config.identity is not None and any(d.weight("identity") for d in config.domain):
        identity = load_identity(config.identity).to(config.device)
    trunk = load_trunk(asset_path("trunk", "trunk.safetensors"))[0].to(config.device)
    reads_tokens = any(d.weight("tokens") for d in config.domain)
    return Judges(trunk=trunk, clips=clips, identity=identity, reads_tokens=reads_tokens)


def _settle(generator: Generator, config: AdaptConfig) -> None:
    """The form that trains fastest (tasks.training.blocks.prepared measures it)."""
    generator.requires_grad_(False)
    if config.precision == "bfloat16":
        generator.compute_dtype = torch.bfloat16
    if generator.resolution <= 64:
        generator.form, generator.memory_format = "implicit", torch.channels_last


def _write_row(
    folder: Path,
    domain: DomainConfig,
    config: AdaptConfig,
    state: DomainState,
    seconds: float,
    made: Domain,
) -> None:
    """The job as one Parquet row, so that all jobs are one query: domains/*/job.parquet."""
    tensors = made.tokens.tensors().values() if made.tokens else ()
    row: dict[str, Any] = {
        "domain": domain.name,
        "status": state.status,
        "note": state.note,
        "guidance": domain.guidance,
        "form": config.form,
        "rank": config.rank,
        "steps": state.steps,
        "best_step": state.best_step,
        "seconds": seconds,
        "score": state.score,
        "scores": json.dumps(state.scores),
        "settings": json.dumps(config.settings(), sort_keys=True),
        "domain_settings": json.dumps(asdict(domain), sort_keys=True),
        "generator_hash": made.generator_hash,
        "bytes": sum(2 * t.numel() for t in tensors)
        or sum(d.codes.numel() for d in (made.weights or {}).values()),
    }
    with atomically(folder / "job.parquet") as file:
        pq.write_table(pa.Table.from_pylist([row]), file)


def _without_paths(settings: dict[str, Any]) -> dict[str, Any]:
    """File names only: a machine's paths tell nobody anything."""
    names = ("references", "identity", "generator")
    return {k: Path(v).name if k in names and v else v for k, v in settings.items()}


def _concerns(name: str, domain: DomainConfig) -> bool:
    return not name.startswith("references.") or name == f"references.{domain.name}"


def _moved(value: Any, device: str) -> Any:
    """Tensors of the descent to their device; states of random numbers stay on the CPU."""
    if isinstance(value, Tensor):
        return value if value.dtype == torch.uint8 else value.to(device)
    if isinstance(value, list):
        return [_moved(v, device) for v in value]
    if isinstance(value, dict):
        return {k: _moved(v, device) for k, v in value.items()}
    return value
