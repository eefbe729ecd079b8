"""A folder of files that have broken readers, made on the spot, and what must become of each."""

import gzip
import io
import os
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.conftest import make_picture
from tests.tasks.input_files import add_member

LIMITS = {"max_pixels": 1_000_000, "max_bytes": 2**20, "max_expansion": 20}
"""Settings of `input` that the outcomes hold for."""
GOOD = "ok"
QUARANTINED = "quarantined"
Maker = Callable[[], bytes]


def encoded(image: Image.Image | None = None, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    (image or make_picture(1)).save(buffer, kind, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    """A PNG of any claimed size."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = png_chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + pixels + png_chunk(b"IEND", b"")


def with_chunk(kind: bytes, data: bytes) -> bytes:
    """A good PNG with one more chunk behind its header."""
    whole = encoded()
    return whole[:33] + png_chunk(kind, data) + whole[33:]


def tiff(*entries: tuple[int, int, int, int], following: int = 0) -> bytes:
    """A TIFF of one directory at byte 8."""
    packed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + packed + struct.pack("<I", following)


def frames(kind: str) -> bytes:
    others = [make_picture(seed) for seed in (2, 3)]
    return encoded(kind=kind, save_all=True, append_images=others)


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def _float_tiff(values: np.ndarray) -> bytes:
    return encoded(Image.fromarray(values.astype(np.float32)), "TIFF")


RGBA = np.dstack([np.asarray(make_picture(4)), np.full((48, 48), 90, np.uint8)])
PICTURES: dict[str, tuple[Maker, str]] = {
    "animated.gif": (lambda: frames("GIF"), GOOD),
    "animated.webp": (lambda: frames("WEBP"), GOOD),
    "bilevel.tif": (lambda: encoded(make_picture(1).convert("1"), "TIFF"), GOOD),
    "cmyk.jpg": (lambda: encoded(make_picture(1).convert("CMYK"), "JPEG"), GOOD),
    "cut.jpg": (lambda: encoded(kind="JPEG")[:-200], "decode"),
    "cut.png": (lambda: encoded()[:-100], "decode"),
    "empty.png": (lambda: b"", "decode"),
    "exif-broken.jpg": (lambda: encoded(kind="JPEG", exif=b"Exif\0\0MM\0*\0\0\xff\xff"), GOOD),
    "exif-turned.jpg": (lambda: encoded(kind="JPEG", exif=orientation(6)), GOOD),
    "float.tif": (lambda: _float_tiff(np.linspace(0, 1, 64).reshape(8, 8)), GOOD),
    "float-beyond.tif": (lambda: _float_tiff(np.full((8, 8), 7.0)), "decode"),
    "float-nan.tif": (lambda: _float_tiff(np.full((8, 8), np.nan)), "decode"),
    "grey-16.png": (lambda: encoded(Image.fromarray(np.full((9, 9), 999, np.uint16))), GOOD),
    "header-only.gif": (lambda: encoded(kind="GIF")[:13], "decode"),
    "icc-bomb.png": (
        lambda: with_chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(2 * 10**7))),
        "decode",
    ),
    "jpeg-2000.jp2": (lambda: encoded(kind="JPEG2000"), GOOD),
    "large-file.png": (lambda: encoded() + bytes(2**20), "too_large"),
    "many.tif": (lambda: tiff((256, 4, 2**31, 1), (257, 4, 1, 1)), "decode"),
    "no-pixels.png": (lambda: png(0, 0), "decode"),
    "page.webp": (lambda: b"<!doctype html><title>404</title>", "decode"),
    "palette.png": (lambda: encoded(make_picture(1).convert("P"), transparency=3), GOOD),
    "pixels.bmp": (
        lambda: b"BM" + bytes(12) + struct.pack("<IiiHHI", 40, 30000, 30000, 1, 24, 0) + bytes(20),
        "too_large",
    ),
    "pixels.png": (lambda: png(60000, 60000), "too_large"),
    "pixels.ppm": (lambda: b"P6 99999 99999 255 " + bytes(99), "too_large"),
    "postscript.png": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "decode"),
    "progressive.jpg": (lambda: encoded(kind="JPEG", progressive=True), GOOD),
    "rgba.png": (lambda: encoded(Image.fromarray(RGBA)), GOOD),
    "round.tif": (
        lambda: tiff((256, 3, 1, 8), (257, 3, 1, 8), (258, 3, 1, 8), following=8),
        "decode",
    ),
    "single.png": (lambda: encoded(Image.new("RGB", (1, 1))), GOOD),
    "svg.png": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "decode"),
    "text-bomb.png": (
        lambda: with_chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(2 * 10**7))),
        "decode",
    ),
    "thin.png": (lambda: encoded(Image.new("L", (1, 5000))), GOOD),
    "two.jpg": (lambda: encoded(kind="MPO", save_all=True, append_images=[make_picture(2)]), GOOD),
    "wrong-ending.jpg": (encoded, GOOD),
    "ü 'q' \"%20[1]*.png": (encoded, GOOD),
    "folder.png/inside.png": (encoded, GOOD),
}
"""Loose pictures: content, and the row's status or kind of failure."""


def tar_of(*members: tuple[str, bytes], **options: object) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as archive:  # type: ignore[call-overload]
        for name, data in members:
            add_member(archive, name, data)
    return buffer.getvalue()


def tar_with(*headers: bytes) -> bytes:
    """Blocks of hand-made members, then one good picture, then the end."""
    return b"".join(headers) + tar_of(("z.png", encoded()))


def pax(records: dict[str, str], name: str = "a.png", size: int = 512) -> bytes:
    """A member behind PAX records."""
    member = tarfile.TarInfo(name)
    member.size, member.pax_headers = size, records
    return member.tobuf(tarfile.PAX_FORMAT) + bytes(-(-size // 512) * 512)


def header(kind: bytes, size: int, name: str = "a.png") -> bytes:
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, size
    return member.tobuf(tarfile.GNU_FORMAT)


def gnu_sparse(claimed: int) -> bytes:
    """A member of GNU's old sparse kind: 512 bytes for `claimed`, its map in two blocks."""
    block = bytearray(header(tarfile.GNUTYPE_SPARSE, 512))
    block[386:410] = b"00000000000 00000001000 "
    block[482] = 1
    block[483:495] = f"{claimed:011o} ".encode()
    block[148:156] = b"        "
    block[148:156] = f"{sum(block):06o}\0 ".encode()
    return bytes(block) + bytes(512) + bytes(512)


def pax_sparse(claimed: int) -> bytes:
    """The same as PAX records, version 0.1."""
    records = {
        "GNU.sparse.map": "0,512",
        "GNU.sparse.size": str(claimed),
        "GNU.sparse.numblocks": "1",
        "GNU.sparse.name": "a.png",
    }
    return pax(records)


def pax_sparse_1(claimed: int) -> bytes:
    """And version 1.0, whose map stands in the data."""
    records = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": "a.png",
        "GNU.sparse.realsize": str(claimed),
    }
    return pax(records)


CLAIM = 12 * 10**9
TARS: dict[str, tuple[Maker, dict[str, str] | str]] = {
    "again.tar": (
        lambda: tar_of(("a.png", encoded()), ("a.png", encoded()), ("b.png", encoded())),
        {"a": GOOD, "a#2": "read", "b": GOOD},
    ),
    "again-later.tar": (
        lambda: tar_of(("a.png", encoded()), ("b.png", encoded()), ("a.json", b"{}")),
        QUARANTINED,
    ),
    "bomb.tar.gz": (
        lambda: gzip.compress(tar_of(("a.png", bytes(80 * 2**20))), 1),
        QUARANTINED,
    ),
    "claims.tar": (lambda: tar_with(header(tarfile.REGTYPE, 8**11 - 1)), QUARANTINED),
    "claims-pax.tar": (lambda: tar_with(pax({"size": "9" * 18})), QUARANTINED),
    "cut.tar": (lambda: tar_of(("a.png", encoded()))[:700], QUARANTINED),
    "empty.tar": (tar_of, {}),
    "large.tar": (
        lambda: tar_of(("a.png", bytes(2**20 + 1)), ("b.png", encoded())),
        {"a": "too_large", "b": GOOD},
    ),
    "links.tar": (
        lambda: tar_with(header(tarfile.SYMTYPE, 0), header(tarfile.CHRTYPE, 0)),
        {"z": GOOD},
    ),
    "long-header.tar": (
        lambda: tar_with(header(tarfile.XHDTYPE, 10**6) + bytes(10**6 // 512 * 512 + 512)),
        QUARANTINED,
    ),
    "not-gzip.tgz": (lambda: b"no gzip at all", QUARANTINED),
    "outside.tar": (
        lambda: tar_of(("../../a.png", encoded()), ("/etc/b.png", encoded())),
        {"../../a": GOOD, "/etc/b": GOOD},
    ),
    "pax-chain.tar": (
        lambda: tar_with((header(tarfile.XHDTYPE, 0)) * 3000),
        QUARANTINED,
    ),
    "pax-number.tar": (
        lambda: tar_with(pax({"GNU.sparse.size": "many", "GNU.sparse.map": "0,x"})),
        QUARANTINED,
    ),
    "sparse.tar": (lambda: tar_with(pax_sparse(CLAIM)), {"a": "read", "z": GOOD}),
    "sparse-1.tar": (lambda: tar_with(pax_sparse_1(CLAIM)), {"a": "read", "z": GOOD}),
    "sparse-gnu.tar": (lambda: tar_with(gnu_sparse(8 * 10**9)), {"a": "read", "z": GOOD}),
}
"""Tars: content, and what becomes of each sample, or of the whole."""


def table_of(columns: dict[str, pa.Array], **options: object) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, store_schema=False, **options)
    return buffer.getvalue()


def parquet_of(images: pa.Array, **options: object) -> bytes:
    return table_of({"image": images}, **options)


def repeated(data: bytes, rows: int) -> pa.Array:
    indices = pa.array(np.zeros(rows, np.int32))
    return pa.DictionaryArray.from_arrays(indices, pa.array([data]))


TABLES: dict[str, tuple[Maker, dict[str, str] | str]] = {
    "cut.parquet": (lambda: parquet_of(pa.array([encoded()]))[:-20], QUARANTINED),
    "nulls.parquet": (
        lambda: parquet_of(pa.array([None, b"", encoded()])),
        {"0": "read", "1": "decode", "2": GOOD},
    ),
    "repeated.parquet": (
        lambda: parquet_of(repeated(encoded(), 5)),
        dict.fromkeys("01234", GOOD),
    ),
    "column-name.parquet": (
        lambda: parquet_of(pa.array([encoded()])).replace(b"\x05image", b"\x05imag\x85"),
        QUARANTINED,
    ),
    "rows.parquet": (lambda: parquet_of(repeated(b"x", 3 * 10**6)), QUARANTINED),
    "large.parquet": (
        lambda: parquet_of(pa.array([bytes(2**20 + 1), encoded()])),
        {"0": "too_large", "1": GOOD},
    ),
    "zeros.parquet": (
        lambda: parquet_of(pa.array([bytes(80 * 2**20)]), compression="zstd"),
        QUARANTINED,
    ),
}
"""Parquet files, by row."""

SKIPPED = {".heic": 1, "files without a known ending": 2, "hidden files": 2} | {
    "links that lead nowhere": 2
}
"""Files that are in no shard."""


def write_gnarly(folder: Path) -> dict[str, str]:
    """All of them.

    Returns:
        Status or kind of failure by sample key.
    """
    for kind in (PICTURES, TARS, TABLES):
        for name, (make, _) in kind.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(make())
    for name in ("IMG_0001.HEIC", "README", "picture.", ".hidden.png", "._IMG.jpg"):
        (folder / name).write_bytes(b"x")
    os.symlink("nowhere.png", folder / "dangling.png")
    os.symlink("loop.png", folder / "loop.png")
    os.symlink("/dev/zero", folder / "zeros.png")
    os.mkfifo(folder / "pipe.png")
    expected = {name: outcome for name, (_, outcome) in PICTURES.items()}
    expected |= {"zeros.png": "read", "pipe.png": "read"}
    for name, (_, outcome) in (TARS | TABLES).items():
        if not isinstance(outcome, str):
            expected |= {f"{name}:{key}": status for key, status in outcome.items()}
    return expected


def quarantined() -> list[str]:
    """Files whose shard is given up."""
    return sorted(name for name, (_, kind) in (TARS | TABLES).items() if kind == QUARANTINED)
