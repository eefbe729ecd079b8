"""Readers of foreign files, each as a function that may only return or raise an error of ours, with
files to start from and a mutator that knows checksums."""

import io
import json
import pickle
import random
import struct
import tarfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from models.checkpoints.load import load_generator
from models.checkpoints.native import save_generator
from models.errors import RefineryError
from pipeline.config import load_config
from pipeline.status import read_status
from tasks.input.decode import decode
from tasks.input.footers import read_footer
from tasks.input.parquet import read_parquet
from tasks.input.sample import RawSample
from tasks.input.tar import landmarks_of, read_tar
from tasks.job import InputConfig, ShardSpec
from tasks.run.lease import hold
from tasks.run.ledger import quarantine, seal
from tasks.run.manifest import read_manifest
from tasks.run.marker import Closed
from tasks.run.metadata import read_snapshot, write_metadata
from tasks.run.query import ask, open_views, query
from tasks.run.run_json import utc_now
from tasks.run.views import Session
from tasks.work.invert import Inverter
from tasks.work.kinds import load_job
from tests import gnarly
from tests.conftest import make_picture_bytes, make_tiny_generator
from tests.models.checkpoints.conftest import make_generator, stand_in
from tests.tasks.input_files import LANDMARKS
from tests.tasks.small_run import begin, make_job, write_pictures

MOST_BYTES = 2**16
MOST_SECONDS = 5.0
ALIGN = InputConfig(fit="align", max_pixels=10**6, max_bytes=2**20, max_expansion=20)
CROP = InputConfig(max_pixels=10**6, max_bytes=2**20)
Read = Callable[[Path], object]


@dataclass(frozen=True)
class Reader:
    """A door for foreign bytes.

    Attributes:
        read: the file at a path.
        name: of that file.
        seeds: good files and known bad ones.
    """

    read: Read
    name: str
    seeds: Callable[[Path], Sequence[bytes]]


def read_picture(path: Path) -> None:
    decode(RawSample("key", "uri", path.read_bytes()), CROP, 16)


def read_archive(path: Path) -> None:
    for sample in read_tar(ShardSpec(id=0, kind="tar", uri=str(path)), ALIGN):
        assert sample.error is not None or sample.data is not None


def read_table(path: Path) -> None:
    read_footer(str(path), InputConfig(key_column="id"))
    spec = ShardSpec(id=0, kind="parquet", uri=str(path))
    for sample in read_parquet(spec, ALIGN):
        assert sample.error is not None or sample.data is not None


def read_points(path: Path) -> None:
    data = path.read_bytes()
    for name in ("a.json", "a.landmarks5.json", "a.landmarks5.npy"):
        try:
            found = landmarks_of({name: data}, "landmarks5")
        except RefineryError:
            continue
        assert found is None or found.shape == (5, 2)


def picture_seeds(_: Path) -> list[bytes]:
    kinds = ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000")
    return [gnarly.encoded(kind=kind) for kind in kinds] + _made(gnarly.PICTURES)


def tar_seeds(_: Path) -> list[bytes]:
    points = b'{"landmarks5": ' + repr(LANDMARKS).encode() + b"}"
    good = gnarly.tar_of(("a.png", gnarly.encoded()), ("a.json", points), format=tarfile.PAX_FORMAT)
    tars = {name: entry for name, entry in gnarly.TARS.items() if not name.endswith("gz")}
    return [good, *_made(tars)]


def gzip_seeds(folder: Path) -> list[bytes]:
    return [zlib.compress(data, wbits=31) for data in tar_seeds(folder)]


def table_seeds(_: Path) -> list[bytes]:
    images = pa.array([gnarly.encoded(), b"x", None])
    points = pa.array([LANDMARKS, None, LANDMARKS], pa.list_(pa.float32()))
    columns = {"image": images, "landmarks5": points, "id": pa.array(["a", "b", "c"])}
    kinds = ("snappy", "zstd", "none")
    return [gnarly.table_of(columns, compression=kind) for kind in kinds]


def point_seeds(_: Path) -> list[bytes]:
    buffer = io.BytesIO()
    np.save(buffer, np.reshape(LANDMARKS, (5, 2)))
    text = repr(LANDMARKS).encode()
    return [buffer.getvalue(), text, b'{"landmarks5": ' + text + b"}", b"[[[]]]", b'{"a": null}']


def config_seeds(_: Path) -> list[bytes]:
    return [
        load_config().to_toml().encode(),
        b'[[method]]\nname = "wplus"\nsteps = 3\n',
        b"[engine]",
    ]


def native_seeds(folder: Path) -> list[bytes]:
    path = save_generator(make_tiny_generator(), folder / "seed.safetensors", {"terms": "test"})
    return [path.read_bytes()]


def torch_seeds(_: Path) -> list[bytes]:
    found = []
    for is_zip in (True, False):
        buffer = io.BytesIO()
        state = {"g_ema": make_tiny_generator().state_dict()}
        torch.save(state, buffer, _use_new_zipfile_serialization=is_zip)
        found.append(buffer.getvalue())
    return found


