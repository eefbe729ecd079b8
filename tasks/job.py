"""What a job is: plain frozen values that travel to every worker.

`pipeline.config` validates a TOML file into these; the stations of `tasks.work` read nothing else.
"""

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le

PLACE = {"place": "always"}
"""Metadata of a field that says where something lies; a run's id hashes what lies there instead."""
FILE = {"place": "where it names a file"}
"""The same of a field that may hold a name, or settings, too."""
ROUNDING = {"effect": "rounding"}
"""Metadata of a field that moves results by no more than rounding; it is not hashed."""
SINCE_3 = {"since": 3}
"""Metadata of a field that runs of earlier versions (`tasks.run.identity`) do not have in their
ids; with "before", they have that value in the place of the default."""
UNLESS_SET = {"since": math.inf}
"""The same of a field that is in no id at its default."""

THUMBNAIL_PX = 256
"""Longest side of a thumbnail; inputs of this size are kept as they are."""
INPUTS = ("input", "thumbnail")
"""What is kept of an input, the better one first."""


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """One link of the method chain: a registry name and its settings (already validated)."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict, metadata=FILE)


@dataclass(frozen=True, kw_only=True)
class InputConfig:
    """How a picture becomes a tensor."""

    __pydantic_config__ = {"extra": "forbid"}

    image_column: str = "image"
    """Parquet: column with the encoded picture, binary or {bytes, path}."""
    key_column: str | None = None
    """Parquet: column with a unique sample key; default `<file name>:<row>`."""
    fit: Literal["crop", "resize", "align"] = "crop"
    """crop: largest centred square; resize: stretch; align: five landmarks onto `template`."""
    landmarks_column: str = "landmarks5"
    """Parquet (align): five (x, y) points in 0..1: eyes left and right, nose, mouth corners."""
    template: Literal["auto", "face", "ffhq"] | str = field(
        default="auto", metadata=FILE | SINCE_3 | {"before": "face"}
    )
    """align: where the five points go. "auto": as the generator's card says; "face": the bundled
    generator's template; "ffhq": the crop of the FFHQ data set; or a JSON file of five points."""
    detector: str | None = None
    """align: finds faces where there are no landmarks. "mtcnn", of the extra `faces`; or
    "package.module:function" that finds the five points (0..1) of the one face in an upright
    [H W 3] picture, or returns None."""
    faces: Literal["all", "largest"] = field(default="all", metadata=SINCE_3)
    """align by mtcnn: a sample for each face of a photograph, `photo.jpg#0` the largest; or the
    largest alone, under the photograph's own key."""
    min_face: Annotated[int, Ge(12)] = field(default=40, metadata=SINCE_3)
    """align by mtcnn: side of the smallest face looked for, pixels."""
    check_aligned: bool = field(default=True, metadata=SINCE_3)
    """crop, resize: flag pictures whose face is not where the template has it, where the extra
    `faces` is installed and the template is known."""
    max_pixels: Annotated[int, Ge(1)] = 100_000_000
    """Pictures with more pixels fail as rows (decompression bombs)."""
    max_bytes: Annotated[int, Ge(1)] = field(default=256 * 2**20, metadata=SINCE_3)
    """Pictures with more encoded bytes fail as rows, unread."""
    max_decode_s: Annotated[float, Gt(0)] = field(default=30.0, metadata=SINCE_3)
    """Pictures that take more processor time to decode fail as rows."""
    max_expansion: Annotated[float, Ge(1)] = field(default=200.0, metadata=SINCE_3)
    """Unpacked by packed bytes of a .tar.gz or a Parquet row group; beyond, the shard is
    quarantined."""


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """What is stored of each sample."""

    __pydantic_config__ = {"extra": "forbid"}

    pictures: tuple[Literal["input", "thumbnail", "inversion"], ...] | Literal["auto"] = (
        "input",
        "inversion",
    )
    """Pictures kept in images/: the decoded input at the generator's size, or a thumbnail of it
    (256 px, JPEG), and the inversion. Of an input that is not kept, its place and sha256 are.
    "auto", which `refinery invert` begins with: these two, of generators above 256 px thumbnail and
    inversion."""
    picture_format: Literal["png", "webp", "jpeg"] = "png"
    """png is lossless; so is webp, and jpeg has quality 95, without `quality`."""
    quality: Annotated[int, Ge(1), Le(100)] | None = field(default=None, metadata=UNLESS_SET)
    """Of jpeg; with it webp is lossy."""
    latents: Literal["float32", "float16"] = "float32"
    """Precision of w_plus; float16 halves the size, worst error 0.33 % of its deviation."""

    def __post_init__(self) -> None:
        if self.quality is not None and self.picture_format == "png":
            raise ValueError(
                f"output.quality: png is lossless, found {self.quality}; set "
                "output.picture_format to webp or jpeg"
            )

    def settled(self, resolution: int) -> "OutputConfig":
        """With "auto" replaced by what it means for a generator of this resolution."""
        if self.pictures != "auto":
            return self
        kept = "input" if resolution <= THUMBNAIL_PX else "thumbnail"
        return replace(self, pictures=(kept, "inversion"))


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every kind of job says: everything that decides the bytes of a run, and nothing else (no
    engine settings)."""

    __pydantic_config__ = {"extra": "forbid"}

    kind: ClassVar[str]
    """The job's line in `tasks.work.kinds.KINDS`."""

    generator: str = field(metadata=PLACE)
    """A bundled name ("faces64", "hands64") or a path or URL of a checkpoint."""
    output: OutputConfig = field(default_factory=OutputConfig)
    batch: Literal["auto"] | Annotated[int, Ge(1)] = field(
        default="auto", metadata=ROUNDING | SINCE_3 | {"before": 16}
    )
    """Samples worked on together. It never changes a result by more than rounding, and a run may go
    on with another: less of it needs less memory. "auto": the run's, which begins with what
    `refinery plan` has chosen for it, else with 16 up to 256 px, then fewer, as memory goes with
    the pixels: on a CPU 4 at 512 px and 1 at 1024 px, on a GPU four times as many."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the convolutions in generator and encoders. Codes, losses and images stay float32."""
    perceptual: str = "auto"
    """Perceptual distance to score with: "auto" (LPIPS where its weights are cached, else ours),
    "refinery" (the bundled trunk), "lpips-alex", "lpips-vgg", "lpips-squeeze", or "none"."""
    identity: str | None = field(default=None, metadata=PLACE)
    """A face network, which adds a column of identity: "dlib" (extra `identity`), "dlib-ffhq", or a
    path or URL of dlib's or of ArcFace's IR-SE50 weights."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values, as run.json has them."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class JobConfig(Job):
    """An inversion."""

    kind: ClassVar[str] = "invert"

    methods: tuple[MethodConfig, ...]
    input: InputConfig = field(default_factory=InputConfig)
    seed: Annotated[int, Ge(0)] = 0
    """With a sample's key it decides the sample's random numbers."""


@dataclass(frozen=True, kw_only=True)
class StoredJob(Job):
    """Work on the stored samples of a finished run."""

    source: str = field(metadata=PLACE)
    """The run."""
    source_run: str
    """Its run id."""
    method: str
    """Its method chain, e.g. "e4e+wplus"."""


@dataclass(frozen=True, kw_only=True)
class ShardSpec:
    """One unit of work, retry and commit: a row of manifest.parquet.

    Attributes:
        id: 0-based, dense; also the name of the commit marker (`commits/00042.json`).
        kind: "files" (members of a prefix), "tar" (a WebDataset tar), "parquet" (a range of rows),
            "run" (a committed shard of a run, to be edited).
        uri: the prefix, the tar, the Parquet file or the run.
        members: files: keys relative to `uri`, sorted. tar, parquet: one name, the file's below
            the run's input, with which its sample keys begin; empty means the last part of `uri`.
            run: one number, the shard's.
        row_start, row_stop: parquet: half-open range of rows. tar, run: 0 and the number of samples
            to take. A stop of 0 means to the end.
        num_samples: samples inside, or -1 where only reading tells (a tar).
        num_bytes: encoded size, for planning.
        etag: identity of the input's content as far as a listing tells it (sha256 over names, sizes
            and ETags or modification times; of a run's shard over its parts' sha256).
    """

    id: int
    kind: Literal["files", "tar", "parquet", "run"]
    uri: str
    members: tuple[str, ...] = ()
    row_start: int = 0
    row_stop: int = 0
    num_samples: int = -1
    num_bytes: int = 0
    etag: str = ""
