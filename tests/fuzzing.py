"""Readers of foreign files, each as a function that may only return or raise an error of ours, with
files to start from and a mutator that knows checksums."""

import io
import pickle
import random
import struct
import tarfile
import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from models.checkpoints.load import load_generator
from models.checkpoints.native import save_generator
from models.errors import RefineryError
from pipeline.config import load_config
from tasks.input.decode import decode
from tasks.input.footers import read_footer
from tasks.input.parquet import read_parquet
from tasks.input.sample import RawSample
from tasks.input.tar import landmarks_of, read_tar
from tasks.job import InputConfig, ShardSpec
from tests import gnarly
from tests.conftest import make_tiny_generator
from tests.models.checkpoints.conftest import make_generator, stand_in
from tests.tasks.input_files import LANDMARKS

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
}


def _made(kind: dict[str, tuple[gnarly.Maker, object]]) -> list[bytes]:
    found = [make() for make, _ in kind.values()]
    return [data for data in found if len(data) <= MOST_BYTES]


# ---------------------------------------------------------------------------- mutations

NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1)


def mutate(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """One to eight small changes, and, half of the time, checksums that are right again."""
    changed = bytearray(data)
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
    path.write_bytes(data)
    before = sorted(folder.iterdir())
    started = time.thread_time()
    with suppress(RefineryError):
        reader.read(path)
    seconds = time.thread_time() - started
    assert seconds < MOST_SECONDS, f"{seconds:.1f} s"
    assert sorted(folder.iterdir()) == before
    return seconds
