"""Loose pictures: one that is gone is a failed sample, a store that fails is a failed shard."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from botocore.exceptions import ClientError

from models.errors import ShardError
from tasks.input import files
from tasks.input.files import FETCH_AT_ONCE, read_files
from tasks.job import InputConfig, ShardSpec
from tasks.storage import files as storage
from tests.s3_server import S3Server


def spec_of(root: str, *members: str) -> ShardSpec:
    return ShardSpec(id=0, kind="files", uri=root, members=members)


@pytest.fixture(params=["local", "memory", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder with a.png and c.png."""
    if request.param == "local":
        root = str(tmp_path)
    elif request.param == "memory":
        root = f"memory://{tmp_path.name}"
    else:
        root = f"{request.getfixturevalue('s3')}/in"
    for name in ("a.png", "c.png"):
        storage.write_bytes(storage.join(root, name), name.encode())
    return root


def test_a_file_that_is_gone_is_a_failed_sample(root: str) -> None:
    a, b, c = read_files(spec_of(root, "a.png", "b.png", "c.png"), InputConfig())
    assert (a.data, c.data) == (b"a.png", b"c.png")
    assert (b.key, b.uri, b.data) == ("b.png", f"{root}/b.png", None)
    assert b.error is not None
    assert b.error.kind == "read"
    assert "the file is gone" in str(b.error)


def test_order_holds_over_groups(s3: str) -> None:
    names = [f"{i:03d}.png" for i in range(FETCH_AT_ONCE + 3)]
    for name in names:
        storage.write_bytes(f"{s3}/{name}", name.encode())
    found = list(read_files(spec_of(s3, *names), InputConfig()))
    assert [sample.data for sample in found] == [name.encode() for name in names]
    assert [sample.uri for sample in found] == [f"{s3}/{name}" for name in names]


def test_keys_that_look_like_patterns(s3: str) -> None:
    names = ("[1]*.png", "a b+c%20.png", "deep//two.png", "é?.png")
    for name in names:
        fs, path = storage.open_filesystem(s3)
        fs.pipe_file(f"{path}/{name}", name.encode())
    found = {sample.key: sample.data for sample in read_files(spec_of(s3, *names), InputConfig())}
    assert found == {name: name.encode() for name in names}
    listed = {name for name, _, _ in storage.list_files(s3)}
    assert listed == set(names)


def test_a_folder_in_place_of_a_file_is_a_failed_sample(tmp_path: Path) -> None:
    (tmp_path / "a.png").mkdir()
    (sample,) = read_files(spec_of(str(tmp_path), "a.png"), InputConfig())
    assert sample.error is not None
    assert sample.error.kind == "read"
    assert "cannot read the file: Is a directory" in str(sample.error)


def test_a_mount_that_fails_is_a_failed_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stale(path: str, flags: int) -> None:
        raise OSError(116, "Stale file handle", path)

    monkeypatch.setattr("tasks.input.files.os.open", stale)
    with pytest.raises(ShardError, match=r"cannot read .*a\.png.*Stale file handle"):
        list(read_files(spec_of(str(tmp_path), "a.png"), InputConfig()))


def test_bucket_and_credentials_fail_the_shard(
    s3: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of(s3, "a.png")
    with pytest.raises(ShardError, match="bucket 'no-such-bucket-here' does not exist"):
        list(read_files(replace(spec, uri="s3://no-such-bucket-here/in"), InputConfig()))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAWRONG")
    with (
        s3_server.checks_credentials(),
        pytest.raises(ShardError, match="refused the credentials"),
    ):
        list(read_files(spec, InputConfig()))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_a_failed_sample(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"x")
    (tmp_path / "a.png").chmod(0)
    (sample,) = read_files(spec_of(str(tmp_path), "a.png"), InputConfig())
    assert sample.error is not None
    assert "Permission denied" in str(sample.error)


def test_an_object_that_is_refused_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal may pass; one that stays is a failed sample, and costs the others nothing."""
    asked, waits = list[list[str]](), list[float]()
    refusal = PermissionError("no")
    refusal.__cause__ = ClientError({"Error": {"Code": "AccessDenied"}}, "GetObject")

    class Store:
        def cat_ranges(self, paths: list[str], *_: int, on_error: str) -> list[object]:
            asked.append(paths)
            is_back = len(asked) > 1
            return [refusal if "c" in p or ("b" in p and not is_back) else b"x" for p in paths]

    monkeypatch.setattr(files.time, "sleep", waits.append)
    found = files._fetch(Store(), "in", ["a", "b", "c"])  # type: ignore[arg-type]
    assert found == [b"x", b"x", refusal]
    assert asked == [["in/a", "in/b", "in/c"], ["in/b", "in/c"], ["in/c"]]
    assert waits == list(files.AGAIN_AFTER_S)
