"""Storage: atomic writes, listings in one order everywhere, errors that say what to do."""

import errno
import os
import threading
from pathlib import Path

import pytest

from models.errors import AssetError, ConfigError, LedgerError, ShardError
from models.files import PARTIAL_SUFFIX
from tasks.storage import errors as storage_errors
from tasks.storage import files as storage
from tests.s3_server import S3Server

NAMES = ["a-1.png", "a.png", "a/b.png", "a/c/d.png", "a0.png", "b.png", "Z.png", "ä.png"]


def test_bytes_come_back_and_the_last_write_wins(root: str) -> None:
    uri = storage.join(root, "deep", "er", "x.bin")
    storage.write_bytes(uri, b"first")
    storage.write_bytes(uri, b"second")
    assert storage.read_bytes(uri) == b"second"
    assert storage.exists(uri)
    assert not storage.exists(storage.join(root, "deep"))
    assert not storage.exists(storage.join(root, "y.bin"))


def test_listing_is_in_key_order_on_every_store(root: str) -> None:
    for name in NAMES:
        storage.write_bytes(storage.join(root, name), name.encode() * 3)
    storage.write_bytes(root.rstrip("/") + "-neighbour/x.png", b"not below the folder")
    found = list(storage.list_files(root))
    assert [name for name, _, _ in found] == sorted(NAMES, key=str.encode)
    assert all(size == 3 * len(name.encode()) for name, size, _ in found)
    first = dict((name, etag) for name, _, etag in found)
    storage.write_bytes(storage.join(root, "b.png"), b"other")
    again = dict((name, etag) for name, _, etag in storage.list_files(root))
    assert {name for name in NAMES if again[name] != first[name]} == {"b.png"}


def test_missing_folder_lists_as_empty(root: str) -> None:
    assert list(storage.list_files(storage.join(root, "nothing"))) == []