def pickle_seeds(_: Path) -> list[bytes]:
    with pytest.MonkeyPatch.context() as patch:
        stand_in(patch)
        network = {"G_ema": make_generator(widths={4: 2, 8: 2}, z=2, w=2)}
        return [pickle.dumps(network, protocol=protocol) for protocol in (3, 4)]


# ---------------------------------------------------------------------------- files of a run

STATEMENTS = (
    "SELECT count(*), sum(mse), max(shard) FROM samples",
    "SELECT sample_key, w_plus[1], status FROM latents WHERE mse > 0.1 ORDER BY 1 LIMIT 2",
    "WITH a AS (SELECT * FROM samples JOIN shards USING (shard)) SELECT DISTINCT run FROM a",
    "EXPLAIN SELECT i.inversion FROM images i, latents l WHERE l.sample_key = i.sample_key",
    "COPY (SELECT 1) TO 'out.csv'; ATTACH 'out.db'; EXPORT DATABASE 'out'",
    "SELECT * FROM read_csv('/etc/passwd'), glob('*'), read_text('/proc/self/environ')",
    "CREATE TABLE t AS FROM nearest('a', 3); INSTALL httpfs; LOAD httpfs; SET threads = 9",
    "SELECT getenv('HOME'), $name, x'00', '\\u{1F600}', [1, 2][0:], {'a': NULL}.a, 1e308::INT",
    'PIVOT samples ON status USING count(*); -- /* */ "a" $$b$$',
)


def small_run(folder: Path) -> Path:
    """A sealed run of two shards, one of them given up at some time; made once in a folder."""
    run = folder / "run"
    if not run.exists():
        job = make_job(make_tiny_generator(), folder)
        source = write_pictures(folder / "pictures", [make_picture_bytes(seed) for seed in (0, 1)])
        with hold(str(run)):
            begin(str(run), str(source), job, Inverter(job, "cpu"), shard_size=2).finish()
        quarantine(str(run), 0, "its worker died again and again", attempts=3)
        seal(str(run))
        write_metadata(str(run))
    return run


def seeds_of(pattern: str) -> Callable[[Path], list[bytes]]:
    return lambda folder: [path.read_bytes() for path in sorted(small_run(folder).glob(pattern))]


def marker_seeds(folder: Path) -> list[bytes]:
    closed = Closed(shard=0, run_id="0" * 16, closed="too late", at=utc_now())
    return [*seeds_of("commits/*.json")(folder), closed.to_json()]


def metadata_seeds(folder: Path) -> list[bytes]:
    """The file goes: the reader would open it before another."""
    (path,) = (small_run(folder) / "metadata").iterdir()
    data = path.read_bytes()
    path.unlink()
    return [data]


def statement_seeds(folder: Path) -> list[bytes]:
    small_run(folder)
    return [text.encode() for text in STATEMENTS]


def look(path: Path) -> None:
    """What commands read of a run, one after the other: each may say that it cannot."""
    run = str(next(folder for folder in path.parents if folder.name == "run"))
    reads: tuple[Callable[[str], object], ...] = (
        read_status,
        load_job,
        read_snapshot,
        lambda run: list(read_manifest(run)),
    )
    for read in reads:
        with suppress(RefineryError):
            read(run)


def ask_rows(path: Path) -> None:
    query(str(path.parent.parent), STATEMENTS[0])


def read_statement(path: Path) -> None:
    """As the command line takes it: bytes that are no text become lone surrogates."""
    text = path.read_bytes().decode("utf-8", "surrogateescape")
    ask(_session(str(path.parent / "run")), text)


@cache
def _session(run: str) -> Session:
    """One for all statements: what one could change, the next would meet."""
    return ExitStack().enter_context(open_views(run))


RUN_READERS = {
    "marker": Reader(look, "run/commits/00000.json", marker_seeds),
    "run.json": Reader(look, "run/run.json", seeds_of("run.json")),
    "seal": Reader(look, "run/_SEALED.json", seeds_of("_SEALED.json")),
    "quarantine": Reader(look, "run/failed/00000.json", seeds_of("failed/*.json")),
    "lease": Reader(look, "run/drivers/0001.json", seeds_of("drivers/*.json")),
    "manifest": Reader(look, "run/manifest.parquet", seeds_of("manifest.parquet")),
    "metadata": Reader(ask_rows, "run/metadata/000002-0.parquet", metadata_seeds),
    "sql": Reader(read_statement, "a.sql", statement_seeds),
}

READERS = {
    "picture": Reader(read_picture, "a.png", picture_seeds),
    "tar": Reader(read_archive, "a.tar", tar_seeds),
    "tar.gz": Reader(read_archive, "a.tar.gz", gzip_seeds),
    "parquet": Reader(read_table, "a.parquet", table_seeds),
    "landmarks": Reader(read_points, "a.points", point_seeds),
    "config": Reader(lambda path: load_config(str(path)), "a.toml", config_seeds),
    "safetensors": Reader(load_generator, "seed.safetensors", native_seeds),
    "pt": Reader(load_generator, "a.pt", torch_seeds),
    "pkl": Reader(load_generator, "a.pkl", pickle_seeds),
    **RUN_READERS,
}


