"""One generator, the variants of an edit job and their scores, ready on one device.

A worker builds it once and keeps it; `edit_shard` hands it batches of stored samples.

Legend: N batch, L num_ws, D w_dim, H W picture.
"""

import hashlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from models.adaptation.domain import CARD, Domain, Mix, add_domains, find_domain
from models.attributes import AttributeScorer, load_attributes
from models.cache import cache_folder
from models.checkpoints.load import load_generator
from models.editing.direction import Direction, apply_edits
from models.editing.find import find_direction
from models.errors import AssetError, ConfigError
from models.inversion.base import Inversion
from models.losses.identity import load_identity
from models.losses.perceptual import load_perceptual
from models.losses.style_space import StyleSpace
from models.pictures import to_bytes
from models.statistics import statistics_for
from models.stylegan2.generator import Generator, StyleShift, weights_hash
from tasks.edit_job import BlendConfig, EditJobConfig, VariantConfig
from tasks.run.stored import check_run_generator, read_codes
from tasks.storage.files import join, read_bytes, write_bytes
from tasks.work.assignment import read_assignment
from tasks.work.device import (
    BatchLimit,
    device_name,
    fixed_threads,
    local_copy,
    prepare_device,
    rows_not_finite,
    to_images,
)

INVERSION = "inversion"
"""Column of the unedited picture, rendered again."""
TAKEN = ("input", INVERSION, "sample_key")
"""Names that no variant can have."""