def test_s3_listing_goes_on_over_pages(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fs, _ = storage.open_filesystem(s3)
    for index in range(7):
        storage.write_bytes(f"{s3}/{index}", b"x")
    call, pages = fs.call_s3, []

    def small_pages(method: str, **request: object) -> object:
        pages.append(method)
        return call(method, MaxKeys=3, **request)

    monkeypatch.setattr(fs, "call_s3", small_pages)
    assert [name for name, _, _ in storage.list_files(s3)] == list("0123456")
    assert pages == ["list_objects_v2"] * 3


def test_open_write_shows_nothing_until_it_ends(root: str) -> None:
    uri = storage.join(root, "part.parquet")
    with storage.open_write(uri) as file:
        file.write(b"half")
        file.flush()
        assert not storage.exists(uri)
        assert list(storage.list_files(root)) == []
        file.write(b" and half")
    assert storage.read_bytes(uri) == b"half and half"


def test_failed_write_leaves_the_old_file_and_no_rubbish(root: str) -> None:
    uri = storage.join(root, "part.parquet")
    storage.write_bytes(uri, b"old")

    def fail_half_way() -> None:
        with storage.open_write(uri) as file:
            file.write(b"new")
            raise KeyError("the block failed")

    with pytest.raises(KeyError):
        fail_half_way()
    assert storage.read_bytes(uri) == b"old"
    assert [n for n, _, _ in storage.list_files(root, include_partial=True)] == ["part.parquet"]


def test_readers_never_see_a_torn_file(tmp_path: Path) -> None:
    uri = str(tmp_path / "marker.json")
    versions = [bytes([value]) * 200_000 for value in range(8)]
    storage.write_bytes(uri, versions[0])
    seen: list[bytes] = []
    is_done = threading.Event()

    def watch() -> None:
        while not is_done.is_set():
            seen.append(storage.read_bytes(uri))

    watcher = threading.Thread(target=watch)
    watcher.start()
    for version in versions * 3:
        storage.write_bytes(uri, version)
    is_done.set()
    watcher.join()
    assert seen
    assert all(data in versions for data in seen)


def test_partial_files_match_no_pattern_of_readers(tmp_path: Path) -> None:
    with storage.open_write(str(tmp_path / "0-a.parquet")) as file:
        file.write(b"x")
        names = os.listdir(tmp_path)
        assert len(names) == 1
        assert names[0].startswith(".")
        assert names[0].endswith(PARTIAL_SUFFIX)
        assert not list(tmp_path.glob("*.parquet"))
        listed = storage.list_files(str(tmp_path), include_partial=True)
        assert [name for name, _, _ in listed] == names


def test_full_disk_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    uri = str(tmp_path / "x.bin")
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(LedgerError, match=r"the disk is full \(\d+ MiB free .*Free space there"):
        storage.write_bytes(uri, b"data")
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_really_full_device() -> None:
    with (
        pytest.raises(ShardError, match="cannot write /dev/full: the disk is full"),
        storage_errors.storage_errors("write", "/dev/full"),
        open("/dev/full", "wb", buffering=0) as file,
    ):
        file.write(b"x")


@pytest.mark.parametrize(
    ("uri", "hint"),
    [
        ("S3:/bucket/x", r"Write s3://bucket/x"),
        ("s3a://bucket/x", r"Write s3://bucket/x"),
        ("https://host/bucket/x", "set AWS_ENDPOINT_URL"),
        ("gopher://x", "expected a local path, s3://bucket/... or memory://"),
        ("s3:///x", "names no bucket"),
    ],
)
def test_wrong_url(uri: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        storage.read_bytes(uri)


def test_local_uris() -> None:
    assert storage.local_path("file:///data/x") == "/data/x"
    assert storage.local_path("~/x") == os.path.expanduser("~/x")
    assert storage.join("s3://b/", "/x/", "y") == "s3://b/x/y"
    assert storage.join("/data", "x") == "/data/x"


def test_missing_file(root: str) -> None:
    uri = storage.join(root, "none.bin")
    with pytest.raises(ShardError, match=r"none.bin: there is no such file") as caught:
        storage.read_bytes(uri)
    assert isinstance(caught.value.__cause__, FileNotFoundError)
    with pytest.raises(AssetError, match="there is no such file"):
        storage.localise(uri)


def test_missing_bucket(s3: str) -> None:
    for act in (
        lambda: storage.read_bytes("s3://no-such-bucket-here/x", LedgerError),
        lambda: storage.write_bytes("s3://no-such-bucket-here/x", b"x"),
        lambda: list(storage.list_files("s3://no-such-bucket-here/x", LedgerError)),
    ):
        with pytest.raises(LedgerError, match="bucket 'no-such-bucket-here' does not exist"):
            act()


def test_refused_credentials(s3: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAWRONG")
    with s3_server.checks_credentials(), pytest.raises(ConfigError) as caught:
        storage.write_bytes(f"{s3}/probe", b"", ConfigError)
    assert "the server refused the credentials (InvalidAccessKeyId)" in str(caught.value)
    assert "AWS_PROFILE" in str(caught.value)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    storage.write_bytes(f"{s3}/probe", b"", ConfigError)
    assert [name for name, _, _ in storage.list_files(s3)] == ["probe"]


def test_no_credentials(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(ShardError, match=r"no usable credentials .*Set AWS_ACCESS_KEY_ID"):
        storage.read_bytes(f"{s3}/x")


def test_profile_decides_endpoint_and_credentials(
    s3: str, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "config"
    config.write_text(
        f"[profile lab]\nendpoint_url = {s3_server.endpoint}\nregion = us-east-1\n"
        "aws_access_key_id = testing\naws_secret_access_key = testing\n"
    )
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    storage.write_bytes(f"{s3}/x", b"by profile")
    assert storage.read_bytes(f"{s3}/x") == b"by profile"
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(ShardError, match=r"nobody.*Set AWS_PROFILE"):
        storage.read_bytes(f"{s3}/x")


def test_server_that_does_not_answer(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr("s3fs.core.S3FileSystem.retries", 1)
    with pytest.raises(ShardError, match=r"does not answer at http://127.0.0.1:9 .*AWS_ENDPOINT"):
        storage.read_bytes(f"{s3}/x")


def test_adaptive_retries_unless_the_environment_says_otherwise(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs, _ = storage.open_filesystem(s3)
    assert fs.config_kwargs["retries"] == {"mode": "adaptive", "total_max_attempts": 8}
    assert storage.open_filesystem(s3)[0] is fs
    monkeypatch.setenv("AWS_RETRY_MODE", "standard")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "3")
    other, _ = storage.open_filesystem(s3)
    assert other is not fs
    assert "retries" not in other.config_kwargs


def test_localise_fetches_once_and_follows_changes(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFINERY_CACHE", str(tmp_path / "cache"))
    uri = f"{s3}/weights/generator.safetensors"
    storage.write_bytes(uri, b"one")
    first = storage.localise(uri)
    assert first.name == "generator.safetensors"
    assert first.read_bytes() == b"one"
    stamp = first.stat().st_mtime_ns
    assert storage.localise(uri) == first
    assert first.stat().st_mtime_ns == stamp
    storage.write_bytes(uri, b"two!")
    assert storage.localise(uri).read_bytes() == b"two!"
    local = tmp_path / "local.bin"
    local.write_bytes(b"x")
    assert storage.localise(str(local)) == local


def test_link_back_up_does_not_loop(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(b"x")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "broken.png").symlink_to(tmp_path / "gone")
    assert [name for name, _, _ in storage.list_files(str(tmp_path))] == ["a/x.png"]


def test_errors_that_are_not_storages_pass_through() -> None:
    with pytest.raises(TypeError), storage_errors.storage_errors("read", "x"):
        raise TypeError("a bug")


def test_remove(root: str) -> None:
    uri = storage.join(root, "x")
    storage.write_bytes(uri, b"x")
    storage.remove([uri, uri])
    assert not storage.exists(uri)
