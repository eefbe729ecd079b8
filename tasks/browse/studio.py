"""Live edits: a run's generator with the directions and domains that fit it, a picture at a time.

Legend: N batch (1 here), H W picture.
"""

import hashlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image

from models.adaptation.domain import Domain, add_domains, find_domain, known_domains
from models.checkpoints.load import load_generator
from models.editing.direction import Direction, apply_edits
from models.editing.find import find_direction, known_directions
from models.errors import AssetError, ConfigError, SampleError
from models.inversion.base import Inversion
from models.pictures import to_bytes
from tasks.input.align import AUTO
from tasks.input.decode import decode
from tasks.input.detect import MTCNN, shows_face
from tasks.input.sample import RawSample
from tasks.run.ledger import read_marker
from tasks.run.run_json import read_run
from tasks.run.stored import check_run_generator, read_shard_inversions
from tasks.work.device import fixed_threads, local_copy
from tasks.work.invert import Inverter
from tasks.work.kinds import load_job, load_station

UPLOAD_PIXELS = 50_000_000
REACH = 3.0
"""A direction's slider goes so many of its units either way."""
THREADS = 1
Kind = Literal["direction", "domain", "residual"]


@dataclass(frozen=True, kw_only=True)
class Slider:
    """One thing that can be moved, in the units of `refinery edit`.

    Attributes:
        argument: what `refinery edit` calls it: its name, or where it lies.
    """

    kind: Kind
    name: str
    low: float
    high: float
    step: float
    start: float
    argument: str = ""

    @property
    def id(self) -> str:
        return f"{self.kind}.{self.name}"


@dataclass(frozen=True, kw_only=True)
class Photo:
    """A photo that somebody brought, inverted; never written anywhere.

    Attributes:
        picture: uint8 [H W 3], as the generator was asked for it.
        metrics: of its reconstruction.
        notes: what the reader should know of how it was done.
    """

    picture: UInt8[np.ndarray, "H W 3"]
    inversion: Inversion
    metrics: Mapping[str, float]
    notes: tuple[str, ...]


