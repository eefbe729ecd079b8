"""Editing stored samples: render every variant of the job, score what it changed.

Legend: N batch, L num_ws, D w_dim, H W picture.
"""

import hashlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from models.adaptation.domain import CARD, Domain, Mix, add_domains, find_domain
from models.attributes import BUNDLED, AttributeScorer, load_attributes
from models.cache import cache_folder
from models.checkpoints.bundled import find_for_generator
from models.editing.direction import Direction, apply_edits
from models.editing.find import find_direction
from models.errors import AssetError, ConfigError
from models.stylegan2.generator import StyleShift
from tasks.edit_job import BlendConfig, EditJobConfig, VariantConfig
from tasks.job import INPUTS
from tasks.run.parts import Layout
from tasks.run.source import check_has_codes
from tasks.run.stored import read_codes
from tasks.storage.files import join, read_bytes, write_bytes
from tasks.work.assignment import read_assignment
from tasks.work.device import local_copy, to_images
from tasks.work.station import Batch, Failures, Result
from tasks.work.stored_station import StoredStation

INVERSION = "inversion"
"""Column of the unedited picture, rendered again."""
TAKEN = (*INPUTS, INVERSION, "sample_key")
"""Names that no variant can have."""


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


class Editor(StoredStation):
    """Stored samples in, edited pictures and scores out: see `Station`.

    `drift` and `identity` compare a variant with the inversion rendered again, not with the
    original: they say what the edit changed.
    """

    stages = ("read", "edit", "score", "write")

    def check(self, job: EditJobConfig) -> None:
        check_has_codes(job.source)
        _check_names(job)

    def load(self) -> None:
        super().load()
        job = self.job
        codes = read_codes(job.source, {b.sample_key for v in job.variants for b in v.blends})
        self.variants = [self._variant(variant, codes) for variant in job.variants]
        self.generator.to(self.device)
        self.attributes = self._load_attributes()

    @property
    def layout(self) -> Layout:
        base = self.attributes.names if self.attributes else ()
        each = [f"{name}_change" for name in base]
        each += ["drift"] if self.perceptual else []
        each += ["identity"] if self.identity else []
        each.append("nscd")
        names = tuple(variant.config.name for variant in self.variants)
        return Layout(
            method=self.job.method,
            metrics=(*base, *(f"{metric}@{name}" for name in names for metric in each)),
            shape=self.shape,
            output=self.job.output,
            faces=self.has_faces,
            variants=names,
        )

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(name for name in INPUTS if name in self.job.output.pictures)

    def _variant(self, config: VariantConfig, codes: Mapping[str, Tensor]) -> _Variant:
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

    def _load_attributes(self) -> AttributeScorer | None:
        if self.job.attributes == "none":
            return None
        made_for = self.hashes["generator"]
        if self.job.attributes == "auto" and find_for_generator(made_for, BUNDLED[1]) is None:
            return None  # the bundled scorer knows faces of that kind only
        scorer = load_attributes(local_copy(self.job.attributes)).to(self.device)
        self.hashes["attributes"] = scorer.hash
        return scorer

    @torch.inference_mode()
    def compute(self, batch: Batch) -> Result:
        assert batch.inversion is not None
        started = time.perf_counter()
        inversion = batch.inversion.to(self.device)
        failures: Failures = {}
        codes: dict[str, Tensor] = {}

        def stored(name: str, image: Tensor) -> np.ndarray:
            return self.pixels(f"the picture {name}", image, failures)

        pictures = {INVERSION: stored(INVERSION, inversion.render(self.generator))}
        for variant in self.variants:
            name = variant.config.name
            codes[name], shift = variant.moved(inversion.w_plus)
            changed = inversion.edited(self.generator, codes[name], variant.config.residual, shift)
            changed = add_domains(changed, variant.mixes(batch.keys))
            pictures[name] = stored(name, changed.render(self.generator))
        edited_s = time.perf_counter() - started
        metrics = self._score(pictures, codes)
        return Result(
            inversion=batch.inversion,
            pictures=pictures,
            metrics=metrics,
            failures=failures,
            seconds={"edit": edited_s, "score": time.perf_counter() - started - edited_s},
        )

    def _score(
        self, pictures: dict[str, np.ndarray], codes: dict[str, Tensor]
    ) -> dict[str, np.ndarray]:
        images = {name: to_images(pixels, self.device) for name, pixels in pictures.items()}
        before = images[INVERSION]
        attributes = self.attributes(before) if self.attributes else {}
        values = dict(attributes)
        for variant in self.variants:
            name = variant.config.name
            if self.attributes:
                after = self.attributes(images[name])
                values |= {f"{k}_change@{name}": after[k] - attributes[k] for k in attributes}
            if self.perceptual:
                values[f"drift@{name}"] = self.perceptual(before, images[name])
            if self.identity:
                values[f"identity@{name}"] = self.identity(before, images[name])
            values[f"nscd@{name}"] = self.style_space.nscd(codes[name])
        return {name: values[name].float().cpu().numpy() for name in self.layout.metrics}


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
