"""WebDataset tars: grouping, landmarks, and every kind of damage found."""

import gzip
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from models.errors import ShardError
from tasks.input.sample import RawSample
from tasks.input.tar import count_samples, read_tar
from tasks.job import InputConfig, ShardSpec
from tests.tasks.input_files import LANDMARKS, add_member

ALIGN = InputConfig(fit="align")
POINTS = np.array(LANDMARKS, np.float32).reshape(5, 2)


def make_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            add_member(archive, name, data)
    return path


def read(path: Path, config: InputConfig = ALIGN, row_stop: int = 0) -> list[RawSample]:
    spec = ShardSpec(id=0, kind="tar", uri=str(path), row_stop=row_stop)
    return list(read_tar(spec, config))


def test_members_with_one_name_are_one_sample(tmp_path: Path) -> None:
    path = make_tar(
        tmp_path / "x.tar",
        [
            ("./a/1.txt", b"a caption"),
            ("./a/1.jpg", b"first"),
            ("./a/1.seg.png", b"not the picture"),
            ("a/._2.png", b"resource fork"),
            ("a/2.Left.PNG", b"second"),
            ("b/1.webp", b"third"),
            ("c.cls", b"7"),
        ],
    )
    found = read(path)
    assert [(s.key, s.data) for s in found] == [
        ("x.tar:a/1", b"first"),
        ("x.tar:a/2", b"second"),
        ("x.tar:b/1", b"third"),
        ("x.tar:c", None),
    ]
    assert found[0].uri == f"{path}#a/1.jpg"
    assert found[3].error is not None
    assert found[3].error.kind == "read"
    assert str(found[3].error) == "no picture among: c.cls"
    assert count_samples(str(path), 100, ALIGN) == 4
    assert count_samples(str(path), 3, ALIGN) == 3
    assert [s.key for s in read(path, row_stop=2)] == ["x.tar:a/1", "x.tar:a/2"]


def test_landmarks(tmp_path: Path) -> None:
    array = io.BytesIO()
    np.save(array, POINTS)
    path = make_tar(
        tmp_path / "x.tar",
        [
            ("1.json", json.dumps({"landmarks5": LANDMARKS}).encode()),
            ("1.png", b"1"),
            ("2.png", b"2"),
            ("2.landmarks5.json", json.dumps(POINTS.tolist()).encode()),
            ("3.png", b"3"),
            ("3.landmarks5.npy", array.getvalue()),
            ("4.png", b"4"),
            ("4.json", b'{"age": 3}'),
            ("5.png", b"5"),
            ("5.json", b'{"landmarks5": [1, 2, 3]}'),
            ("6.png", b"6"),
            ("6.json", b'{"landmarks5": '),
        ],
    )
    found = read(path)
    for sample in found[:3]:
        np.testing.assert_allclose(sample.landmarks, POINTS)
    assert (found[3].data, found[3].landmarks) == (b"4", None)
    for sample, reason in ((found[4], "shape [3]"), (found[5], "6.json cannot be read")):
        assert sample.error is not None
        assert sample.error.kind == "align"
        assert reason in str(sample.error)
    assert [s.landmarks for s in read(path, InputConfig())] == [None] * 6


def test_a_key_twice_is_refused(tmp_path: Path) -> None:
    members = [("1.png", b"1"), ("2.png", b"2"), ("1.jpg", b"3")]
    with pytest.raises(ShardError, match="the key '1' comes twice"):
        read(make_tar(tmp_path / "x.tar", members))


def test_tar_without_members_is_empty(tmp_path: Path) -> None:
    assert read(make_tar(tmp_path / "x.tar", [])) == []


def whole(tmp_path: Path) -> bytes:
    members = [(f"{index}.png", bytes([index]) * 1500) for index in range(8)]
    return make_tar(tmp_path / "whole.tar", members).read_bytes()


@pytest.mark.parametrize(
    ("length", "reason"),
    [
        (0, "empty file|end-of-archive mark is missing"),
        (300, "damaged header"),
        (512, "unexpected end of data"),
        (1000, "unexpected end of data"),
        (2048, "end-of-archive mark is missing"),  # exactly between two members
        (2048 + 700, "unexpected end of data"),
        (2048 + 200, "damaged header"),
    ],
)
def test_cut_off(length: int, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "cut.tar"
    path.write_bytes(whole(tmp_path)[:length])
    with pytest.raises(ShardError, match=rf"cut\.tar is corrupt \(.*({reason})"):
        read(path)


def test_damaged_header_in_the_middle_is_not_taken_for_the_end(tmp_path: Path) -> None:
    data = bytearray(whole(tmp_path))
    data[2048 * 2 + 150] ^= 0xFF  # inside of the third header's checksum
    path = tmp_path / "bad.tar"
    path.write_bytes(bytes(data))
    with pytest.raises(ShardError, match=r"bad\.tar is corrupt \(damaged header"):
        read(path)


def test_gzip_damage(tmp_path: Path) -> None:
    zipped = gzip.compress(whole(tmp_path))
    path = tmp_path / "x.tar.gz"
    path.write_bytes(zipped)
    assert len(read(path)) == 8
    for damaged in (
        zipped[:-20],
        zipped[: len(zipped) // 2],
        zipped[:40] + bytes(20) + zipped[60:],
        b"not gzip at all",
    ):
        path.write_bytes(damaged)
        with pytest.raises(ShardError, match=r"x\.tar\.gz is corrupt"):
            read(path)


def test_missing_tar(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"cannot read tar .*none\.tar: there is no such file"):
        read(tmp_path / "none.tar")