@dataclass(frozen=True, kw_only=True)
class Edited:
    """The result of one batch.

    Attributes:
        pictures: uint8 [N H W 3] by column: "inversion" and every variant.
        metrics: float32 [N] by column name.
        failures: (kind, reason) by row; the row's other values must not be used.
        seconds: time of "edit" and "score".
        notes: what an operator should know.
    """

    pictures: dict[str, np.ndarray]
    metrics: dict[str, np.ndarray]
    failures: dict[int, tuple[str, str]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @staticmethod
    def cat(parts: Sequence["Edited"], notes: tuple[str, ...]) -> "Edited":
        """Join along the batch."""
        failures: dict[int, tuple[str, str]] = {}
        at = 0
        for part in parts:
            failures |= {at + row: why for row, why in part.failures.items()}
            at += len(part.pictures[INVERSION])
        first = parts[0]
        return Edited(
            pictures={k: np.concatenate([p.pictures[k] for p in parts]) for k in first.pictures},
            metrics={k: np.concatenate([p.metrics[k] for p in parts]) for k in first.metrics},
            failures=failures,
            seconds={k: sum(p.seconds[k] for p in parts) for k in first.seconds},
            notes=notes,
        )


@dataclass(frozen=True, kw_only=True)
class _Variant:
    """A variant with everything it names at hand."""

    config: VariantConfig
    directions: tuple[tuple[Direction, float], ...]
    domains: tuple[tuple[Domain, float], ...]
    assigned: Mapping[str, tuple[Domain, float]]
    blends: tuple[tuple[Float[Tensor, "L D"], BlendConfig], ...]

    def moved(
        self, w_plus: Float[Tensor, "N L D"]
    ) -> tuple[Float[Tensor, "N L D"], StyleShift | None]:
        """Codes blended, then edited, and the edits in style space."""
        for other, blend in self.blends:
            rows = list(blend.rows) or list(range(w_plus.shape[1]))
            w_plus = w_plus.clone()
            w_plus[:, rows] = w_plus[:, rows].lerp(other[rows].to(w_plus), blend.share)
        return apply_edits(w_plus, self.directions)

    def mixes(self, sample_keys: Sequence[str]) -> list[Mix]:
        """The domains of every sample, or one mix for all."""
        if not self.assigned:
            return [self.domains]
        own = (self.assigned.get(key) for key in sample_keys)
        return [[*self.domains, *([one] if one else [])] for one in own]


class Editor:
    """Stored samples in, edited pictures and scores out.

    Scores are of the stored pictures, rounded to 8 bits. `drift` and `identity` compare a variant
    with the inversion rendered again, not with the original: they say what the edit changed.

    Args:
        job: what to make.
        device: "cpu", "cuda", "cuda:1".
        threads: CPU threads of the computation; see `Inverter`.

    Attributes:
        generator: on `device`.
        hashes: sha256 by name of all that decides the result; part of the run's id.
        metric_names: columns that `edit` fills, in order.

    Raises:
        ConfigError: an unknown direction, domain, sample, setting or device.
        AssetError: something is missing, unreadable or belongs to another generator.
    """

    def __init__(self, job: EditJobConfig, device: str, *, threads: int = 1) -> None:
        _check_names(job)
        self.job, self.device, self.threads = job, prepare_device(device), threads
        with fixed_threads(threads):
            self.generator: Generator = load_generator(local_copy(job.generator))
            check_run_generator(job.source, self.generator)
            self.hashes: dict[str, str] = {
                "generator": weights_hash(self.generator),
                "source": job.source_run,
            }
            codes = read_codes(job.source, {b.sample_key for v in job.variants for b in v.blends})
            self.variants = [self._load(variant, codes) for variant in job.variants]
            self.generator.to(self.device)
            self._perceptual, self._identity = self._load_scores()
            self._attributes = self._load_attributes()
        if job.precision != "float32":
            self.generator.compute_dtype = getattr(torch, job.precision)
        self._style_space = StyleSpace(self.generator, statistics_for(self.generator).style_anchor)
        self._batches = BatchLimit(self.device, self.generator.resolution, job.batch)
        self.metric_names = self._metric_names()

    @property
    def device_name(self) -> str:
        """For the marker: "cpu" or "cuda NVIDIA H200"."""
        return device_name(self.device)

    def edit(self, inversion: Inversion, sample_keys: Sequence[str]) -> Edited:
        """Render every variant of one batch of stored samples, and score it.

        Args:
            sample_keys: one for each row.

        Raises:
            ShardError: not even one sample fits into memory.
        """
        with fixed_threads(self.threads):
            parts, notes = self._batches.run(
                len(inversion), lambda rows: self._edit(inversion[rows], sample_keys[rows])
            )
        return Edited.cat(parts, notes)

    # ------------------------------------------------------------------ building

    def _load(self, config: VariantConfig, codes: Mapping[str, Tensor]) -> _Variant:
        generator = self.generator
        rows = range(generator.num_ws)
        for blend in config.blends:
            if any(row not in rows for row in blend.rows):
                raise ConfigError(
                    f"variant {config.name}: blend of {blend.sample_key}: expected rows in "
                    f"0..{len(rows) - 1}, found {list(blend.rows)}"
                )
        directions, domains = [], []
        for edit in config.edits:
            direction = find_direction(local_copy(edit.name), generator, folders=())
            self.hashes[f"directions.{edit.name}"] = _digest(_direction_tensors(direction))
            directions.append((direction, edit.strength))
        for wanted in config.domains:
            domains.append((self._load_domain(wanted.name), wanted.strength))
        assigned = {}
        if config.assigned is not None:
            table = read_assignment(config.assigned)
            self.hashes[f"assigned.{config.assigned}"] = table.sha256
            loaded = {name: self._load_domain(name) for name in table.domains}
            assigned = {key: (loaded[name], g) for key, (name, g) in table.by_key.items()}
        for key in {blend.sample_key for blend in config.blends}:
            self.hashes[f"samples.{key}"] = _digest([codes[key]])
        return _Variant(
            config=config,
            directions=tuple(directions),
            domains=tuple(domains),
            assigned=assigned,
            blends=tuple((codes[blend.sample_key], blend) for blend in config.blends),
        )

    def _load_domain(self, name: str) -> Domain:
        domain = find_domain(_local_domain(name), self.generator, folders=self.job.domain_folders)
        self.hashes[f"domains.{name}"] = _digest(_domain_tensors(domain))
        return domain

    def _load_scores(self) -> tuple[Any, Any]:
        job, perceptual, identity = self.job, None, None
        if job.perceptual != "none":
            perceptual = load_perceptual(job.perceptual).to(self.device)
            self.hashes[f"perceptual.{perceptual.name}"] = perceptual.hash
        if job.identity is not None:
            identity = load_identity(local_copy(job.identity)).to(self.device)
            self.hashes["identity"] = identity.hash
        return perceptual, identity

    def _load_attributes(self) -> AttributeScorer | None:
        if self.job.attributes == "none":
            return None
        if self.job.attributes == "auto":
            bundled = load_generator("faces64")
            if weights_hash(bundled) != self.hashes["generator"]:
                return None  # the bundled scorer knows faces of that kind only
        scorer = load_attributes(local_copy(self.job.attributes)).to(self.device)
        self.hashes["attributes"] = scorer.hash
        return scorer

    def _metric_names(self) -> tuple[str, ...]:
        base = self._attributes.names if self._attributes else ()
        each = [f"{name}_change" for name in base]
        each += ["drift"] if self._perceptual else []
        each += ["identity"] if self._identity else []
        each.append("nscd")
        return (*base, *(f"{m}@{v.config.name}" for v in self.variants for m in each))

    # ------------------------------------------------------------------ one batch

    @torch.inference_mode()
    def _edit(self, inversion: Inversion, sample_keys: Sequence[str]) -> Edited:
        started = time.perf_counter()
        inversion = inversion.to(self.device)
        failures: dict[int, tuple[str, str]] = {}
        pictures = {INVERSION: self._stored(INVERSION, inversion.render(self.generator), failures)}
        codes: dict[str, Tensor] = {}
        for variant in self.variants:
            name = variant.config.name
            codes[name], shift = variant.moved(inversion.w_plus)
            changed = inversion.edited(self.generator, codes[name], variant.config.residual, shift)
            changed = add_domains(changed, variant.mixes(sample_keys))
            pictures[name] = self._stored(name, changed.render(self.generator, shift), failures)
        edited_s = time.perf_counter() - started
        metrics = self._score(pictures, codes)
        return Edited(
            pictures=pictures,
            metrics=metrics,
            failures=failures,
            seconds={"edit": edited_s, "score": time.perf_counter() - started - edited_s},
        )

    def _stored(self, name: str, image: Tensor, failures: dict[int, tuple[str, str]]) -> np.ndarray:
        """The picture as 8 bits; a row that is not finite fails."""
        image = image.float()
        for row in rows_not_finite([image]):
            failures.setdefault(row, ("not_finite", f"the picture {name} is not finite"))
        return to_bytes(image.nan_to_num(0.0)).cpu().numpy()

    def _score(
        self, pictures: dict[str, np.ndarray], codes: dict[str, Tensor]
    ) -> dict[str, np.ndarray]:
        images = {name: to_images(pixels, self.device) for name, pixels in pictures.items()}
        before = images[INVERSION]
        attributes = self._attributes(before) if self._attributes else {}
        values = dict(attributes)
        for variant in self.variants:
            name = variant.config.name
            if self._attributes:
                after = self._attributes(images[name])
                values |= {f"{k}_change@{name}": after[k] - attributes[k] for k in attributes}
            if self._perceptual:
                values[f"drift@{name}"] = self._perceptual(before, images[name])
            if self._identity:
                values[f"identity@{name}"] = self._identity(before, images[name])
            values[f"nscd@{name}"] = self._style_space.nscd(codes[name])
        return {name: values[name].float().cpu().numpy() for name in self.metric_names}


def _check_names(job: EditJobConfig) -> None:
    names = [variant.name for variant in job.variants]
    if not names:
        raise ConfigError("variants: there is none: give --edit, --domain or --blend")
    for name in names:
        if name in TAKEN:
            raise ConfigError(f"variants: {name!r} is the name of another picture; choose another")
        if names.count(name) > 1:
            raise ConfigError(f"variants: {name!r} stands twice; each picture needs its own name")
        if not re.fullmatch(r"[\w.+~=,-]+", name):
            raise ConfigError(
                f"variants: {name!r} cannot be the name of a column; expected letters, digits and "
                ". + - _ = ~ ,"
            )


def _local_domain(name: str) -> str:
    """A domain's folder; of one behind a URL a local copy."""
    if "://" not in name:
        return name
    card = read_bytes(join(name, CARD), AssetError)
    folder = cache_folder() / "domains" / hashlib.sha256(card).hexdigest()[:24]
    if not (folder / CARD).is_file():
        file = str(json.loads(card)["file"])
        write_bytes(str(folder / file), read_bytes(join(name, file), AssetError), AssetError)
        write_bytes(str(folder / CARD), card, AssetError)
    return str(folder)


def _direction_tensors(direction: Direction) -> list[Tensor]:
    """All that decides what it does."""
    rows = [-1] if direction.layers is None else list(direction.layers)
    origin = [] if direction.origin is None else [direction.origin]
    return [
        direction.vector * direction.unit,
        torch.tensor(rows),
        torch.tensor(direction.channels or ()),
        torch.tensor(origin),
    ]


def _domain_tensors(domain: Domain) -> list[Tensor]:
    residual, weights = domain.residual or {}, domain.weights or {}
    return [
        *(factor for _, part in sorted(residual.items()) for factor in (part.u, part.v)),
        *(value for _, delta in sorted(weights.items()) for value in (delta.codes, delta.step)),
    ]


def _digest(tensors: Sequence[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()
