"""Composing: edited faces back into the photographs that they were cut from.

Each photograph that has a face becomes one file, `photos/<picture>/<its key>` in the run, for each
picture that is put back. It is written before the commit that names it, and again with the same
bytes where the shard is done again. The photographs are read once more, from where the run of
inversions had them.
"""

import hashlib
import io
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np
from PIL import Image, JpegImagePlugin

from models.errors import ConfigError, SampleError
from tasks.input.decode import UPRIGHT, opened, orientation
from tasks.input.sample import is_image_name
from tasks.job import OutputConfig, StoredJob
from tasks.run.parts import Layout
from tasks.run.rows import SUFFIX
from tasks.run.run_json import read_declared, read_run
from tasks.storage.files import join, write_bytes
from tasks.storage.names import file_name
from tasks.work.attempt import Attempt
from tasks.work.originals import originals
from tasks.work.paste import PasteConfig, paste
from tasks.work.station import Batch, Failures, Result
from tasks.work.stored_station import StoredStation

THREADS = 4
"""Photographs composed side by side: Pillow and NumPy release the interpreter lock."""
INVERSION = "inversion"
MODES = {"RGB": "RGB", "L": "L", "RGBA": "RGBA", "LA": "LA", "P": "RGB", "PA": "RGBA"}
"""Modes of photographs, and in which one they are composed; of others every pixel would change."""
FORMATS = {"JPEG": "jpeg", "MPO": "jpeg", "PNG": "png", "WEBP": "webp"}
"""Formats that are written as they were read; what comes in another is written as PNG."""
BACK = UPRIGHT | {6: UPRIGHT[8], 8: UPRIGHT[6]}
"""EXIF orientation to what undoes `UPRIGHT`."""


@dataclass(frozen=True, kw_only=True)
class ComposeJob(StoredJob):
    """Faces of a run back in their photographs."""

    kind: ClassVar[str] = "compose"

    pictures: tuple[str, ...] = ()
    """Which to put back; empty: every edit of the run, of a run without edits the inversion."""
    paste: PasteConfig = field(default_factory=PasteConfig)
    photo_format: Literal["same", "png", "jpeg", "webp"] = "same"
    """Of the files. png and webp are lossless; same: JPEG with the photograph's own tables."""
    output: OutputConfig = field(default_factory=lambda: OutputConfig(pictures=()))
    perceptual: str = "none"


class Composer(StoredStation):
    """Stored faces in, photographs out: see `Station`.

    `seam@V` is the difference of colour along the border of a face before it was matched, 0..255;
    `photo@V` and `photo_sha256@V` name the file.
    """

    stages = ("read", "compose", "write")
    reads_doors = False

    def check(self, job: ComposeJob) -> None:
        declared = read_declared(job.source)
        if not declared.faces:
            raise ConfigError(
                f"{job.source} does not say where in their photographs its faces are: only runs "
                "that began with `refinery invert --align` (or input.fit = align) do"
            )
        self.names = job.pictures or declared.variants or (INVERSION,)
        self.changes = {name for name in self.names if _adds_change(name, job)}
        for name in self.columns:
            if name not in declared.pictures:
                raise ConfigError(
                    f"pictures: {job.source} has stored no pictures {name!r}, only "
                    f"{', '.join(declared.pictures) or 'codes'}"
                )

    @property
    def columns(self) -> tuple[str, ...]:
        before = (INVERSION,) if self.changes else ()
        return tuple(dict.fromkeys([*self.names, *before]))

    @property
    def layout(self) -> Layout:
        return Layout(
            method=self.job.method,
            metrics=tuple(f"seam@{name}" for name in self.names),
            shape=self.shape,
            output=self.job.output,
            faces=True,
            texts=tuple(f"{what}@{n}" for n in self.names for what in ("photo", "photo_sha256")),
        )

    def load(self) -> None:
        super().load()
        self.generator.to(self.device)

    def read(self, attempt: Attempt, pool: Executor) -> Iterator[Batch]:
        """Photographs with all their faces, about `job.batch` faces at a time."""
        ready: list[Batch] = []
        for photo, input, faces in originals(attempt, super().read(attempt, pool)):
            photos = [(photo, input)] * len(faces)
            ready.append(replace(Batch.cat(faces), photos=photos, folder=attempt.run.uri))
            if sum(map(len, ready)) >= self.job.batch:
                yield Batch.cat(ready)
                ready = []
        if ready:
            yield Batch.cat(ready)

    def compute(self, batch: Batch) -> Result:
        assert batch.inversion is not None
        started = time.perf_counter()
        failures: Failures = {}
        seams = np.zeros((len(self.names), len(batch)), np.float32)
        by_photo: dict[str, list[int]] = defaultdict(list)
        for at, row in enumerate(batch.rows):
            by_photo[row.image_uri].append(at)
        with ThreadPoolExecutor(THREADS) as pool:
            for rows, done in zip(
                by_photo.values(),
                pool.map(lambda rows: self._composed(batch, rows), by_photo.values()),
                strict=True,
            ):
                if isinstance(done, SampleError):
                    failures |= {at: (done.kind, str(done)) for at in rows}
                else:
                    seams[:, rows] = done
        return Result(
            inversion=batch.inversion,
            pictures={},
            metrics={f"seam@{name}": seams[n] for n, name in enumerate(self.names)},
            failures=failures,
            seconds={"compose": time.perf_counter() - started},
        )

    def _composed(self, batch: Batch, rows: Sequence[int]) -> np.ndarray | SampleError:
        """Write one photograph's files; its seams by picture and face."""
        raw, input = batch.photos[rows[0]]
        try:
            with opened(raw, input, None) as upright:
                base = _in_mode(upright.picture)
                kept = Kept.of(upright.source)
                found = [self._variant(batch, rows, name, base, kept) for name in self.names]
        except SampleError as error:
            return error
        return np.array(found)

    def _variant(
        self, batch: Batch, rows: Sequence[int], name: str, base: Image.Image, kept: "Kept"
    ) -> list[float]:
        bands = "".join(base.getbands())
        pixels = np.array(base).reshape(base.height, base.width, -1)
        colours = pixels[..., : len(bands.removesuffix("A"))]
        seams = []
        for at in rows:
            row = batch.rows[at]
            assert row.face is not None
            mode = "L" if colours.shape[2] == 1 else "RGB"
            new = _decoded(batch.encoded[name][at], mode)
            changes = name in self.changes
            old = _decoded(batch.encoded[INVERSION][at], mode) if changes else None
            seams.append(paste(colours, row.face, new, old, self.job.paste))
        composed = Image.fromarray(pixels.squeeze(), base.mode)
        raw = batch.photos[rows[0]][0]
        data, suffix = kept.encoded(composed, raw.key, self.job.photo_format)
        path = f"photos/{name}/{file_name(raw.key, suffix)}"
        write_bytes(join(batch.folder, path), data)
        digest = hashlib.sha256(data).hexdigest()
        for at in rows:
            batch.rows[at].texts |= {f"photo@{name}": path, f"photo_sha256@{name}": digest}
        return seams