class Studio:
    """Renders a run's samples, edited. Any thread may ask; one renders at a time.

    Args:
        run_uri: a run that stores codes.
        folders: places in which folders `directions` and `domains` are looked for, beside what
            ships for the generator.

    Raises:
        AssetError: the run's generator is missing or another one than it was made with.
        LedgerError: there is no run.
    """

    def __init__(self, run_uri: str, folders: Sequence[str | Path] = (".",)) -> None:
        self.run_uri, self._lock = run_uri, threading.Lock()
        config = read_run(run_uri)["config"]
        self.generator = load_generator(local_copy(config["generator"]))
        check_run_generator(run_uri, self.generator)
        if config["precision"] != "float32":
            self.generator.compute_dtype = getattr(torch, config["precision"])
        self._arguments: dict[tuple[str, str], str] = {}
        self.directions = self._find_directions([Path(f, "directions") for f in folders])
        self.domains = self._find_domains([Path(f, "domains") for f in folders])
        self.sample = lru_cache(64)(self._sample)
        self._station: Inverter | None = None

    def sliders(self, inversion: Inversion) -> list[Slider]:
        """What can be moved of a picture."""
        found = [
            Slider(
                kind="direction",
                name=name,
                low=-REACH,
                high=REACH,
                step=0.1,
                start=0.0,
                argument=self._arguments["direction", name],
            )
            for name in self.directions
        ]
        found += [
            Slider(
                kind="domain",
                name=name,
                low=0.0,
                high=1.5,
                step=0.05,
                start=0.0,
                argument=self._arguments["domain", name],
            )
            for name, domain in self.domains.items()
            if inversion.weights is None or domain.weights is None
        ]
        if inversion.residual is not None or inversion.features is not None:
            residual = Slider(kind="residual", name="own", low=0.0, high=1.0, step=0.05, start=1.0)
            found.append(residual)
        return found

    def render(
        self, inversion: Inversion, values: Mapping[str, float]
    ) -> UInt8[np.ndarray, "H W 3"]:
        """The picture with its sliders at these values, as `refinery edit` would make it.

        Args:
            inversion: of one sample.
            values: by `Slider.id`; the others stay where they start.

        Raises:
            ConfigError: no such slider, or a value outside of it.
        """
        known = {slider.id: slider for slider in self.sliders(inversion)}
        for name, value in values.items():
            slider = known.get(name)
            if slider is None:
                raise ConfigError(f"slider {name!r}: not known; known: {', '.join(known)}")
            if not slider.low <= value <= slider.high:
                expected = f"{slider.low:g} to {slider.high:g}"
                raise ConfigError(f"slider {name}: expected {expected}, found {value:g}")
        at = {name: values.get(name, slider.start) for name, slider in known.items()}
        edits = [(d, at[f"direction.{n}"]) for n, d in self.directions.items()]
        mix = [(d, at.get(f"domain.{n}", 0.0)) for n, d in self.domains.items()]
        with self._lock, torch.inference_mode(), fixed_threads(THREADS):
            w_plus, shift = apply_edits(inversion.w_plus, [e for e in edits if e[1]])
            strength = at.get("residual.own", 1.0)
            changed = inversion.edited(self.generator, w_plus, strength, shift)
            image = add_domains(changed, [mix]).render(self.generator)
            return to_bytes(image.float().nan_to_num(0.0)).numpy()[0]

    def invert(self, data: bytes) -> Photo:
        """A photo by the chain of methods that the run was made with.

        Raises:
            SampleError: no picture, too large a one, or one that cannot be inverted.
            ConfigError, AssetError: the run's methods cannot be loaded.
        """
        station = self._inverter()
        picture, notes = self._decoded(data, station)
        key = hashlib.sha256(data).hexdigest()
        with self._lock:
            result = station.invert(picture[None], [key])
        for kind, reason in result.failures.values():
            raise SampleError(kind, reason)
        metrics = {name: float(values[0]) for name, values in result.metrics.items()}
        notes = (*notes, *result.notes)
        return Photo(picture=picture, inversion=result.inversion, metrics=metrics, notes=notes)

    def _inverter(self) -> Inverter:
        with self._lock:
            if self._station is None:
                station = load_station(load_job(self.run_uri), "cpu")
                assert isinstance(station, Inverter)
                self._station = station
            return self._station

    def _decoded(
        self, data: bytes, station: Inverter
    ) -> tuple[UInt8[np.ndarray, "H W 3"], tuple[str, ...]]:
        """The photo as the generator knows its pictures: a face where its template has it, by the
        detector; cut as the run cuts where there is no template, or from the centre with a note."""
        sample, size = RawSample("photo", "photo", data), self.generator.resolution
        limit = min(station.input.max_pixels, UPLOAD_PIXELS)
        settings = replace(station.input, max_pixels=limit, faces="largest")
        plain = replace(settings, fit="crop") if settings.fit == "align" else settings
        picture = decode(sample, plain, size)
        is_aligned = station.square and shows_face(Image.fromarray(picture), *station.square)
        if settings.template == AUTO or (is_aligned and settings.fit != "align"):
            return picture, ()
        aligned = replace(settings, fit="align", detector=settings.detector or MTCNN)
        try:
            return decode(sample, aligned, size), ()
        except AssetError as error:
            reason = str(error)
        except SampleError as error:
            reason = str(error)
            if error.kind != "align":
                raise
        return picture, (f"Not aligned, cut as it is ({reason}): expect a poorer likeness.",)

    def _sample(self, shard: int, key: str) -> Inversion | None:
        marker = read_marker(self.run_uri, shard)
        if marker is None:
            return None
        for batch in read_shard_inversions(self.run_uri, marker, 16):
            if key in batch.sample_keys:
                at = batch.sample_keys.index(key)
                return batch.inversion[at : at + 1]
        return None

    def _find_directions(self, folders: Sequence[Path]) -> dict[str, Direction]:
        found = {}
        for name in known_directions(self.generator, folders):
            try:
                found[name] = find_direction(name, self.generator, folders)
            except AssetError:  # of another generator
                continue
            places = [path for f in folders if (path := Path(f, f"{name}.json")).is_file()]
            self._arguments["direction", name] = _argument(name, places, "directions")
        return found

    def _find_domains(self, folders: Sequence[Path]) -> dict[str, Domain]:
        found = {}
        for name, place in sorted(known_domains(self.generator, folders).items()):
            try:
                found[name] = find_domain(name, self.generator, folders)
            except AssetError:  # of another generator
                continue
            places = [place] if place.parent in folders else []
            self._arguments["domain", name] = _argument(name, places, "domains")
        return found


def _argument(name: str, places: Sequence[Path], folder: str) -> str:
    """The name where `refinery edit` finds it by that, else the place."""
    return name if not places or places[0].parent == Path(folder) else str(places[0])
