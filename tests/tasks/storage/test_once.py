"""Created once: one of many writers wins, on every kind of store, and what it wrote stays."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError

from models.errors import LedgerError
from tasks.storage import files, once


@pytest.fixture
def fresh_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(once, "_is_kept", {})


def test_the_first_stays(root: str) -> None:
    uri = files.join(root, "deep", "x.json")
    assert once.create_bytes(uri, b"first")
    assert not once.create_bytes(uri, b"second")
    assert files.read_bytes(uri) == b"first"
    assert files.find_bytes(files.join(root, "deep", "y.json")) is None
    assert [name for name, _, _ in files.list_files(root, include_partial=True)] == ["deep/x.json"]
    assert once.creates_once(uri)


def test_one_of_many_wins(root: str) -> None:
    uri = files.join(root, "x.json")
    with ThreadPoolExecutor(8) as pool:
        created = list(pool.map(lambda i: once.create_bytes(uri, b"%d" % i * 5000), range(8)))
    assert created.count(True) == 1
    assert files.read_bytes(uri) == b"%d" % created.index(True) * 5000


def test_folder_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EPERM, "links are not supported")

    monkeypatch.setattr(os, "link", refuse)
    uri = str(tmp_path / "x.json")
    assert once.create_bytes(uri, b"first")
    assert not once.create_bytes(uri, b"second")
    assert Path(uri).read_bytes() == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_full_disk_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(LedgerError, match=r"cannot create .*x\.json: the disk is full"):
        once.create_bytes(str(tmp_path / "x.json"), b"data")
    assert list(tmp_path.iterdir()) == []


def test_a_lost_answer_is_told_as_taken(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client repeats a PUT that has arrived; the caller finds its own bytes."""
    fs, _ = files.open_filesystem(s3)
    put = fs.pipe_file

    def twice(*args: Any, **options: Any) -> None:
        put(*args, **options)
        put(*args, **options)

    assert once.creates_once(f"{s3}/x.json")
    monkeypatch.setattr(fs, "pipe_file", twice)
    assert not once.create_bytes(f"{s3}/x.json", b"mine")
    assert files.read_bytes(f"{s3}/x.json") == b"mine"


def test_a_conflict_is_tried_again(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fs, _ = files.open_filesystem(s3)
    put, conflicts = fs.pipe_file, ["ConditionalRequestConflict", "409"]

    def conflict(*args: Any, **options: Any) -> None:
        if conflicts:
            raise answered(conflicts.pop())
        put(*args, **options)

    assert once.creates_once(f"{s3}/x.json")
    monkeypatch.setattr(fs, "pipe_file", conflict)
    monkeypatch.setattr(once, "_WAIT_S", 0.0)
    assert once.create_bytes(f"{s3}/x.json", b"mine")
    assert not conflicts


def answered(code: str) -> OSError:
    error = OSError(code)
    error.__cause__ = ClientError({"Error": {"Code": code}}, "PutObject")
    return error


@pytest.mark.parametrize("answer", ["ignores", "NotImplemented"])
def test_a_server_that_knows_no_conditions(
    s3: str,
    answer: str,
    fresh_probe: None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    fs, _ = files.open_filesystem(s3)
    put = fs.pipe_file

    def plain_put(path: str, data: bytes, mode: str = "overwrite") -> None:
        if mode == "create" and answer != "ignores":
            raise answered(answer)
        put(path, data)

    monkeypatch.setattr(fs, "pipe_file", plain_put)
    uri = f"{s3}/commits/x.json"
    assert once.create_bytes(uri, b"first")
    assert not once.create_bytes(uri, b"second")
    assert files.read_bytes(uri) == b"first"
    assert not once.creates_once(uri)
    assert caplog.text.count("ignores If-None-Match") == 1
    assert [name for name, _, _ in files.list_files(s3)] == ["commits/x.json"]