def _made(kind: Mapping[str, tuple[gnarly.Maker, object]]) -> list[bytes]:
    found = [make() for make, _ in kind.values()]
    return [data for data in found if len(data) <= MOST_BYTES]


# ---------------------------------------------------------------------------- mutations

VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    2**63,
    10**400,
    1e300,
    float("nan"),
    "",
    "x",
    "../../etc/passwd",
    "latents/../../../etc/passwd",
    "latents/nothing-here.parquet",
    "\ud800",
    "2026-13-45T99:00:00",
    "c" * 64,
    [],
    {},
    [[[[]]]],
    {"a": {"b": None}},
)
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1)


def mutate(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """One to eight small changes, and, half of the time, checksums that are right again."""
    changed = bytearray(data)
    if data.startswith(b"{") and rng.random() < 0.5:
        with suppress(ValueError):  # changed before, and no JSON any more
            text, _ = mutate_record(data.decode(), rng)
            return text.encode("utf-8", "surrogatepass")
    for _ in range(rng.randint(1, 8)):
        at = _place(len(changed), rng)
        end = min(len(changed), at + rng.choice((1, 2, 4, 8, 30, 300)))
        kind = rng.randrange(7)
        if kind == 0 and at < len(changed):
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            changed[at:end] = rng.randbytes(end - at)
        elif kind == 2:
            number, size = rng.choice(NUMBERS), rng.choice((1, 2, 4, 8))
            order = rng.choice(("little", "big"))
            changed[at : at + size] = (number % 256**size).to_bytes(size, order)
        elif kind == 3:
            del changed[at:end]
        elif kind == 4:
            changed[at:at] = changed[at:end] * rng.choice((1, 2, 50))
        elif kind == 5:
            other = rng.choice(others)
            start = rng.randrange(len(other) + 1)
            changed[at:end] = other[start : start + end - at]
        else:
            changed[at:end] = str(rng.choice(NUMBERS)).encode()
    found = bytes(changed)
    return repaired(found) if rng.random() < 0.5 else found


def mutate_record(text: str, chance: random.Random) -> tuple[str, str]:
    """Another text of a JSON file, and what was done."""
    if chance.random() < 0.25:
        at, end = sorted(chance.sample(range(len(text)), 2))
        made = chance.choice(
            [text[:at], text[:at] + text[end:], text[:at] + "\x00" + text[at:], ""]
        )
        return made, f"text {at}:{end}"
    record = json.loads(text)
    owner, key = chance.choice([*places(record)])
    what = chance.choice(["replace", "replace", "replace", "delete", "rename", "newer"])
    if what == "newer":
        record["version"] = 99
    elif what == "delete":
        del owner[key]
    elif what == "rename" and isinstance(owner, dict):
        owner[f"{key}_"] = owner.pop(key)
    else:
        owner[key] = chance.choice(VALUES)
    return json.dumps(record), f"{what} {key}: {owner!r}"[:300]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in list(items):
        yield value, key
        if isinstance(child, dict | list):
            yield from places(child)


def _place(length: int, rng: random.Random) -> int:
    """Headers and footers are changed more often than what lies between."""
    edge = rng.randrange(min(length, 2000) + 1)
    return rng.choice((edge, length - edge, rng.randrange(length + 1)))


def repaired(data: bytes) -> bytes:
    """The checksums of tar headers and PNG chunks put right, so that readers look further."""
    whole = bytearray(data)
    if data.startswith(b"\x89PNG"):
        at = 8
        while at + 12 <= len(whole):
            end = at + 8 + struct.unpack(">I", whole[at : at + 4])[0]
            if end + 4 > len(whole):
                break
            whole[end : end + 4] = struct.pack(">I", zlib.crc32(whole[at + 4 : end]))
            at = end + 4
    elif data[257:262] == b"ustar":
        for at in range(0, len(whole) - 511, 512):
            if whole[at + 257 : at + 262] == b"ustar":
                whole[at + 148 : at + 156] = b" " * 8
                whole[at + 148 : at + 156] = f"{sum(whole[at : at + 512]):06o}\0 ".encode()
    return bytes(whole)


# ---------------------------------------------------------------------------- one input


def check(reader: Reader, data: bytes, folder: Path) -> float:
    """Read one file.

    Returns:
        Seconds of processor time that it took.

    Raises:
        AssertionError: it took too long, or something was written.
        Exception: what no reader may raise.
    """
    path = folder / reader.name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    before = sorted(folder.rglob("*"))
    started = time.process_time()
    with suppress(RefineryError):
        reader.read(path)
    seconds = time.process_time() - started
    assert seconds < MOST_SECONDS, f"{seconds:.1f} s"
    assert sorted(folder.rglob("*")) == before
    return seconds
