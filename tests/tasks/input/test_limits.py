"""What an input may cost: memory, time and rows stay bounded whatever a file claims."""

import io
import json
import os
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from models.errors import SampleError, ShardError
from tasks.input import decode as decoding
from tasks.input import files, limits
from tasks.input.decode import decode
from tasks.input.plan import plan_shards
from tasks.input.read import read_shard
from tasks.input.sample import RawSample
from tasks.job import InputConfig
from tasks.storage import files as storage
from tasks.storage import footer
from tests.gnarly import CLAIM, encoded, gnu_sparse, pax, pax_sparse, pax_sparse_1, tar_with
from tests.tasks.input_files import LANDMARKS, add_member

MEASURED = """
import resource, sys
from tasks.input import limits
from tasks.input.decode import decode
from tasks.input.plan import plan_shards
from tasks.input.read import read_shard
from tasks.job import InputConfig
from models.errors import RefineryError
from concurrent.futures import ThreadPoolExecutor

def size():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

def outcome(sample):
    try:
        return str(decode(sample, config, 64).mean())
    except RefineryError as problem:
        return problem.kind

settings = eval(sys.argv[2])
limits.PIXELS.limit = settings.pop("pixels_at_once", limits.PIXELS.limit)
config, before = InputConfig(**settings), size()
found = []
try:
    for spec in plan_shards(sys.argv[1], 256, input=config):
        with ThreadPoolExecutor(4) as pool:
            for chunk in limits.chunks(read_shard(spec, config), 16):
                found += pool.map(outcome, chunk)
except RefineryError as problem:
    found.append(type(problem).__name__)
print(size() - before, *found)
"""