@dataclass(frozen=True)
class Kept:
    """What stays of a photograph's file besides its pixels.

    Attributes:
        options: EXIF block, colour profile, resolution, of a JPEG also its tables.
    """

    format: str
    orientation: int
    options: dict[str, Any]

    @classmethod
    def of(cls, source: Image.Image) -> "Kept":
        """Of a file that was read."""
        info = {k: source.info[k] for k in ("exif", "icc_profile", "dpi") if k in source.info}
        format = FORMATS.get(source.format or "", "png")
        if isinstance(source, JpegImagePlugin.JpegImageFile):
            sampling = JpegImagePlugin.get_sampling(source)
            info |= {"qtables": source.quantization, "progressive": "progressive" in source.info}
            info |= {} if sampling < 0 else {"subsampling": sampling}
        return cls(format, orientation(source), info)

    def encoded(self, upright: Image.Image, key: str, wanted: str) -> tuple[bytes, str]:
        """The composed photograph as a file that lies as the one before, and its suffix."""
        format = self.format if wanted == "same" else wanted
        own = key.rpartition(".")[2].lower()
        suffix = own if format == self.format and is_image_name(key) and _fits(own, format) else ""
        options = dict(self.options)
        if format != "jpeg" or self.format != "jpeg":
            for name in ("qtables", "progressive", "subsampling"):
                options.pop(name, None)
        options |= {
            "png": {"compress_level": 3},
            "webp": {"lossless": True, "quality": 20, "method": 1, "exact": True},
            "jpeg": {} if "qtables" in options else {"quality": 95, "subsampling": 0},
        }[format]
        if format == "jpeg" and "A" in upright.getbands():
            raise SampleError("compose", "JPEG has no transparency; set photo_format = png or webp")
        turn = BACK.get(self.orientation)
        image = upright if turn is None else upright.transpose(turn)
        buffer = io.BytesIO()
        try:
            image.save(buffer, format.upper(), **options)
        except Exception as problem:  # an EXIF block too long, a side beyond the format's limit
            raise SampleError("compose", f"cannot be written as {format}: {problem}") from problem
        return buffer.getvalue(), suffix or SUFFIX[format]


def _adds_change(name: str, job: ComposeJob) -> bool:
    """Whether a picture is put back as what it changed of its inversion."""
    if job.paste.content != "auto":
        return job.paste.content == "change" and name != INVERSION
    made = read_run(job.source)["config"].get("variants", ())
    others = ("domains", "assigned", "blends")
    return any(v["name"] == name and not any(v[kind] for kind in others) for v in made)


def _in_mode(photo: Image.Image) -> Image.Image:
    mode = MODES.get(photo.mode)
    if mode is None:
        raise SampleError(
            "compose",
            f"a photograph of mode {photo.mode} would change in every pixel; expected "
            f"{', '.join(MODES)}: convert it to RGB first",
        )
    if mode in ("RGB", "L") and photo.has_transparency_data:
        mode = "RGBA"
    return photo if photo.mode == mode else photo.convert(mode)


def _fits(suffix: str, format: str) -> bool:
    return Image.registered_extensions().get(f".{suffix}") == format.upper()


def _decoded(data: bytes, mode: str) -> np.ndarray:
    image = Image.open(io.BytesIO(data)).convert(mode)
    return np.array(image).reshape(image.height, image.width, -1)