def measured(path: Path, **settings: object) -> tuple[int, list[str]]:
    """MiB that reading and decoding an input adds to a process, and what became of each sample."""
    command = [sys.executable, "-c", MEASURED, str(path), repr(settings)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    added, *outcomes = done.stdout.split()
    return int(added), outcomes


@pytest.mark.parametrize(
    "member",
    [pax_sparse(CLAIM), pax_sparse_1(CLAIM), gnu_sparse(8 * 10**9)],
    ids=["pax-0.1", "pax-1.0", "gnu"],
)
def test_a_sparse_member_is_one_failed_row(member: bytes, tmp_path: Path) -> None:
    """A few KB that claim 8 or 12 GB."""
    path = tmp_path / "sparse.tar"
    path.write_bytes(tar_with(member))
    assert path.stat().st_size < 20_000
    added, outcomes = measured(path)
    assert added < 100
    assert outcomes[0] == "read"
    assert float(outcomes[1]) > 0


def test_a_large_member_is_passed_by(tmp_path: Path) -> None:
    """300 MiB of zeros, a hole on the disk, between two pictures."""
    path, good = tmp_path / "large.tar", encoded()
    member = tarfile.TarInfo("b.png")
    member.size = 300 * 2**20
    with path.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w") as archive:
            add_member(archive, "a.png", good)
        file.seek(512 + -(-len(good) // 512) * 512)
        file.write(member.tobuf())
        file.seek(member.size, io.SEEK_CUR)
        file.write(tar_with())
    added, outcomes = measured(path)
    assert added < 100
    assert outcomes[1] == "too_large"
    assert len(outcomes) == 3
    assert outcomes[0] == outcomes[2]


@pytest.mark.slow
def test_a_tar_of_4_gib_needs_little_memory(tmp_path: Path) -> None:
    """128 members just below input.max_bytes, which are holes on the disk."""
    path, member = tmp_path / "long.tar", tarfile.TarInfo()
    member.size = 32 * 2**20
    with path.open("wb") as file:
        for number in range(128):
            member.name = f"{number:03d}.png"
            file.write(member.tobuf())
            file.seek(member.size, io.SEEK_CUR)
        file.write(tar_with())
    assert path.stat().st_size > 4 * 2**30
    added, outcomes = measured(path, max_bytes=2**25)
    assert added < 1500
    assert outcomes[:128] == ["decode"] * 128


def test_an_archive_that_expands_beyond_measure_ends(tmp_path: Path) -> None:
    path = tmp_path / "bomb.tar.gz"
    with tarfile.open(path, "w:gz", compresslevel=6) as archive:
        for name in ("a.txt", "b.txt", "c.png"):
            add_member(archive, name, bytes(30 * 2**20))
    added, outcomes = measured(path, max_expansion=20)
    assert (outcomes[-1], added < 150) == ("CorruptFileError", True)
    (spec,) = plan_shards(str(path), 5)
    with pytest.raises(ShardError, match=r"bomb\.tar\.gz.*unpack.*max_expansion"):
        list(read_shard(spec, InputConfig(max_expansion=20)))
    assert len(list(read_shard(spec, InputConfig(max_expansion=1000)))) == 3


def test_pictures_take_turns(tmp_path: Path) -> None:
    """Six pictures in four threads take the memory of those that the limit lets in."""
    data = encoded(Image.new("L", (5000, 4000), 7))
    for index in range(6):
        (tmp_path / f"{index}.png").write_bytes(data)
    added, outcomes = measured(tmp_path, pixels_at_once=20_000_000)
    assert outcomes == ["7.0"] * 6
    assert added < 200  # each: 20 MB grey and 80 MB RGB


def test_what_a_picture_holds_of_the_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as are decoded, and all of a progressive JPEG, however small it is to become."""
    held = list[int]()

    class Recorded(limits.Gate):
        def hold(self, amount: int) -> Any:
            held.append(amount)
            return super().hold(amount)

    monkeypatch.setattr(decoding, "PIXELS", Recorded(10**6))
    picture = Image.new("RGB", (640, 480))
    for options in ({"kind": "PNG"}, {"kind": "JPEG"}, {"kind": "JPEG", "progressive": True}):
        decode(RawSample("key", "uri", encoded(picture, **options)), InputConfig(), 16)
    assert held == [640 * 480, 80 * 60, 640 * 480]
    held.clear()
    for kind in ("WEBP", "AVIF", "JPEG2000", "TIFF"):
        decode(RawSample("key", "uri", encoded(picture, kind=kind)), InputConfig(), 16)
    assert held == [640 * 480 * times for times in (2, 2, 3, 1)]
    held.clear()
    decode(RawSample("key", "uri", tiled(2048)), InputConfig(), 16)
    assert held == [2048 * 2048]


def tiled(*sides: int, kind: int = 4, order: str = "<", is_big: bool = False) -> bytes:
    """A grey TIFF of 16 x 16 pixels in one square tile; each side once more as an entry."""
    pixels = zlib.compress(bytes(sides[0] ** 2))
    entries = [(256, 16), (257, 16), (258, 8), (259, 8), (262, 1), (277, 1)]
    entries += [(tag, side) for tag in (322, 323) for side in sides] + [
        (324, 0),
        (325, len(pixels)),
    ]
    number, length, word = ("Q", 20, "Q") if is_big else ("H", 12, "I")
    start = 16 if is_big else 8
    data_at = start + struct.calcsize("<" + number) + len(entries) * length + struct.calcsize(word)
    head = struct.pack(
        order + ("HHHQ" if is_big else "HI"), *((43, 8, 0, 16) if is_big else (42, 8))
    )
    table = struct.pack(order + number, len(entries))
    for tag, value in entries:
        typed = kind if tag in (322, 323) else 4
        value = struct.pack(order + ("H" if typed == 3 else "I"), data_at if tag == 324 else value)
        table += struct.pack(order + "HH" + word, tag, typed, 1)
        table += value.ljust(struct.calcsize(word), b"\0")
    table += bytes(struct.calcsize(word))
    return (b"II" if order == "<" else b"MM") + head + table + pixels


@pytest.mark.parametrize(
    "data",
    [
        tiled(2048),
        tiled(2048, 16),  # libtiff takes the first
        tiled(2048, kind=3, order=">"),
        tiled(2048, is_big=True),
    ],
    ids=["plain", "twice", "short-and-motorola", "big"],
)
def test_a_small_picture_in_a_large_tile_is_large(data: bytes) -> None:
    """A decoder unpacks a whole tile: 16 x 16 pixels would take 4 MB here, or 2 GB."""
    sample = RawSample("key", "uri", data)
    assert decode(sample, InputConfig(), 16).max() == 0
    with pytest.raises(
        SampleError, match=r"16 x 16 pixels in tiles of 4194304; at most 4000000"
    ) as e:
        decode(sample, InputConfig(max_pixels=4_000_000), 16)
    assert e.value.kind == "too_large"


def test_the_gate_keeps_the_limit_and_lets_a_large_one_in_alone() -> None:
    gate, lock, seen = limits.Gate(10), threading.Lock(), list[int]()

    def pass_through(amount: int) -> None:
        with gate.hold(amount):
            with lock:
                seen.append(gate.inside)
            time.sleep(0.001)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(pass_through, [3, 4, 25, 1, 9, 2, 6, 5] * 5))
    assert gate.inside == 0
    assert {amount for amount in seen if amount > 10} == {25}
    with pytest.raises(SampleError), gate.hold(25):
        raise SampleError("decode", "x")
    assert gate.inside == 0


def test_a_picture_that_takes_too_long_is_a_failed_row() -> None:
    data = encoded(Image.new("RGB", (4000, 4000)))
    with pytest.raises(SampleError, match=r"more than 0\.001 s of processor time") as caught:
        decode(RawSample("key", "uri", data), InputConfig(max_decode_s=0.001), 16)
    assert caught.value.kind == "too_large"
    assert decode(RawSample("key", "uri", data), InputConfig(), 16).max() == 0


def test_what_needs_several_copies_is_the_same_in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    rgba = Image.fromarray(rng.integers(0, 256, (37, 29, 4), dtype=np.uint8))
    wide = Image.fromarray(rng.integers(0, 65536, (37, 29)).astype(np.int32))
    for picture in (rgba, wide, rgba.convert("LA"), rgba.convert("RGB").convert("P")):
        if picture.mode == "P":
            picture.info["transparency"] = 3
        whole = np.asarray(decoding.to_rgb(picture))
        with monkeypatch.context() as patch:
            patch.setattr(decoding, "STRIP_PIXELS", 64)
            np.testing.assert_array_equal(np.asarray(decoding.to_rgb(picture)), whole)


def test_a_pipe_or_a_device_does_not_hang_a_shard(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    os.symlink("/dev/zero", tmp_path / "b.png")
    (tmp_path / "c.png").write_bytes(b"x")
    (spec,) = plan_shards(str(tmp_path), 5)
    pipe, device, good = read_shard(spec, InputConfig())
    assert (str(pipe.error), str(device.error), good.data) == (
        "not a regular file",
        "not a regular file",
        b"x",
    )


@pytest.mark.parametrize("store", ["local", "s3"])
def test_large_objects(store: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """What is larger than the first request is fetched whole, what is too large is not."""
    root = str(tmp_path) if store == "local" else request.getfixturevalue("s3")
    data = np.random.default_rng(0).bytes(files.FIRST_BYTES + 5)
    pictures = {"a.png": data, "b.png": data[:-5], "c.png": b"", "d.png": data + b"xx"}
    for name, content in pictures.items():
        storage.write_bytes(f"{root}/{name}", content)
    (spec,) = plan_shards(root, 5)
    found = list(read_shard(spec, InputConfig(max_bytes=len(data))))
    assert [sample.data for sample in found] == [data, data[:-5], b"", None]
    assert found[3].error is not None
    assert found[3].error.kind == "too_large"
    assert "input.max_bytes" in str(found[3].error)


def test_encoded_pictures_wait_in_bounded_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [RawSample(str(i), "", bytes(size)) for i, size in enumerate([4, 4, 4, 9, 1, 1, 1])]
    monkeypatch.setattr(limits, "AHEAD_BYTES", 8)
    sizes = [[len(s.data or b"") for s in chunk] for chunk in limits.chunks(samples, 3)]
    assert sizes == [[4, 4], [4, 9], [1, 1, 1]]


@pytest.mark.parametrize(
    "headers",
    [
        pax({"size": "9" * 18}),
        pax({"size": "-5"}),
        pax({"size": "1", "GNU.sparse.size": "many", "GNU.sparse.map": "0,x"}),
        pax({f"k{i}": "v" for i in range(3000)}),
    ],
)
def test_headers_that_lie_end_the_tar_at_once(headers: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(tar_with(headers))
    (spec,) = plan_shards(str(path), 5)
    started = time.thread_time()
    try:
        found = [sample.key for sample in read_shard(spec, InputConfig())]
    except ShardError as problem:
        found = [str(problem)]
    assert time.thread_time() - started < 5
    assert "x.tar" in found[0]


def write(path: Path, columns: dict[str, object], **options: object) -> Path:
    pq.write_table(pa.table(columns), path, store_schema=False, **options)  # type: ignore[arg-type]
    return path


def test_tables_that_claim_too_much(tmp_path: Path) -> None:
    """Kilobytes that hold millions of rows, of values in a row, or of bytes in a value."""
    many = pa.DictionaryArray.from_arrays(pa.array(np.zeros(10**6, np.int32)), pa.array([b"x"]))
    points = pa.ListArray.from_arrays(pa.array([0, 10**7]), pa.array(np.zeros(10**7, np.float32)))
    cases = {
        "rows": {"image": many},
        "values": {"image": [b"x"], "landmarks5": points},
        "bytes": {"image": [bytes(100 * 2**20)]},
    }
    for name, columns in cases.items():
        path = write(tmp_path / f"{name}.parquet", columns, compression="zstd")
        assert path.stat().st_size < 100_000
        fit = "align" if "landmarks5" in columns else "crop"
        added, outcomes = measured(path, fit=fit)
        assert (outcomes, added < 100) == (["CorruptFileError"], True), name


@pytest.mark.parametrize(
    ("found", "wanted"),
    [(b"\x25\x02\x18\x02bb", b"\x25\x00\x18\x02bb"), (b"bb", b"\xff\xff")],
    ids=["histogram", "name"],
)
def test_a_footer_that_pyarrow_does_not_survive(
    found: bytes, wanted: bytes, tmp_path: Path
) -> None:
    """A column that is said to be never null, with counts of nulls, ends a process that looks."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [encoded()], "bb": ["x"]}), path)
    data = path.read_bytes()
    assert found in data
    path.write_bytes(data.replace(found, wanted))
    assert measured(path)[1] == ["CorruptFileError"]


def test_a_footer_is_not_read_whatever_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [encoded()], "x" * 70_000: [1]}), path)
    (spec,) = plan_shards(str(path), 5)
    assert len(list(read_shard(spec, InputConfig()))) == 1  # its footer is not in one read
    monkeypatch.setattr(footer, "MAX_FOOTER_BYTES", 60_000)
    with pytest.raises(ShardError, match=r"a\.parquet is corrupt \(a footer of \d+ bytes; at most"):
        list(read_shard(spec, InputConfig()))


def test_a_large_value_that_stands_in_every_row(tmp_path: Path) -> None:
    """Stored once, 20 MB; all 40 rows at a time would be 1.6 GB, in Arrow and in Python."""
    picture = encoded() + np.random.default_rng(0).bytes(20 * 10**6)
    indices = pa.array(np.zeros(40, np.int32))
    column = pa.DictionaryArray.from_arrays(indices, pa.array([picture]))
    path = write(tmp_path / "a.parquet", {"image": column})
    assert path.stat().st_size < 45 * 10**6
    added, outcomes = measured(path)
    assert len(outcomes) == 40
    assert len(set(outcomes)) == 1
    assert added < 1000


BROKEN_POINTS = {
    "nested.json": b"[" * 100_000,
    "deep.json": json.dumps({"landmarks5": [[[[[1.0]]]]] * 5}).encode(),
    "huge.json": b'{"landmarks5": [1e999, ' + b"9" * 4000 + b", 1, 1, 1, 1, 1, 1, 1, 1]}",
    "number.json": b'{"landmarks5": ' + b"9" * 5000 + b"}",
    "table.json": b'{"landmarks5": {"x": [1]}}',
    "long.json": b" " * 70_000 + json.dumps({"landmarks5": LANDMARKS}).encode(),
    "claim.landmarks5.npy": b"\x93NUMPY\x01\0v\0{'descr': '<f8', 'fortran_order': False, "
    b"'shape': (100000000000,), }".ljust(118)
    + b"\n"
    + bytes(80),
    "header.landmarks5.npy": b"\x93NUMPY\x01\0v\0" + b"(" * 117 + b"\n",
    "objects.landmarks5.npy": b"\x93NUMPY\x01\0v\0{'descr': '|O', 'fortran_order': False, "
    b"'shape': (10,), }".ljust(118)
    + b"\n"
    + bytes(80),
    "version.landmarks5.npy": b"\x93NUMPY\x09\0v\0" + bytes(200),
    "cut.landmarks5.npy": b"\x93NUMPY",
}


def test_a_broken_file_of_points_is_one_failed_row(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as archive:
        for name, data in BROKEN_POINTS.items():
            add_member(archive, f"{name.partition('.')[0]}.png", encoded())
            add_member(archive, name, data)
        add_member(archive, "z.png", encoded())
        add_member(archive, "z.json", json.dumps({"landmarks5": LANDMARKS}).encode())
    (spec,) = plan_shards(str(path), 5)
    found = list(read_shard(spec, InputConfig(fit="align")))
    assert [sample.key for sample in found] == [
        f"x.tar:{name.partition('.')[0]}" for name in (*BROKEN_POINTS, "z")
    ]
    for sample in found[:-1]:
        with pytest.raises(SampleError) as caught:
            decode(sample, InputConfig(fit="align"), 16)
        assert caught.value.kind == "align", sample.key
    assert decode(found[-1], InputConfig(fit="align", template="face"), 16).shape == (16, 16, 3)
